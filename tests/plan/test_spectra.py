from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import GPT2Config, LlamaConfig

from krontune.errors import CheckpointError, ConfigError
from krontune.kron import KronShape, channel_order, rearrange
from krontune.plan import find_targets, parse_shapes, soka_ranks, spectrum, spectrum_report
from krontune.plan.spectra import Spectrum, read_matrix
from krontune.weights import find_model, meta_model, open_weights

TINY = LlamaConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = meta_model(TINY).to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def opened(folder: Path, targets: list[str]):
    model = meta_model(TINY)
    return open_weights(find_model(str(folder)), model), model, find_targets(model, target_modules=targets).targets


def test_spectra_are_the_singular_values_of_the_rearranged_weight(folder: Path) -> None:
    weights, model, targets = opened(folder, ["q_proj", "up_proj"])
    found = spectrum(weights, model, targets, [4, "square"], k=5)
    assert len(found) == 2 * len(targets)
    for item in found:
        W = weights.read(f"{item.name}.weight").double()
        sigma = torch.linalg.svdvals(rearrange(W, item.shape))[:5]
        torch.testing.assert_close(torch.tensor(item.sigma, dtype=torch.float64), sigma, rtol=1e-4, atol=1e-5)
        assert item.energy == pytest.approx(float(W.square().sum()), rel=1e-5)


def test_p_1_is_the_plain_svd(folder: Path) -> None:
    weights, model, targets = opened(folder, ["q_proj"])
    (item, *_) = spectrum(weights, model, targets, [1], k=4)
    expected = torch.linalg.svdvals(weights.read(f"{item.name}.weight"))[:4]
    torch.testing.assert_close(torch.tensor(item.sigma), expected, rtol=1e-4, atol=1e-5)


def test_channel_sort_finds_a_hidden_kronecker_product(tmp_path: Path) -> None:
    torch.manual_seed(0)
    left, right = torch.rand(8, 1).sort(0, True).values + 0.1, torch.rand(1, 8).sort(1, True).values + 0.1
    W = torch.kron(left, torch.ones(2, 16)) * torch.kron(right, torch.ones(16, 2))
    shuffled = W[torch.randperm(16)][:, torch.randperm(16)]
    for how in ("svd", "norm"):
        order = channel_order(shuffled, how)
        assert sorted(order.rows.tolist()) == sorted(order.cols.tolist()) == list(range(16))
        ordered = order.sort(shuffled)
        assert torch.equal(order.unsort(ordered), shuffled)
        sigma = torch.linalg.svdvals(rearrange(ordered, KronShape(8, 8, 2, 2)))
        assert sigma[0] ** 2 / shuffled.square().sum() == pytest.approx(1, abs=1e-5)
    assert torch.linalg.svdvals(rearrange(shuffled, KronShape(8, 8, 2, 2)))[0] ** 2 / shuffled.square().sum() < 0.99


def test_an_interrupted_run_goes_on_from_its_cache(folder: Path, tmp_path: Path, monkeypatch) -> None:
    weights, model, targets = opened(folder, ["q_proj", "v_proj"])
    cache = tmp_path / "spectra.jsonl"

    def interrupted(items):
        for i, item in enumerate(items):
            if i == 2:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        spectrum(weights, model, targets, [4], k=3, cache=cache, progress=interrupted)
    with cache.open("a") as file:
        file.write('{"key": "cut sho')  # as a kill in the middle of a write leaves it
    computed = []
    from krontune.plan import spectra

    original = spectra.nearest_kron
    monkeypatch.setattr(spectra, "nearest_kron", lambda *args: computed.append(1) or original(*args))
    resumed = spectrum(weights, model, targets, [4], k=3, cache=cache)
    assert len(computed) == len(targets) - 2
    assert resumed == spectrum(weights, model, targets, [4], k=3)
    computed.clear()
    spectrum(weights, model, targets, [4], k=3, cache=cache)
    assert not computed  # the line that was cut short is gone, and no other with it


