"""The run configs that come with the project: they are valid, and train what they say on the prompts of the tasks."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import LlamaConfig, RobertaConfig

from krontune.plan import plan
from krontune.recipes import RunConfig, load_config
from krontune.recipes.config import MethodSettings
from krontune.recipes.methods import peft_config
from krontune.recipes.runs import RunFolder
from krontune.recipes.tasks import TASKS, fill
from krontune.recipes.training import make_learner
from krontune.weights import meta_model

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "recipes"
RUNS = sorted(path for path in FOLDER.rglob("*.yaml") if "compare" not in path.parts)
SET = re.compile(r"#   (?:krontune train \S+ )?(--set .*)")
SMOLLM2 = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)


def overrides(path: Path) -> list[list[str]]:
    """No change, and those that the comments of a file suggest, a line each."""
    found = [SET.match(line) for line in path.read_text(encoding="utf-8").splitlines()]
    words = [shlex.split(match[1]) for match in found if match]
    return [[], *([word for word in line if word != "--set"] for line in words)]


def check(config: RunConfig) -> None:
    learner = make_learner(config)
    peft_config(config.method, learner.task_type)
    assert learner.arguments(RunFolder(config.output)).learning_rate > 0


@pytest.mark.parametrize("path", RUNS, ids=lambda path: str(path.relative_to(FOLDER)))
def test_every_run_config_is_valid_with_every_change_it_suggests(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for changes in overrides(path):
        check(load_config(path, changes))
    assert len(overrides(path)) > 1 or "soka" not in path.parts


def test_there_are_run_configs() -> None:
    names = {path.stem for path in RUNS}
    assert {"gsm8k-lora", "gsm8k-lsr", "gsm8k-soka", "lsr-adapt", "gsm8k", "math", "mbpp", "small"} <= names


def trainable(model_config: LlamaConfig | RobertaConfig, config: PeftConfig) -> int:
    """What PEFT counts on a model without values."""
    if hasattr(config, "init_weights"):
        config.init_weights = "zero"
    elif isinstance(config, LoraConfig):
        config.init_lora_weights = True
    return get_peft_model(meta_model(model_config), config).get_nb_trainable_parameters()[0]


def soka_by_budget(model_config: LlamaConfig, method: MethodSettings) -> int:
    """The budget rule sees spectra, and buys as many terms as a plan from shapes does: here they cost all the same."""
    made = plan(
        meta_model(model_config),
        "soka",
        method.settings["budget"],
        target_modules=method.settings["target_modules"],
    )
    assert trainable(model_config, made.config) == made.n_params
    return made.n_params


@pytest.mark.parametrize("task", ["gsm8k", "math", "mbpp"])
def test_soka_has_a_quarter_fewer_parameters_on_llama2_7b(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    path = FOLDER / "soka" / f"{task}.yaml"
    soka = soka_by_budget(LlamaConfig(), load_config(path).method)
    assert round(soka / 1e6, 2) == 0.99
    for name in ("lora", "pissa"):
        config = load_config(path, [f"method=recipes/soka/{name}.json"])
        other = peft_config(config.method)
        assert (other.init_lora_weights == "pissa") == (name == "pissa")
        n_other = trainable(LlamaConfig(), other)
        assert round(n_other / 1e6, 2) == 1.32
        assert soka / n_other == pytest.approx(0.75, abs=0.005)


def test_the_small_form_keeps_the_ratio() -> None:
    path = FOLDER / "soka" / "small.yaml"
    loras = [changes for changes in overrides(path) if any("lora" in change for change in changes)]
    assert len(loras) == 2
    soka = soka_by_budget(SMOLLM2, load_config(path).method)
    assert soka == 86_400
    for changes in loras:
        assert trainable(SMOLLM2, peft_config(load_config(path, changes).method)) == 115_200


def test_lsr_adapt_has_the_papers_parameters() -> None:
    path = FOLDER / "lsr-adapt.yaml"
    roberta = RobertaConfig(vocab_size=50265)
    assert trainable(roberta, peft_config(load_config(path).method)) == 24 * 3_584
    (lora,) = [changes for changes in overrides(path) if any("lora" in change for change in changes)]
    assert trainable(roberta, peft_config(load_config(path, lora).method)) == 24 * 12_288


@pytest.mark.parametrize(("name", "field"), [("gsm8k", "question"), ("math", "problem")])
def test_metamathqa_is_put_into_the_prompt_of_the_task(name: str, field: str) -> None:
    config = load_config(FOLDER / "soka" / f"{name}.yaml")
    asked = "What is {1} + 1?"
    task = TASKS[name]
    assert config.data.columns["prompt"].format_map({"query": asked}) == fill(task.prompt, {field: asked})
    answer = next(iter(re.findall(r"{(\w+)}", task.completion)))
    given = config.data.columns["completion"].format_map({"response": "2"})
    assert given == fill(task.completion, {answer: "2"})


def test_code_instructions_look_like_the_prompt_of_mbpp() -> None:
    columns = load_config(FOLDER / "soka" / "mbpp.yaml").data.columns
    row = {"instruction": "Add.", "input": "", "output": "def add(a, b):\n    return a + b"}
    asked = fill(TASKS["mbpp"].prompt, {"text": "Add.", "test_list": ["assert add(1, 1) == 2"]})
    prompt = columns["prompt"].format_map(row)
    assert prompt.startswith('"""\nAdd.\n') and asked.startswith('"""\nAdd.\n')
    assert prompt.endswith('\n"""\n') and asked.endswith('\n"""\n')
    assert columns["completion"].format_map(row) == row["output"] + "\n"
