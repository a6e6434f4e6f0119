from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config

from krontune import LsrConfig, SokaConfig
from krontune.convert import open_adapter
from krontune.convert.to_lora import VLLM_RANKS, export_lora
from krontune.errors import CheckpointError, ConfigError
from krontune.kron import separated_sum
from tests.convert.helpers import CONFIGS, adapter_logits, ids, save_adapter, save_base

#: Loads an adapter with stock PEFT where krontune cannot be imported, and saves its logits.
STOCK = """
import sys
sys.modules["krontune"] = None
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter).eval()
try:
    import krontune
except ImportError:
    ids = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.save(model(input_ids=ids).logits, out)
"""


def exported(adapter: Path, out: Path, **options) -> Path:
    export_lora(open_adapter(adapter), out, **options)
    return out


@pytest.mark.parametrize("name", ["lsr", "lsr-patterns", "lsr-three-factors", "lora"])
def test_what_is_a_lora_is_exported_exactly(name: str, base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    report = export_lora(open_adapter(adapters[name]), tmp_path / "lora")
    assert report.error == 0
    torch.testing.assert_close(
        adapter_logits(base, tmp_path / "lora"), adapter_logits(base, adapters[name]), rtol=1e-5, atol=1e-5
    )


def test_lsr_factors_keep_their_bits(adapters: dict[str, Path], tmp_path: Path) -> None:
    """A is the separated sum bit by bit; B is that times alpha, one rounding."""
    out = load_file(exported(adapters["lsr"], tmp_path) / "adapter_model.safetensors")
    stored = load_file(adapters["lsr"] / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.mlp.up_proj"
    A, B = (separated_sum([stored[f"{name}.lsr_{side}.{i}"] for i in range(2)]) for side in "AB")
    assert torch.equal(out[f"{name}.lora_A.weight"], A)
    assert torch.equal(out[f"{name}.lora_B.weight"], CONFIGS["lsr"].alpha * B)


@pytest.mark.parametrize("name", ["soka", "soka-square", "soka-sorted", "lokr", "lokr-whole"])
def test_others_are_exported_within_the_error(name: str, base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    report = export_lora(open_adapter(adapters[name]), tmp_path / "lora", error=1e-4)
    assert max(m.error for m in report.modules) <= 1e-4
    got, wanted = adapter_logits(base, tmp_path / "lora"), adapter_logits(base, adapters[name])
    assert (got - wanted).norm() <= 1e-3 * wanted.norm()


@pytest.mark.parametrize("name", ["soka", "soka-square", "soka-sorted", "lsr"])
def test_a_rank_gives_the_best_lora_of_that_rank(name: str, adapters: dict[str, Path], tmp_path: Path) -> None:
    adapter = open_adapter(adapters[name])
    report = export_lora(adapter, tmp_path, rank=2)
    for module in report.modules:
        sigma = torch.linalg.svdvals(adapter.update(module.name).dense().double())
        assert module.rank == 2
        assert module.error == pytest.approx(float(sigma[2:].norm() / sigma.norm()), rel=1e-3)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {t.shape[0] for key, t in stored.items() if "lora_A" in key} == {2}


def test_stock_peft_gives_the_same_logits_without_krontune(
    base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    lora = exported(adapters["lsr-patterns"], tmp_path / "lora")
    command = [sys.executable, "-c", STOCK, str(base), str(lora), str(tmp_path / "logits.pt")]
    subprocess.run(command, check=True, capture_output=True)
    wanted = adapter_logits(base, adapters["lsr-patterns"])
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["lsr-patterns", "soka"])
def test_vllm_ranks_are_padded_to_one(name: str, base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    report = export_lora(open_adapter(adapters[name]), tmp_path, error=1e-4, vllm_rank=True)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert report.padded_rank in VLLM_RANKS
    assert config["r"] == config["lora_alpha"] == report.padded_rank
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    shapes = {key: t.shape for key, t in load_file(tmp_path / "adapter_model.safetensors").items()}
    assert {s[0] for key, s in shapes.items() if "lora_A" in key} == {report.padded_rank}
    got, wanted = adapter_logits(base, tmp_path), adapter_logits(base, adapters[name])
    assert (got - wanted).norm() <= 1e-3 * wanted.norm()


def test_names_and_scale_are_what_other_readers_expect(adapters: dict[str, Path], tmp_path: Path) -> None:
    """llama.cpp wants base_model.model.NAME.lora_A.weight; vLLM divides lora_alpha by r and reads no more."""
    out = exported(adapters["lsr"], tmp_path)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["lora_alpha"] / config["r"] == 1
    keys = set(load_file(out / "adapter_model.safetensors"))
    assert keys == {
        f"base_model.model.model.layers.{i}.{m}.lora_{side}.weight"
        for i in (0, 1)
        for side in "AB"
        for m in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    }


@pytest.mark.parametrize("method", [LsrConfig, SokaConfig])
def test_conv1d_and_embedding_layers(method: type, tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=16, tie_word_embeddings=False)
    base = save_base(tmp_path / "base", config)
    adapter = save_adapter(tmp_path / "adapter", base, method(r=2, target_modules=["c_attn", "c_proj", "wte"]))
    lora = exported(adapter, tmp_path / "lora", error=1e-5)
    torch.testing.assert_close(adapter_logits(base, lora), adapter_logits(base, adapter), rtol=1e-3, atol=1e-3)


def test_norms_and_heads_go_with_it(base: Path, tmp_path: Path) -> None:
    config = LsrConfig(r=2, separation_rank=2, target_modules=["q_proj"], train_norms=True, modules_to_save=["lm_head"])
    adapter = save_adapter(tmp_path / "adapter", base, config)
    lora = exported(adapter, tmp_path / "lora")
    torch.testing.assert_close(adapter_logits(base, lora), adapter_logits(base, adapter), rtol=1e-5, atol=1e-5)


def test_an_exported_lora_can_be_trained_on(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    lora = exported(adapters["lsr"], tmp_path)
    model = AutoModelForCausalLM.from_pretrained(base)
    model = PeftModel.from_pretrained(model, str(lora), is_trainable=True)
    model(input_ids=ids(), labels=ids()).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 2, "error": 0.1}, "not both"),
        ({"rank": 0}, "out of range"),
        ({"error": 2.0}, "out of range"),
    ],
)
def test_wrong_options(options: dict, message: str, adapters: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        export_lora(open_adapter(adapters["soka"]), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_what_is_not_an_adapter_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        open_adapter(tmp_path / "nothing")
    with pytest.raises(ConfigError, match=r"is not an adapter: it has no adapter_config\.json"):
        open_adapter(base)
    LoraConfig(target_modules=["q_proj"]).save_pretrained(tmp_path / "config-only")
    with pytest.raises(CheckpointError, match=r"has no adapter_model\.safetensors"):
        open_adapter(tmp_path / "config-only")
    dora = save_adapter(tmp_path / "dora", base, LoraConfig(r=2, use_dora=True, target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="use_dora"):
        open_adapter(dora)


@pytest.mark.parametrize(
    "settings",
    [
        {"trainable_token_indices": [1, 2]},
        {"layer_replication": [[0, 2], [1, 2]]},
        {"use_qalora": True},
        {"use_bdlora": {"nblocks": 1}},
        {"arrow_config": {"top_k": 3}},
        {"kasa_config": {"beta": 1e-4}},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_a_lora_with_more_than_a_product_is_refused(settings: dict, adapters: dict[str, Path], tmp_path: Path) -> None:
    (name,) = settings
    if name not in {field.name for field in dataclasses.fields(LoraConfig)}:
        pytest.skip(f"this PEFT has no {name}")
    config = json.loads((adapters["lora"] / "adapter_config.json").read_text())
    shutil.copytree(adapters["lora"], tmp_path / "adapter")
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps({**config, **settings}))
    with pytest.raises(ConfigError, match=f"uses {name}"):
        open_adapter(tmp_path / "adapter")


def test_nan_in_a_factor_is_named(adapters: dict[str, Path], tmp_path: Path) -> None:
    for file in adapters["soka"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    key = "base_model.model.model.layers.1.self_attn.k_proj.soka_dB"
    tensors[key][0, 0, 0] = float("nan")
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.k_proj\.soka_dB' holds NaN"):
        export_lora(open_adapter(tmp_path), tmp_path / "out")


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_nothing_is_left_half_written(
    failure: BaseException, adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_half(tensors: dict, path: Path, **options: object) -> None:
        Path(path).write_bytes(b"half")
        raise failure

    monkeypatch.setattr("krontune.convert.output.save_file", save_half)
    with pytest.raises(type(failure)):
        export_lora(open_adapter(adapters["lsr"]), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_other_peoples_files_are_safe(adapters: dict[str, Path], tmp_path: Path) -> None:
    adapter = open_adapter(adapters["lsr"])
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match=r"holds thesis\.txt, which this command does not write"):
        export_lora(adapter, tmp_path, force=True)
    with pytest.raises(ConfigError, match="holds, the input"):
        export_lora(adapter, adapters["lsr"].parent, force=True)
    export_lora(adapter, tmp_path / "out")
    with pytest.raises(ConfigError, match="--force"):
        export_lora(adapter, tmp_path / "out")
    export_lora(adapter, tmp_path / "out", force=True)
    assert (tmp_path / "thesis.txt").exists()


@pytest.mark.parametrize("entry", ["thesis.txt", "checkpoint-100/adapter_config.json", "model.safetensors"])
def test_files_beside_an_adapter_are_safe(entry: str, adapters: dict[str, Path], tmp_path: Path) -> None:
    adapter, out = open_adapter(adapters["lsr"]), tmp_path / "out"
    export_lora(adapter, out)
    (out / entry).parent.mkdir(exist_ok=True)
    (out / entry).write_text("years of work")
    with pytest.raises(ConfigError, match="does not write and does not delete"):
        export_lora(adapter, out, force=True)
    assert (out / entry).read_text() == "years of work"


def test_a_link_is_written_through(adapters: dict[str, Path], tmp_path: Path) -> None:
    adapter, out = open_adapter(adapters["lsr"]), tmp_path / "link"
    export_lora(adapter, tmp_path / "disk" / "out")
    out.symlink_to(tmp_path / "disk" / "out")
    with pytest.raises(ConfigError, match="--force"):
        export_lora(adapter, out)
    (out / "lokr.safetensors").touch()  # of an earlier export
    export_lora(adapter, out, force=True)
    assert out.is_symlink() and not (out / "lokr.safetensors").exists()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["out"]


def test_a_failure_while_the_folder_is_replaced_loses_nothing(
    adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, out = open_adapter(adapters["lsr"]), tmp_path / "out"
    export_lora(adapter, out)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    replace = Path.replace

    def fails_once_set_aside(path: Path, target: Path) -> Path:
        if target == out and not path.name.endswith(".old"):
            raise OSError("the disk went away")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", fails_once_set_aside)
    with pytest.raises(OSError, match="went away"):
        export_lora(adapter, out, rank=1, force=True)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert list(tmp_path.iterdir()) == [out]
