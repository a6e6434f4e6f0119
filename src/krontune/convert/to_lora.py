"""Adapters of any method as stock PEFT LoRAs, for servers and tools that know nothing else."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor

from krontune.convert.adapter import PREFIX, Adapter
from krontune.convert.output import check_output, output_folder, save_tensors
from krontune.convert.results import Export, ModuleExport
from krontune.convert.updates import LowRankPair
from krontune.errors import ConfigError
from krontune.tuners._peft import SAFETENSORS_WEIGHTS_NAME

#: The ranks that vLLM compiles for.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
#: The relative error of an export that is no choice of the user's.
DEFAULT_ERROR = 1e-3


def export_lora(
    adapter: Adapter,
    out: str | Path,
    *,
    rank: int | None = None,
    error: float | None = None,
    vllm_rank: bool = False,
    force: bool = False,
    progress: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> Export:
    """Write an adapter as a stock LoRA that PEFT, vLLM and llama.cpp's converter load without krontune.

    LSR is a LoRA, so that its export is exact; so is a LoRA's own. SoKA and LoKr get the nearest LoRA of a rank or
    error. The scale is multiplied into B and lora_alpha = r for every module: a reader that ignores alpha_pattern is
    right too.

    Args:
        adapter: what open_adapter gave.
        out: the folder to write.
        rank: the largest rank.
        error: the largest relative error of a module's update. Neither: exact for LSR and LoRA, else 1e-3.
        vllm_rank: pad every module with zeros to one rank that vLLM takes.
        force: replace `out`.
        progress: wraps the modules' names, for a progress bar.

    Raises:
        ConfigError: rank and error together, experts, a rank above vLLM's, or `out` is not free.
        CheckpointError: a tensor is damaged.

    Cost: per module a QR of the stacked factors; SoKA with factors too large for that, one SVD of (m, n).
    """
    if rank is not None and error is not None:
        raise ConfigError("give --rank or --error, not both.")
    if (rank is not None and rank < 1) or (error is not None and not 0 < error < 1):
        raise ConfigError(
            f"rank {rank} or error {error} is out of range: a rank is at least 1, an error between 0 and 1."
        )
    check_output(out, force, [adapter.folder])
    if rank is None and error is None and adapter.method not in ("lsr", "lora"):
        error = DEFAULT_ERROR
    pairs: dict[str, LowRankPair] = {}
    modules = []
    for name in progress(list(adapter.modules)):
        update = adapter.update(name)
        if update.experts is not None or adapter.layer(name)["layer"] == "parameter":
            raise ConfigError(
                f"{name} is a bare parameter, which a stock LoRA keeps in another way. Use krontune merge."
            )
        pair = update.lowrank(rank, error)
        pairs[name] = pair
        modules.append(ModuleExport(name, pair.rank, pair.error, product_norm(pair)))
        del update
    padded = _vllm_rank(max(pair.rank for pair in pairs.values())) if vllm_rank else None
    tensors, config = lora_tensors(adapter, pairs, padded), lora_config(adapter, pairs, padded)
    with output_folder(out, force, [adapter.folder]) as folder:
        save_tensors(tensors, folder / SAFETENSORS_WEIGHTS_NAME)
        config.save_pretrained(str(folder))
    n_params = sum(t.numel() for key, t in tensors.items() if ".lora_" in key)
    n_bytes = sum(t.numel() * t.element_size() for t in tensors.values())
    notes, curve = _notes(adapter, pairs, padded), error_curve(pairs)
    return Export(Path(out), adapter.method, "lora", modules, n_params, n_bytes, padded, notes, curve)


def lora_tensors(adapter: Adapter, pairs: dict[str, LowRankPair], padded: int | None = None) -> dict[str, Tensor]:
    """The tensors of a LoRA file under PEFT's names, what was saved besides included."""
    tensors = {}
    for name, pair in pairs.items():
        A, B = pad_rank(pair, padded)
        for tail, tensor in _in_layout(A, B, adapter.layer(name)).items():
            tensors[f"{PREFIX}{name}.{tail}"] = tensor.contiguous()
    return tensors | {PREFIX + key: adapter.read(key) for key in adapter.others}


