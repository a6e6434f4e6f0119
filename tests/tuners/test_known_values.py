"""Values that the papers, arithmetic or PEFT's own methods give."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModel, RobertaConfig

from krontune import LsrConfig, SokaConfig
from krontune.kron import nearest_separated, separated_sum
from krontune.tuners.lsr.config import LsrSpec
from tests.tuners.helpers import adapted, kron_layers, one_layer, true_delta


def test_lsr_of_one_weight():
    """Section 4 of arXiv:2502.13568: 768 x 768, r = 4, s = 16, factors of 32 x 2 and 24 x 2."""
    spec = LsrConfig(r=4, separation_rank=16).spec_for(768, 768)
    assert spec == LsrSpec(16, rank_factors=(2, 2), in_factors=(32, 24), out_factors=(32, 24))
    assert spec.n_params == 3_584
    assert spec.tensor_shapes() == {
        "lsr_A.0": (16, 2, 32),
        "lsr_A.1": (16, 2, 24),
        "lsr_B.0": (16, 32, 2),
        "lsr_B.1": (16, 24, 2),
    }


@pytest.mark.parametrize(
    ("config", "each"),
    [
        (LsrConfig(r=4, separation_rank=16), 3_584),
        (SokaConfig(r=8), 12_288),
        (SokaConfig(r=8, factor_shape=1), 12_288),
        (SokaConfig(r=4, factor_shape="square"), 4 * (32 * 32 + 24 * 24)),
        (LoraConfig(r=8), 12_288),
    ],
    ids=["lsr", "soka", "soka p=1", "soka square", "lora"],
)
def test_roberta_base_on_the_meta_device(config, each):
    """Query and value of 12 layers; planning needs no weights."""
    config.target_modules = {"query", "value"}
    with torch.device("meta"):
        roberta = AutoModel.from_config(RobertaConfig())  # the defaults are the base model's sizes
        model = get_peft_model(roberta, config)
    assert model.get_nb_trainable_parameters()[0] == 24 * each
    assert all(p.is_meta for p in model.parameters())


def test_soka_with_p_1_starts_in_the_subspace_of_pissa(net):
    """With p = 1 a Kronecker term is an outer product and the KPSVD the SVD: A0 B0 is what PEFT's PiSSA starts from."""
    base, r = nn.Linear(40, 24), 5
    W = base.weight.detach().clone()
    pissa = LoraConfig(r=r, lora_alpha=r, target_modules=["layer"], init_lora_weights="pissa")
    layer = get_peft_model(net(copy.deepcopy(base)), pissa).base_model.model.layer
    soka = one_layer(adapted(net(base), SokaConfig(r=r, factor_shape=1, target_modules=["layer"]), trained=False))

    A0, B0 = (f.float() for f in soka.factors("default")[2:])
    A0, B0 = A0.squeeze(-1), B0.squeeze(-2)  # (r, m), (r, n)
    for ours, theirs in ((A0, layer.lora_B["default"].weight.T), (B0, layer.lora_A["default"].weight)):
        cosines = torch.linalg.svdvals(_basis(ours).T @ _basis(theirs))
        assert cosines.min() > 0.999  # A0 and B0 are rounded to bfloat16
        torch.testing.assert_close(ours.norm(dim=1), theirs.norm(dim=1), rtol=1e-2, atol=0)
    start = A0.T @ B0
    U, S, Vh = torch.linalg.svd(W)
    torch.testing.assert_close(start, U[:, :r] * S[:r] @ Vh[:r], rtol=0, atol=0.02 * float(S[0]))


def _basis(rows: torch.Tensor) -> torch.Tensor:
    return torch.linalg.qr(rows.detach().T.float()).Q


def test_soka_starts_from_the_terms_that_a_weight_is_made_of(net):
    """The KPSVD of a sum of 3 Kronecker products is that sum."""
    A, B = torch.randn(3, 6, 5), torch.randn(3, 4, 8)
    base = nn.Linear(40, 24, bias=False)
    base.weight.data = sum(torch.kron(a, b) for a, b in zip(A, B, strict=True))
    config = SokaConfig(r=3, factor_shape=(6, 5), target_modules=["layer"])
    layer = one_layer(adapted(net(base), config, trained=False))
    _, _, A0, B0 = layer.factors("default")
    start = sum(torch.kron(a.float(), b.float()) for a, b in zip(A0, B0, strict=True))
    torch.testing.assert_close(start, base.weight.detach(), rtol=0.01, atol=0.01 * float(base.weight.abs().max()))


@pytest.mark.parametrize(("m", "n", "r"), [(24, 36, 4), (35, 16, 6), (13, 24, 2)])
def test_lsr_reproduces_any_lora(net, m, n, r):
    """s = min(r1*n1, r2*n2) terms make any A (r, n), and as many make any B."""
    A, B = torch.randn(r, n), torch.randn(m, r)
    spec = LsrConfig(r=r).spec_for(m, n)
    terms_a = min(p * q for p, q in zip(spec.rank_factors, spec.in_factors, strict=True))
    terms_b = min(p * q for p, q in zip(spec.rank_factors, spec.out_factors, strict=True))
    s = max(terms_a, terms_b)
    with pytest.warns(UserWarning, match="more parameters"):
        model = adapted(net(nn.Linear(n, m)), LsrConfig(r=r, separation_rank=s, target_modules=["layer"]))
    layer = one_layer(model)
    with torch.no_grad():
        for parameter, value in zip(
            layer.factors("default"),
            [
                *nearest_separated(A, spec.rank_factors, spec.in_factors, s),
                *nearest_separated(B, spec.out_factors, spec.rank_factors, s),
            ],
            strict=True,
        ):
            parameter.copy_(value)
    expected = B.double() @ A.double()
    torch.testing.assert_close(true_delta(layer), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_fewer_terms_do_not_reproduce_a_random_lora():
    """The bound of the test above is sharp."""
    A = torch.randn(4, 24)
    spec = LsrConfig(r=4).spec_for(8, 24)
    s = min(p * q for p, q in zip(spec.rank_factors, spec.in_factors, strict=True)) - 1
    got = separated_sum(nearest_separated(A, spec.rank_factors, spec.in_factors, s))
    assert (got - A).norm() > 0.01 * A.norm()


def test_parameters_say_what_they_are(tiny, method):
    """n_params, PEFT's count, and the tensors agree."""
    model = adapted(tiny(), method(target_modules="all-linear"), trained=False)
    total = 0
    for layer in kron_layers(model).values():
        trained = sum(f.numel() for f in layer.factors("default") if f.requires_grad)
        assert layer.specs["default"].n_params == trained
        total += trained
    assert model.get_nb_trainable_parameters()[0] == total