def test_a_file_of_something_else_is_no_cache(folder: Path, tmp_path: Path) -> None:
    weights, model, targets = opened(folder, ["q_proj"])
    (tmp_path / "metrics.jsonl").write_text('{"loss": 1.5}\n')
    with pytest.raises(CheckpointError, match="is no cache of spectra"):
        spectrum(weights, model, targets, [4], k=3, cache=tmp_path / "metrics.jsonl")
    assert (tmp_path / "metrics.jsonl").read_text() == '{"loss": 1.5}\n'


def test_another_models_cache_is_not_used(folder: Path, tmp_path: Path) -> None:
    weights, model, targets = opened(folder, ["q_proj"])
    cache = tmp_path / "spectra.jsonl"
    first = spectrum(weights, model, targets, [4], k=3, cache=cache)
    changed = {name: weights.read(name) * 2 for name in weights.names()}
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    weights, model, targets = opened(folder, ["q_proj"])
    second = spectrum(weights, model, targets, [4], k=3, cache=cache)
    assert second[0].energy == pytest.approx(4 * first[0].energy, rel=1e-4)


def test_report_says_what_was_not_reached(folder: Path) -> None:
    weights, model, targets = opened(folder, ["q_proj"])
    report = spectrum_report(spectrum(weights, model, targets, ["auto"], k=3), rule="spectrum", theta=0.99)
    (first, *_) = report["layers"]
    assert first["energy_rank"] is None
    assert first["rank"] == 3
    assert "below the threshold" in first["reason"]
    assert json.loads(json.dumps(report)) == report


def test_budget_report_and_plan_choose_alike(folder: Path) -> None:
    weights, model, targets = opened(folder, ["q_proj", "up_proj"])
    report = spectrum_report(spectrum(weights, model, targets, ["auto"], k=32), "budget", budget=500)
    ranks = [layer["rank"] for layer in report["layers"]]
    assert ranks == soka_ranks(weights, model, targets, 500)
    assert sum(layer["rank"] * layer["n_params_per_term"] for layer in report["layers"]) <= 500


def test_noise_edge_separates_structure_from_noise() -> None:
    shape = KronShape(16, 16, 16, 16)
    R = torch.randn(256, 256) + 60 * torch.outer(torch.ones(256), torch.ones(256)) / 256
    sigma = torch.linalg.svdvals(R)[:8]
    item = Spectrum("w", "w", None, "square", shape, None, None, float(R.square().sum()), sigma.tolist())
    assert item.to_dict()["above_noise"] == 1


def test_conv1d_weights_are_seen_the_right_way_round(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=32, n_embd=8, n_layer=1, n_head=2, n_positions=8)
    model = meta_model(config).to_empty(device="cpu")
    model.save_pretrained(tmp_path)
    empty = meta_model(config)
    (target, *_) = find_targets(empty, target_modules=["c_attn"]).targets
    matrix = read_matrix(open_weights(find_model(str(tmp_path)), empty), empty, target)
    assert matrix.shape == (24, 8) == (target.m, target.n)


def test_bad_weights_and_shapes_are_said(folder: Path) -> None:
    weights, model, targets = opened(folder, ["q_proj"])
    with pytest.raises(ConfigError, match="none of the factor shapes"):
        spectrum(weights, model, targets, [7])
    tensors = {name: weights.read(name) for name in weights.names()}
    tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"layers\.0\.self_attn\.q_proj.*NaN"):
        spectrum(*opened(folder, ["q_proj"]))
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] = 1.0
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no tensor 'model\.layers\.1\.self_attn\.q_proj\.weight'"):
        spectrum(*opened(folder, ["q_proj"]))


def test_shapes_on_a_command_line() -> None:
    assert parse_shapes("auto, 4,16x8,square") == ["auto", 4, (16, 8), "square"]
    for text in ("", "p4", "3x", "4;8"):
        with pytest.raises(ConfigError, match="factor shape"):
            parse_shapes(text)
