"""The experiments for PEFT's own comparison: the files that its script reads, with the sizes that their names say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import LlamaConfig

from krontune.weights import meta_model

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS = sorted((ROOT / "recipes" / "peft-suite").glob("*/*"))
LLAMA_3_2_3B = LlamaConfig(
    hidden_size=3072,
    num_hidden_layers=28,
    num_attention_heads=24,
    num_key_value_heads=8,
    head_dim=128,
    intermediate_size=8192,
    vocab_size=128256,
    tie_word_embeddings=True,
)


def size(config: PeftConfig) -> int:
    return int(get_peft_model(meta_model(LLAMA_3_2_3B), config).get_nb_trainable_parameters()[0])


@pytest.mark.parametrize("folder", EXPERIMENTS, ids=lambda folder: folder.name)
def test_sizes_are_shares_of_the_suites_lora(folder: Path) -> None:
    """The suite's lora/llama-3.2-3B-rank32 has 9,175,040 parameters."""
    config = PeftConfig.from_pretrained(folder)
    assert config.peft_type.value.lower() == folder.parent.name
    config.init_weights = "zero"  # the meta device has no weights to start from
    share = size(config) / size(LoraConfig(r=32, task_type="CAUSAL_LM"))
    stated = folder.name.rpartition("-")[2]
    wanted = float(stated.removesuffix("x")) if stated.endswith("x") else 1.0
    assert wanted - 0.01 <= share <= wanted + 0.005
    assert set(json.loads((folder / "training_params.json").read_text())) == {"optimizer_kwargs"}


def test_a_script_that_does_not_know_krontune_reads_them(tmp_path: Path) -> None:
    """As docs/reproduce.md starts the suite's run.py: krontune is imported first, in the same process."""
    script = tmp_path / "run.py"
    script.write_text(
        "import sys\nfrom peft import PeftConfig\n"
        "if __name__ == '__main__':\n    print(type(PeftConfig.from_pretrained(sys.argv[2])).__name__, sys.argv[1])\n"
    )
    start = "import krontune, runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", start, str(script), "-v", str(EXPERIMENTS[0])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["LsrConfig", "-v"]
