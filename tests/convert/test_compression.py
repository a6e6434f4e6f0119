from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

from krontune.convert import compress, open_adapter
from krontune.convert.separate import separate, terms_for_exact
from krontune.convert.to_lora import export_lora
from krontune.errors import ConfigError
from krontune.kron import nearest_separated, separated_sum
from tests.convert.helpers import LINEAR, adapter_logits, save_adapter

SIZES = ((6, 4), (2, 2), (5, 4))


def dense(factors_b: list[torch.Tensor], factors_a: list[torch.Tensor]) -> torch.Tensor:
    """sum_k B1_k (x) B2_k times sum_k A1_k (x) A2_k by torch.kron."""
    B, A = (sum(torch.kron(*pair) for pair in zip(*(f.double() for f in fs))) for fs in (factors_b, factors_a))
    return B @ A


@given(s=st.integers(1, 4), seed=st.integers(0, 100))
def test_the_error_is_that_of_the_dense_products(s: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    B, A = torch.randn(24, 4, generator=generator), torch.randn(4, 20, generator=generator)
    fit = separate(B, A, SIZES, s)
    W = B.double() @ A.double()
    assert fit.error == pytest.approx(float((W - dense(fit.b_factors, fit.a_factors)).norm() / W.norm()), rel=1e-4)


@given(s=st.integers(1, 6), seed=st.integers(0, 50))
def test_sweeps_only_ever_help(s: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    B, A = torch.randn(24, 4, generator=generator), torch.randn(4, 20, generator=generator)
    errors = [separate(B, A, SIZES, s, sweeps).error for sweeps in (0, 1, 3, 8)]
    assert all(later <= earlier + 1e-9 for earlier, later in pairwise(errors))
    m, r, n = SIZES
    plain = dense(nearest_separated(B, m, r, s), nearest_separated(A, r, n, s))
    W = B.double() @ A.double()
    assert errors[0] <= float((W - plain).norm() / W.norm()) + 1e-6


def test_enough_terms_lose_nothing() -> None:
    B, A = torch.randn(24, 4), torch.randn(4, 20)
    assert separate(B, A, SIZES, terms_for_exact(SIZES)).error < 1e-6
    assert separate(B, A, SIZES, terms_for_exact(SIZES) - 1).error > 1e-3


def test_a_hidden_basis_is_found() -> None:
    """B G and G^-1 A have the same product, but only one basis has few terms."""
    b, a = [torch.randn(2, 6, 2), torch.randn(2, 4, 2)], [torch.randn(2, 2, 5), torch.randn(2, 2, 4)]
    G = torch.randn(4, 4)
    B, A = separated_sum(b) @ G, torch.linalg.inv(G) @ separated_sum(a)
    m, r, n = SIZES
    W = B.double() @ A.double()
    kpsvd_alone = float((W - dense(nearest_separated(B, m, r, 2), nearest_separated(A, r, n, 2))).norm() / W.norm())
    assert kpsvd_alone > 0.2
    assert separate(B, A, SIZES, 2, sweeps=30).error < 1e-4


def test_a_zero_update_stays_zero() -> None:
    fit = separate(torch.zeros(24, 4), torch.randn(4, 20), SIZES, 2)
    assert fit.error == 0
    assert torch.equal(dense(fit.b_factors, fit.a_factors), torch.zeros(24, 20, dtype=torch.float64))


def test_lsr_to_lora_and_back_is_exact(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    export_lora(open_adapter(adapters["lsr"]), tmp_path / "lora")
    report = compress(tmp_path / "lora", tmp_path / "lsr", separation_rank=3)
    assert report.error < 1e-5
    torch.testing.assert_close(
        adapter_logits(base, tmp_path / "lsr"), adapter_logits(base, adapters["lsr"]), rtol=1e-4, atol=1e-4
    )


def test_any_lora_is_exact_with_enough_terms(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    first = compress(adapters["lora"], tmp_path / "s1", separation_rank=1)
    exact = compress(adapters["lora"], tmp_path / "exact", separation_rank=first.exact_rank, curve=False)
    assert exact.error < 1e-5 < first.error
    torch.testing.assert_close(
        adapter_logits(base, tmp_path / "exact"), adapter_logits(base, adapters["lora"]), rtol=1e-4, atol=1e-4
    )
    export_lora(open_adapter(tmp_path / "exact"), tmp_path / "back")
    torch.testing.assert_close(
        adapter_logits(base, tmp_path / "back"), adapter_logits(base, adapters["lora"]), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("asked", [{"separation_rank": 100_000}, {"budget": "1000x"}])
def test_no_more_terms_than_are_of_use(asked: dict, adapters: dict[str, Path], tmp_path: Path) -> None:
    result = compress(adapters["lora"], tmp_path / "out", curve=False, **asked)
    assert result.separation_rank == result.exact_rank < 100
    assert result.error < 1e-5
    assert f"s = {result.exact_rank} was taken" in result.notes[0]
    assert not compress(adapters["lora"], tmp_path / "small", separation_rank=1, curve=False).notes


def test_the_curve_falls_to_nothing(adapters: dict[str, Path], tmp_path: Path) -> None:
    report = compress(adapters["lora"], tmp_path / "out", separation_rank=2)
    errors = [point.error for point in report.curve]
    assert all(later <= earlier * 1.01 for earlier, later in pairwise(errors))
    assert report.curve[-1].separation_rank == report.exact_rank
    assert errors[-1] < 1e-5
    assert json.loads(json.dumps(report.to_dict()))["curve"][0]["separation_rank"] == 1


def test_a_budget_is_kept(base: Path, tmp_path: Path) -> None:
    lora = save_adapter(tmp_path / "lora", base, LoraConfig(r=8, target_modules=LINEAR))
    half = compress(lora, tmp_path / "half", budget="0.5x", curve=False)
    assert (
        half.n_params <= 0.5 * half.n_params_before < half.n_params * (half.separation_rank + 1) / half.separation_rank
    )
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "half"))
    assert sum(p.numel() for name, p in model.named_parameters() if "lsr_" in name) == half.n_params
    assert compress(lora, tmp_path / "count", budget=half.n_params, curve=False).n_params == half.n_params
    with pytest.raises(ConfigError, match="below that of separation rank 1"):
        compress(lora, tmp_path / "none", budget="0.01x")


def test_the_result_can_be_trained_on(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    compress(adapters["lora"], tmp_path, separation_rank=2, curve=False)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path), is_trainable=True)
    ids = torch.randint(0, 64, (1, 5))
    model(input_ids=ids, labels=ids).loss.backward()
    grads = [p.grad for name, p in model.named_parameters() if "lsr_" in name]
    assert grads
    assert all(g is not None and bool(g.isfinite().all()) for g in grads)


def test_norms_and_heads_go_along(base: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head", "norm"], use_rslora=True)
    lora = save_adapter(tmp_path / "lora", base, config)
    report = compress(lora, tmp_path / "lsr", separation_rank=8, curve=False)
    assert report.separation_rank == report.exact_rank == 8
    torch.testing.assert_close(adapter_logits(base, tmp_path / "lsr"), adapter_logits(base, lora), rtol=1e-4, atol=1e-4)


def test_wrong_use(adapters: dict[str, Path], tmp_path: Path) -> None:
    for options in ({}, {"separation_rank": 2, "budget": "0.5x"}, {"separation_rank": 0}):
        with pytest.raises(ConfigError, match="separation rank of at least 1, or a budget"):
            compress(adapters["lora"], tmp_path / "out", **options)
    with pytest.raises(ConfigError, match="is a soka adapter; compress takes a LoRA"):
        compress(adapters["soka"], tmp_path / "out", separation_rank=2)


def test_nothing_is_left_half_written(
    adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disk_full(tensors: dict, path: Path, **options: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("krontune.convert.output.save_file", disk_full)
    with pytest.raises(OSError, match="No space"):
        compress(adapters["lora"], tmp_path / "out", separation_rank=1, curve=False)
    assert list(tmp_path.iterdir()) == []
