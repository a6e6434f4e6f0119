"""Merging into the demo's model: the folder in plain transformers, the file in llama.cpp."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from krontune import SokaConfig
from krontune.convert import Merge, merge
from krontune.errors import ConfigError
from krontune.weights import find_model
from tests.convert.helpers import randomise

IDS = torch.tensor([[1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 30, 2, 198]])
BASE = "packaged:smollm2"

#: Plain transformers, in a process that cannot import krontune or PEFT.
STOCK = """
import sys
sys.modules["krontune"] = sys.modules["peft"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, ids, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
assert AutoTokenizer.from_pretrained(folder).decode([1]) == "<|im_start|>"
with torch.no_grad():
    torch.save(model(input_ids=torch.load(ids)).logits, out)
"""

pytestmark = [pytest.mark.integration, pytest.mark.slow]


class Merged:
    """A merge of an adapter on SmolLM2, and the logits before and after."""

    def __init__(self, folder: Path) -> None:
        try:
            source = find_model(BASE)
        except ConfigError as error:
            pytest.skip(str(error))
        model = AutoModelForCausalLM.from_pretrained(
            source.name_or_path, dtype=torch.float32, **source.loading_options
        ).eval()
        self.before = logits(model)
        model.name_or_path = BASE
        config = SokaConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], layers_to_transform=[0, 9, 29])
        adapted = randomise(get_peft_model(model, config), 0.03)
        adapted.peft_config["default"].base_model_name_or_path = BASE
        self.wanted = logits(adapted)
        adapted.save_pretrained(folder / "adapter")
        del model, adapted
        self.report: Merge = merge(folder / "adapter", folder / "merged", gguf=True, check=False)
        self.folder = folder / "merged"


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Merged:
    return Merged(tmp_path_factory.mktemp("smollm2"))


def test_plain_transformers_loads_the_folder(merged: Merged, tmp_path: Path) -> None:
    assert distance(merged.before, merged.wanted) > 0.1
    torch.save(IDS, tmp_path / "ids.pt")
    arguments = [str(merged.folder), str(tmp_path / "ids.pt"), str(tmp_path / "logits.pt")]
    subprocess.run([sys.executable, "-c", STOCK, *arguments], check=True, capture_output=True)
    assert distance(torch.load(tmp_path / "logits.pt"), merged.wanted) < 1e-5


def test_llama_cpp_loads_the_file(merged: Merged) -> None:
    """It multiplies with 8-bit activations where weights have 4 bits, so that its logits are near and not equal."""
    llama_cpp = pytest.importorskip("llama_cpp")
    model = llama_cpp.Llama(str(merged.report.gguf), logits_all=True, n_ctx=64, n_threads=1, verbose=False)
    model.eval(IDS[0].tolist())
    got = torch.tensor(model.scores[: IDS.shape[1]])[None].float()
    model.close()
    assert distance(got, merged.wanted) < 0.06  # 0.033 when this was written
    assert distance(got, merged.before) > 0.09
