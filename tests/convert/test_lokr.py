from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoKrConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from krontune import SokaConfig
from krontune.convert import export, open_adapter
from krontune.convert.lokr import lokr_shape
from krontune.errors import CheckpointError, ConfigError
from tests.convert.helpers import LINEAR, adapter_logits, save_adapter

NAME = "model.layers.0.self_attn.q_proj"


def peft_delta(base: Path, adapter: Path, name: str = NAME) -> torch.Tensor:
    """dW by PEFT's own layer."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))
    return model.get_submodule(f"base_model.model.{name}").get_delta_weight("default").detach()


@pytest.mark.parametrize("name", ["lokr", "lokr-whole"])
def test_pefts_lokr_becomes_soka_exactly(name: str, base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    report = export(adapters[name], tmp_path / "soka", to="soka")
    assert report.error == 0
    torch.testing.assert_close(
        peft_delta(base, tmp_path / "soka"), peft_delta(base, adapters[name]), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(
        adapter_logits(base, tmp_path / "soka"), adapter_logits(base, adapters[name]), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("decompose_both", [False, True])
def test_ranked_factors_and_patterns_keep_their_scale(decompose_both: bool, base: Path, tmp_path: Path) -> None:
    """r still divides the scale of a LoKr whose factors are whole: the conversion must not forget it."""
    config = LoKrConfig(
        r=1,
        alpha=3,
        target_modules=LINEAR,
        decompose_both=decompose_both,
        rank_pattern={"up_proj": 5},
        alpha_pattern={"down_proj": 7.0},
    )
    lokr = save_adapter(tmp_path / "lokr", base, config)
    export(lokr, tmp_path / "soka", to="soka")
    for module in (NAME, "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"):
        torch.testing.assert_close(
            peft_delta(base, tmp_path / "soka", module), peft_delta(base, lokr, module), rtol=1e-5, atol=1e-6
        )


def test_soka_of_lokrs_shape_becomes_lokr_exactly(base: Path, tmp_path: Path) -> None:
    config = SokaConfig(r=1, factor_shape=(4, 4), init_weights="zero", target_modules=["q_proj", "o_proj"], alpha=3.0)
    soka = save_adapter(tmp_path / "soka", base, config)
    report = export(soka, tmp_path / "lokr", to="lokr")
    assert report.error < 1e-5
    settings = json.loads((tmp_path / "lokr/adapter_config.json").read_text())
    assert settings["alpha"] == settings["r"]
    torch.testing.assert_close(
        adapter_logits(base, tmp_path / "lokr"), adapter_logits(base, soka), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", ["soka", "lsr", "lora"])
def test_anything_else_becomes_the_nearest_lokr(
    name: str, base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    report = export(adapters[name], tmp_path / "lokr", to="lokr")
    wanted = peft_delta(base, adapters[name])
    error = float((peft_delta(base, tmp_path / "lokr") - wanted).norm() / wanted.norm())
    stated = next(module.error for module in report.modules if module.name == NAME)
    assert error == pytest.approx(stated, rel=1e-3)
    blocks = wanted.view(4, 4, 4, 4).transpose(1, 2).reshape(16, 16)
    sigma = torch.linalg.svdvals(blocks)
    assert stated == pytest.approx(float(sigma[1:].norm() / sigma.norm()), rel=1e-3)


def test_lokr_and_back(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    export(adapters["lokr-whole"], tmp_path / "soka", to="soka")
    report = export(tmp_path / "soka", tmp_path / "lokr", to="lokr")
    assert report.error < 1e-5
    torch.testing.assert_close(
        adapter_logits(base, tmp_path / "lokr"), adapter_logits(base, adapters["lokr-whole"]), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("size", [1, 7, 12, 16, 48, 768, 1536, 2304, 11008])
@pytest.mark.parametrize("factor", [-1, 4, 8, 16])
def test_shapes_are_those_of_pefts_layers(size: int, factor: int) -> None:
    from peft.tuners.lokr.layer import factorization

    shape = lokr_shape(size, size, factor)
    assert (shape.m1, shape.m2) == (shape.n1, shape.n2) == tuple(factorization(size, factor))
    lycoris = lokr_shape(size, size, factor, lycoris=True)
    assert (lycoris.m1, lycoris.m2) == tuple(sorted(factorization(size, factor)))


# ------------------------------------------------------------------------------------------------------------- LyCORIS


def lycoris_file(
    path: Path, rank: int | None = 2, alpha: float = 3.0, prefix: str = "lycoris"
) -> dict[str, torch.Tensor]:
    """A file as LyCORIS writes it: names with "_" for ".", a scale of alpha / rank, 1 where both factors are whole."""
    key = f"{prefix}_{NAME.replace('.', '_')}"
    tensors = {f"{key}.alpha": torch.tensor(alpha), f"{key}.lokr_w1": torch.randn(4, 4)}
    if rank is None:
        tensors[f"{key}.lokr_w2"] = torch.randn(4, 4)
    else:
        tensors |= {f"{key}.lokr_w2_a": torch.randn(4, rank), f"{key}.lokr_w2_b": torch.randn(rank, 4)}
    save_file(tensors, path)
    return {name.removeprefix(f"{key}."): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("prefix", ["lycoris", "lora_te"])
def test_lycoris_with_ranked_factors(prefix: str, base: Path, tmp_path: Path) -> None:
    parts = lycoris_file(tmp_path / "in.safetensors", prefix=prefix)
    export(tmp_path / "in.safetensors", tmp_path / "soka", to="soka", base=str(base))
    expected = 3.0 / 2 * torch.kron(parts["lokr_w1"], parts["lokr_w2_a"] @ parts["lokr_w2_b"])
    torch.testing.assert_close(peft_delta(base, tmp_path / "soka"), expected, rtol=1e-5, atol=1e-5)


def test_lycoris_with_whole_factors_ignores_alpha(base: Path, tmp_path: Path) -> None:
    parts = lycoris_file(tmp_path / "in.safetensors", rank=None)
    export(tmp_path / "in.safetensors", tmp_path / "soka", to="soka", base=str(base))
    expected = torch.kron(parts["lokr_w1"], parts["lokr_w2"])
    torch.testing.assert_close(peft_delta(base, tmp_path / "soka"), expected, rtol=1e-5, atol=1e-5)


def test_to_lycoris_and_back(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    report = export(adapters["lokr-whole"], tmp_path / "out", to="lycoris")
    assert report.error < 1e-5
    stored = load_file(tmp_path / "out/lokr.safetensors")
    assert f"lycoris_{NAME.replace('.', '_')}.lokr_w1" in stored
    export(tmp_path / "out/lokr.safetensors", tmp_path / "lora", error=1e-5, base=str(base))
    torch.testing.assert_close(
        adapter_logits(base, tmp_path / "lora"), adapter_logits(base, adapters["lokr-whole"]), rtol=1e-3, atol=1e-3
    )


def test_lycoris_itself_reads_what_is_written(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    lycoris = pytest.importorskip("lycoris", exc_type=ImportError)
    export(adapters["lokr-whole"], tmp_path / "out", to="lycoris")
    model = AutoModelForCausalLM.from_pretrained(base)
    network, _ = lycoris.create_lycoris_from_weights(1.0, str(tmp_path / "out/lokr.safetensors"), model)
    by_name = {module.lora_name: module for module in network.loras}
    got = by_name[f"lycoris_{NAME.replace('.', '_')}"].get_weight(None)
    torch.testing.assert_close(got, peft_delta(base, adapters["lokr-whole"]), rtol=1e-4, atol=1e-5)


def test_wrong_files_are_said(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    lycoris_file(tmp_path / "in.safetensors")
    with pytest.raises(ConfigError, match="name its base model with --base"):
        export(tmp_path / "in.safetensors", tmp_path / "out", to="soka")
    with pytest.raises(ConfigError, match="holds no LoKr module"):
        export(adapters["lora"] / "adapter_model.safetensors", tmp_path / "out", to="soka", base=str(base))
    with pytest.raises(ConfigError, match="is no adapter"):
        export(base / "config.json", tmp_path / "out")
    with pytest.raises(ConfigError, match="cannot be written as SoKA"):
        export(adapters["lora"], tmp_path / "out", to="soka")
    with pytest.raises(ConfigError, match="format 'dora' is unknown"):
        export(adapters["lora"], tmp_path / "out", to="dora")
    with pytest.raises(ConfigError, match="settings of a LoRA"):
        export(adapters["lora"], tmp_path / "out", to="lokr", rank=3)
    save_file({"lycoris_no_such_module.lokr_w1": torch.ones(2, 2)}, tmp_path / "odd.safetensors")
    with pytest.raises(CheckpointError, match="no module of the base model"):
        export(tmp_path / "odd.safetensors", tmp_path / "out", to="soka", base=str(base))
    assert open_adapter(adapters["lokr"]).method == "lokr"
    assert not (tmp_path / "out").exists()


def test_modules_of_other_kinds_are_not_dropped(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "in.safetensors"
    lycoris_file(file)
    other = "lycoris_" + NAME.replace(".", "_").replace("q_proj", "k_proj")
    save_file(
        load_file(file) | {f"{other}.lora_down.weight": torch.ones(2, 16), f"{other}.alpha": torch.ones(())}, file
    )
    with pytest.raises(ConfigError, match=f"2 tensors that belong to no LoKr module, such as '{other}"):
        export(file, tmp_path / "out", to="soka", base=str(base))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["lycoris", "lokr"])
def test_whole_modules_are_kept_or_their_loss_is_said(to: str, base: Path, tmp_path: Path) -> None:
    config = LoKrConfig(r=64, target_modules=["q_proj"], modules_to_save=["lm_head"])
    result = export(save_adapter(tmp_path / "lokr", base, config), tmp_path / "out", to=to)
    (file,) = (tmp_path / "out").glob("*.safetensors")
    assert any("lm_head" in key for key in load_file(file)) == (to == "lokr")
    assert [note[:30] for note in result.notes] == (["1 tensors of whole modules or b"[:30]] if to == "lycoris" else [])
