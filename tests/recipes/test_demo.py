from __future__ import annotations

import json
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from krontune.errors import ConfigError
from krontune.recipes.config import ModelSettings, load_config
from krontune.recipes.demo import CONTENDERS, DemoSettings, Watcher, run_demo
from krontune.recipes.demo_report import write_demo_report
from krontune.recipes.models import load_base
from krontune.recipes.orders import is_exact
from krontune.report import read_record


class Phases(Watcher):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def phase(self, text: str) -> None:
        self.texts.append(text)


def settings(output: Path, model: Path) -> DemoSettings:
    return DemoSettings(output=output, model=str(model), steps=3, batch_size=2, test_items=4)


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a demo on the tiny model."""
    output = tmp_path_factory.mktemp("demo") / "demo"
    phases = Phases()
    chosen = settings(output, tiny_model)
    result = run_demo(chosen, phases)
    assert write_demo_report(result, chosen) == output / "report.html"
    assert [text for text in phases.texts if "training" in text] == [
        f"{name}: training for 3 steps" for name in ("LoRA", "LSR", "SoKA")
    ]
    return output


def test_every_number_comes_from_the_runs(finished: Path, tiny_model: Path) -> None:
    records = json.loads((finished / "records.json").read_text())
    assert [record["name"] for record in records] == ["LoRA", "LSR", "SoKA"]
    answers = json.loads((finished / "answers.json").read_text())
    test = [json.loads(line) for line in (finished / "test.jsonl").read_text().splitlines()]
    assert [(row["prompt"], row["wanted"]) for row in answers] == [(row["prompt"], row["completion"]) for row in test]
    for record in records:
        own = read_record(finished / record["name"].lower() / "record.json")
        assert (record["n_trainable"], record["loss"], record["step_ms"]) == (own.n_trainable, own.loss, own.step_ms)
        assert record["adapter_bytes"] == own.adapter_bytes
        exact = [is_exact(row[record["name"]], row["wanted"]) for row in answers]
        untrained = [is_exact(row["untrained"], row["wanted"]) for row in answers]
        assert record["scores"] == {
            "exact_match_before": sum(untrained) / len(untrained),
            "exact_match_after": sum(exact) / len(exact),
        }
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), finished / own.name / "adapter")


def test_the_methods_see_the_same_training(finished: Path) -> None:
    configs = [load_config(finished / name / "config.yaml") for name in ("lora", "lsr", "soka")]
    assert len({config.data.model_dump_json() for config in configs}) == 1
    assert {config.training["max_steps"] for config in configs} == {3}
    tokens = [
        [row["num_tokens"] for row in read_record(finished / c.output.name / "record.json").history] for c in configs
    ]
    assert tokens[0] == tokens[1] == tokens[2]


def test_the_report_needs_nothing_else(finished: Path) -> None:
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert "data:image/png;base64," in page
    assert "http" not in page.split("Settings and machine")[0]
    assert "<script" not in page
    for record in json.loads((finished / "records.json").read_text()):
        assert f"{record['n_trainable']:,}" in page
        assert f"{record['n_trainable']:,}" in (finished / "table.md").read_text()
    assert (finished / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_the_sizes_that_the_demo_promises() -> None:
    """On SmolLM2-135M's weights: LSR about a quarter of LoRA r=8, SoKA at most as much as it."""
    from krontune.recipes.config import MethodSettings
    from krontune.recipes.methods import peft_config

    shapes = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
    sizes = {}
    for contender in CONTENDERS[1:]:
        config = peft_config(MethodSettings(**contender.method))
        sizes[contender.name] = sum(config.spec_for(m, n).n_params for m, n in shapes)
    lora = sum(CONTENDERS[0].method["r"] * (m + n) for m, n in shapes)
    assert 0.2 < sizes["LSR"] / lora < 0.3
    assert sizes["SoKA"] <= lora


def test_a_folder_in_use_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is in use"):
        run_demo(settings(tmp_path, tiny_model))


def test_the_base_is_left_as_it_was(tmp_path: Path, tiny_model: Path) -> None:
    base = load_base(ModelSettings(path=str(tiny_model)))
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    run_demo(settings(tmp_path / "demo", tiny_model), base=base)
    after = base.model.state_dict()
    assert after.keys() == before.keys()
    assert all((after[name] == before[name]).all() for name in before)
