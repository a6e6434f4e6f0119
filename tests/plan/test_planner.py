from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch
from peft import PeftConfig, get_peft_model
from transformers import LlamaConfig, RobertaConfig

from krontune.errors import ConfigError
from krontune.kron.cost import choose_path
from krontune.plan import Target, find_targets, plan
from krontune.plan.budget import even_ranks
from krontune.plan.cost import soka_path
from krontune.plan.planner import METHODS, config_dict
from krontune.plan.targets import rank_pattern
from krontune.tuners.soka import SokaSpec
from krontune.weights import meta_model

LLAMA_7B = LlamaConfig()  # its defaults are LLaMA2-7B's
ROBERTA = RobertaConfig(vocab_size=50265)
TINY = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)


def trainable(model: torch.nn.Module, config: PeftConfig) -> int:
    """What PEFT counts once the adapter is there."""
    if hasattr(config, "init_weights"):
        config.init_weights = "zero"  # no values, so that the meta device will do
    return get_peft_model(model, config).get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("targets", [None, "all-linear"])
@pytest.mark.parametrize("budget", ["0.99M", "3M", "11.7M"])
def test_llama_7b_stays_within_2_percent_of_the_budget(method: str, targets: str | None, budget: str) -> None:
    if method != "lsr" and targets and budget == "0.99M":
        pytest.skip("one term or rank for every linear layer takes 2.5M")
    made = plan(meta_model(LLAMA_7B), method, budget, target_modules=targets)
    assert made.budget is not None
    assert 0.98 * made.budget <= made.n_params <= made.budget
    assert trainable(meta_model(LLAMA_7B), made.config) == made.n_params


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", ["0.3M", "1M"])
def test_roberta_stays_within_2_percent_of_the_budget(method: str, budget: str) -> None:
    made = plan(meta_model(ROBERTA), method, budget)
    assert made.budget is not None
    assert 0.98 * made.budget <= made.n_params <= made.budget
    assert trainable(meta_model(ROBERTA), made.config) == made.n_params


@pytest.mark.parametrize("method", ["lsr", "soka"])
def test_the_count_includes_a_classification_head_and_norms(method: str) -> None:
    made = plan(meta_model(ROBERTA, "SEQ_CLS"), method, "0.3M", task_type="SEQ_CLS", train_norms=True)
    assert made.n_other == 592_130 + 25 * 2 * 768  # the head (dense + out_proj) and 25 LayerNorms
    assert trainable(meta_model(ROBERTA, "SEQ_CLS"), made.config) == made.n_trainable


def test_golden_ranks() -> None:
    """The choices that documentation shows; a change here is a change of what users get."""
    chosen = {}
    for method in METHODS:
        config = plan(meta_model(LLAMA_7B), method, "0.99M").config
        chosen[method] = (config.r, getattr(config, "separation_rank", None), len(config.rank_pattern))
    assert chosen == {"lsr": (25, 12, 0), "soka": (2, None, 2), "lora": (2, None, 2)}


def test_bytes_are_those_of_the_saved_file(tmp_path) -> None:
    for method, sort in (*((method, None) for method in METHODS), ("soka", "norm")):
        model = meta_model(TINY).to_empty(device="cpu")
        torch.manual_seed(0)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        made = plan(model, method, "4k", channel_sort=sort, target_modules="all-linear")
        get_peft_model(model, made.config).save_pretrained(tmp_path / method)
        size = (tmp_path / method / "adapter_model.safetensors").stat().st_size
        header = int.from_bytes((tmp_path / method / "adapter_model.safetensors").read_bytes()[:8], "little") + 8
        assert size - header == made.n_bytes


def test_saved_config_is_used_as_it_is(tmp_path) -> None:
    made = plan(meta_model(TINY), "lsr", "2000", target_modules=["q_proj", "v_proj"], name="packaged:tiny")
    file = made.save(tmp_path)
    loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert loaded.base_model_name_or_path == "packaged:tiny"
    assert trainable(meta_model(TINY), loaded) == made.n_params
    with pytest.raises(ConfigError, match="--force"):
        made.save(file)
    made.save(file, force=True)
    assert json.loads(file.read_text()) == config_dict(made.config)


@pytest.mark.parametrize("method", METHODS)
def test_saved_config_is_used_by_train(method: str, tmp_path) -> None:
    from krontune.recipes import RunConfig
    from krontune.recipes.methods import peft_config

    made = plan(meta_model(TINY), method, "3k", target_modules=["q_proj", "v_proj"])
    run = {"model": "m", "data": "d.jsonl", "output": "o", "method": str(made.save(tmp_path))}
    config = RunConfig.from_mapping(run)
    assert config.method.name == method
    assert RunConfig.from_mapping(config.to_mapping()) == config
    assert trainable(meta_model(TINY), peft_config(config.method)) == made.n_params
    changed = RunConfig.from_mapping({**run, "method": {"name": run["method"], "r": 3}})
    assert changed.method.settings == {**config.method.settings, "r": 3}
    with pytest.raises(ConfigError, match=r"nowhere\.json is no adapter config"):
        RunConfig.from_mapping({**run, "method": "nowhere.json"})


def test_planning_leaves_the_model_as_it_was() -> None:
    model = meta_model(TINY)
    before = {name: (p.shape, p.requires_grad) for name, p in model.named_parameters()}
    modules = [type(module) for module in model.modules()]
    plan(model, "soka", "20k", target_modules="all-linear")
    assert {name: (p.shape, p.requires_grad) for name, p in model.named_parameters()} == before
    assert [type(module) for module in model.modules()] == modules