def lora_config(adapter: Adapter, pairs: dict[str, LowRankPair], padded: int | None = None) -> LoraConfig:
    """The config that gives every module its own rank and a scale of 1."""
    source = adapter.config
    ranks = {name: padded or pair.rank for name, pair in pairs.items()}
    common = max(set(ranks.values()), key=list(ranks.values()).count)
    pattern = {anchored(name): rank for name, rank in ranks.items() if rank != common}
    bias = source.bias if hasattr(source, "bias") else "none"
    return LoraConfig(
        r=common,
        lora_alpha=common,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=sorted(pairs),
        modules_to_save=copy.deepcopy(source.modules_to_save),
        bias="lora_only" if bias.endswith("_only") else bias,
        fan_in_fan_out=any(adapter.layer(name)["layer"] == "conv1d" for name in pairs),
        task_type=source.task_type,
        base_model_name_or_path=source.base_model_name_or_path,
        revision=source.revision,
        inference_mode=True,
    )


def anchored(name: str) -> str:
    """A pattern key for one module and no other."""
    return "^" + name.replace(".", r"\.") + "$"


def pad_rank(pair: LowRankPair, rank: int | None) -> tuple[Tensor, Tensor]:
    """A and B with rows and columns of zeros up to a rank."""
    missing = (rank or pair.rank) - pair.rank
    pad = torch.nn.functional.pad
    return pad(pair.A, (0, 0, 0, missing)), pad(pair.B, (0, missing))


def product_norm(pair: LowRankPair) -> float:
    """||B A||_F from the factors' Gram matrices, in float64."""
    A, B = pair.A.double(), pair.B.double()
    return float(((A @ A.mT) * (B.mT @ B)).sum().clamp_min(0).sqrt())


def error_curve(pairs: dict[str, LowRankPair]) -> list[tuple[int, float]]:
    """(rank, error) of all updates together, for the ranks of vLLM; empty where nothing is lost by construction."""
    spectra = [pair.sigma for pair in pairs.values() if pair.sigma is not None]
    if len(spectra) < len(pairs):
        return []
    total = sum(float(sigma.square().sum()) for sigma in spectra) or 1.0
    largest = max(len(sigma) for sigma in spectra)
    ranks = [rank for rank in VLLM_RANKS if rank < largest]
    return [(k, (sum(float(sigma[k:].square().sum()) for sigma in spectra) / total) ** 0.5) for k in ranks]


def _in_layout(A: Tensor, B: Tensor, layer: dict[str, Any]) -> dict[str, Tensor]:
    """{name: tensor} of a LoRA's two matrices as PEFT keeps them for that kind of layer."""
    if layer["layer"] == "embedding":
        return {"lora_embedding_A": B.mT, "lora_embedding_B": A.mT}
    if layer["layer"] == "conv":
        kernel = layer["kernel"]
        ones = [1] * (len(kernel) - 1)
        return {"lora_A.weight": A.reshape(-1, *kernel), "lora_B.weight": B.reshape(*B.shape, *ones)}
    return {"lora_A.weight": A, "lora_B.weight": B}


def _vllm_rank(rank: int) -> int:
    if rank > VLLM_RANKS[-1]:
        raise ConfigError(f"the largest rank is {rank}, and vLLM takes {VLLM_RANKS[-1]} at most. Lower it with --rank.")
    return next(r for r in VLLM_RANKS if r >= rank)


def _notes(adapter: Adapter, pairs: dict[str, LowRankPair], padded: int | None) -> list[str]:
    notes = []
    ranks = {pair.rank for pair in pairs.values()}
    if len(ranks) > 1 and padded is None:
        notes.append(
            "ranks differ between modules: PEFT and vLLM take that; llama.cpp divides by each module's own rank, so "
            "use --vllm-rank, which pads all of them to one, for it."
        )
    if adapter.others:
        notes.append(
            f"{len(adapter.others)} tensors of whole modules or biases go with it (modules_to_save); PEFT loads them, "
            "vLLM and llama.cpp do not. Use krontune merge for those."
        )
    base = str(adapter.config.base_model_name_or_path or "")
    if base.startswith("packaged:"):
        notes.append(f"the base is {base}, a name that other tools do not know: load it yourself, then the adapter.")
    return notes