@pytest.mark.parametrize("method", METHODS)
def test_the_kinds_add_up_to_the_whole(method: str) -> None:
    whole = plan(meta_model(TINY), method, "8k", target_modules="all-linear").to_dict()
    for name in ("n_params", "n_bytes", "macs_per_token", "share_of_base_macs"):
        assert sum(kind[name] for kind in whole["kinds"]) == pytest.approx(whole[name], rel=1e-9)
    for name, size in whole["training_bytes"].items():
        assert sum(kind["training_bytes"][name] for kind in whole["kinds"]) == size


def test_given_ranks_are_kept() -> None:
    made = plan(meta_model(TINY), "lsr", "8k", r=4)
    assert made.config.r == 4
    assert not made.config.rank_pattern
    made = plan(meta_model(TINY), "lsr", "8k", separation_rank=3)
    assert made.config.separation_rank == 3
    assert made.n_params <= 8000
    made = plan(meta_model(TINY), "soka", r=2, factor_shape="square")
    assert {m.spec.r for m in made.modules} == {2}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "dora"}, "method 'dora' is unknown"),
        ({"budget": "10"}, "below the least that 6 modules can have"),
        ({"budget": "lots"}, "'lots' is not an amount"),
        ({"method": "lora", "budget": "8k", "r": 2}, "nothing left to choose"),
        ({"method": "soka", "separation_rank": 2}, "separation_rank is LSR's"),
        ({"method": "lora", "factor_shape": 4}, "factor_shape .* is SoKA's"),
        ({"method": "soka", "factor_shape": 7}, "p = 7 does not divide"),
        ({"target_modules": ["nothing"]}, "nothing"),
        *[({"method": method, "r": r}, f"r is {r}; it must be at least 1") for method in METHODS for r in (0, -3)],
        ({"separation_rank": 0}, "separation_rank is 0; it must be at least 1"),
        ({"tokens": 0}, "tokens is 0"),
    ],
)
def test_wrong_settings_are_said(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(meta_model(TINY), **settings)


@pytest.mark.parametrize("settings", [{"budget": "40k"}, {"budget": "40k", "separation_rank": 1}, {"r": 100}])
def test_no_rank_is_above_what_the_weight_has(settings: dict, tmp_path) -> None:
    model = meta_model(TINY)
    made = plan(model, "lsr", target_modules="all-linear", **settings)
    assert all(m.spec.r <= min(m.target.m, m.target.n) for m in made.modules)
    assert trainable(model, made.config) == made.n_params
    if "r" in settings:
        assert any("have less than rank 100" in note for note in made.notes)
    else:
        assert made.n_params <= made.budget


def test_sorted_channels_do_not_fold_into_the_weight() -> None:
    """The merged path then multiplies with the sum apart, which costs a product of the weight's size."""
    spec = SokaSpec(16, (32, 32), (24, 24))
    apart = dataclasses.replace(spec, is_sorted=True)
    folded = soka_path(spec, 2048)
    assert folded[0] == "merged" and folded[1] < 768 * 768
    path, macs = soka_path(apart, 2048)
    assert path == choose_path(2048, spec.shape, 32, 16, fold_weight=False)
    assert macs > folded[1] and (path != "merged" or macs > 768 * 768)


def test_wasteful_and_poorly_used_budgets_are_noted() -> None:
    notes = " ".join(plan(meta_model(TINY), "lsr", r=1, separation_rank=16).notes)
    assert "more parameters than the LoRA" in notes
    assert "of the budget is used" in " ".join(plan(meta_model(TINY), "lsr", "3k", r=4).notes)


def test_rank_pattern_matches_exactly_its_modules() -> None:
    targets = [Target(f"model.layers.{i}.{m}", 8, 8) for i in range(12) for m in ("q_proj", "v_proj")]
    targets += [Target("head", 8, 8), Target("model.layers.0.experts.1.up", 8, 8)]
    ranks = [1 + (i % 3) for i in range(len(targets))]
    pattern = rank_pattern(targets, ranks, default=2)
    for target, rank in zip(targets, ranks):
        found = [value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", target.name)]
        assert found == ([] if rank == 2 else [rank])


def test_all_modules_of_a_kind_share_one_key() -> None:
    targets = [Target(f"layers.{i}.{m}", 8, 8) for i in range(4) for m in "qv"]
    assert rank_pattern(targets, [1, 3] * 4, default=1) == {r"^layers\.\d+\.v$": 3}


def test_even_ranks_never_exceed_the_budget() -> None:
    for budget in range(60, 400, 7):
        ranks = even_ranks([10, 20, 30], budget, [3, 4, 5])
        assert sum(r * c for r, c in zip(ranks, [10, 20, 30])) <= budget
        assert all(1 <= r <= cap for r, cap in zip(ranks, [3, 4, 5]))
        assert max(ranks) - min(ranks) <= 1 or 3 in ranks


def test_targets_come_in_the_models_order_with_their_sizes() -> None:
    targets = find_targets(meta_model(TINY), target_modules=["k_proj", "down_proj"]).targets
    assert [(t.kind, t.indices, t.m, t.n) for t in targets[:2]] == [
        ("model.layers.*.self_attn.k_proj", (0,), 16, 32),
        ("model.layers.*.mlp.down_proj", (0,), 32, 48),
    ]
