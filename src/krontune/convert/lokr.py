"""LoKr both ways: PEFT's and LyCORIS's files into SoKA, exactly, and adapters into LoKr, as near as one term comes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoKrConfig, PeftConfig
from safetensors import safe_open
from torch import Tensor

from krontune.convert.adapter import PREFIX, Adapter, stored_shapes
from krontune.convert.lokr_factors import lokr_shape
from krontune.convert.output import check_output, output_folder, save_tensors
from krontune.convert.results import Export, ModuleExport
from krontune.convert.stored import Stored, lokr_matrix
from krontune.convert.updates import KronUpdate, Update
from krontune.errors import CheckpointError, ConfigError
from krontune.kron import KronShape, nearest_kron
from krontune.tuners import SokaConfig
from krontune.tuners._peft import SAFETENSORS_WEIGHTS_NAME
from krontune.tuners.checkpoint import spec_to_dict
from krontune.tuners.soka import SokaSpec
from krontune.weights import find_model, load_config, meta_model

_MARK = ".lokr_"
_NOT_IN_LYCORIS = (
    "tensors of whole modules or biases (modules_to_save) are left out: a LyCORIS file has no place for them. Use "
    "krontune merge, or --to lokr, which keeps them."
)


@dataclass(frozen=True)
class LycorisFile(Adapter):
    """A LyCORIS file of LoKr modules, under the names of the base model's modules."""

    stored: dict[str, str] | None = None  # {module: its name in the file}
    path_: Path = Path()

    @property
    def file(self) -> Path:
        return self.path_

    def read(self, key: str) -> Tensor:
        name, mark, tail = key.rpartition(_MARK)
        with safe_open(self.file, framework="pt") as tensors:
            tensor = tensors.get_tensor((self.stored or {})[name] + mark + tail)
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{self.file}: {key!r} holds NaN or Inf: damaged, or its training diverged.")
        return tensor

    def _scale(self, name: str) -> float:
        """alpha / rank; LyCORIS takes 1 where both factors are whole, whatever alpha says."""
        ranked = [tail for tail in self.modules[name] if tail.endswith(("w1_b", "w2_b"))]
        if not ranked:
            return 1.0
        rank = self.read(name + ranked[0]).shape[0]
        with safe_open(self.file, framework="pt") as tensors:
            key = f"{(self.stored or {})[name]}.alpha"
            alpha = float(tensors.get_tensor(key)) if key in tensors.keys() else float(rank)  # noqa: SIM118 (not a dict)
        return alpha / rank


def open_lycoris(file: str | Path, base: str) -> LycorisFile:
    """Open a LyCORIS file; its names, with "_" for ".", are looked up among the base model's modules.

    Raises:
        ConfigError: no LoKr modules in it, or something else too, such as DoRA's scale.
        CheckpointError: the file is damaged, or a name is none of the base's.
    """
    path = Path(file)
    shapes = stored_shapes(path)
    if any(key.endswith(".dora_scale") for key in shapes):
        raise ConfigError(f"{path} uses DoRA, which is more than a plain update. It cannot be converted.")
    modules: dict[str, list[str]] = {}
    for key in shapes:
        stored, mark, tail = key.rpartition(_MARK)
        if mark:
            modules.setdefault(stored, []).append(mark + tail)
    if not modules:
        raise ConfigError(f"{path} holds no LoKr module; krontune converts LoKr files of LyCORIS alone.")
    others = sorted(key for key in shapes if _MARK not in key and key.removesuffix(".alpha") not in modules)
    if others:
        raise ConfigError(
            f"{path} holds {len(others)} tensors that belong to no LoKr module, such as {others[0]!r}, and they would "
            "be lost. krontune converts LoKr files of LyCORIS alone; make one without other modules."
        )
    known = {name.replace(".", "_"): name for name, _ in meta_model(load_config(find_model(base))).named_modules()}
    names = {stored: _plain_name(stored, known, path) for stored in modules}
    config = LoKrConfig(base_model_name_or_path=base)
    by_name = {names[stored]: tails for stored, tails in modules.items()}
    matrices = {
        names[stored]: lokr_matrix(Stored(f"{path}: {stored}", {tail: shapes[stored + tail] for tail in tails}))
        for stored, tails in modules.items()
    }
    return LycorisFile(path.parent, config, "lokr", by_name, [], matrices, {n: s for s, n in names.items()}, path)


def _plain_name(stored: str, known: dict[str, str], path: Path) -> str:
    """The module's own name: the longest of the model's that the stored one ends in."""
    fitting = [mangled for mangled in known if mangled and (stored == mangled or stored.endswith(f"_{mangled}"))]
    if not fitting:
        raise CheckpointError(f"{path}: {stored!r} is no module of the base model. Give the right one with --base.")
    return known[max(fitting, key=len)]


# ----------------------------------------------------------------------------------------------------------------- out


def export_soka(adapter: Adapter, out: str | Path, *, force: bool = False) -> Export:
    """Write a LoKr as SoKA, exactly: one term a module, A0 = B0 = 0, the scale in the left factor.

    Raises:
        ConfigError: not a LoKr, or `out` is not free.
    """
    if adapter.method != "lokr":
        raise ConfigError(f"a {adapter.method} adapter cannot be written as SoKA; a LoKr can.")
    check_output(out, force, [adapter.folder])
    tensors: dict[str, Tensor] = {}
    resolved, modules = {}, []
    for name, update in adapter.updates():
        left, right = _one_term(update)
        spec = SokaSpec(1, tuple(left.shape), tuple(right.shape))  # type: ignore[arg-type]
        zeros = {"A0": torch.zeros_like(left).bfloat16(), "B0": torch.zeros_like(right).bfloat16()}
        parts = {"dA": left, "dB": right, **zeros}
        tensors |= {f"{PREFIX}{name}.soka_{part}": t[None].contiguous() for part, t in parts.items()}
        base = {"storage": "float32", "digest": None, "sample": None}
        layer = {"layer": "linear", **adapter.layer(name), "shape": list(spec.matrix_shape)}
        resolved[name] = {"spec": spec_to_dict(spec), **layer, "base": base}
        modules.append(ModuleExport(name, 1, 0.0, float(left.norm() * right.norm())))
    config = SokaConfig(r=1, init_weights="zero", resolved=resolved, **_common(adapter))
    return _write(adapter, out, "soka", tensors, config, modules, force)


def export_lokr(
    adapter: Adapter,
    out: str | Path,
    *,
    lycoris: bool = False,
    force: bool = False,
    progress: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> Export:
    """Write an adapter as LoKr with whole factors: the nearest single Kronecker term of LoKr's own shapes.

    Exact for a SoKA of one term whose factor_shape is LoKr's: (f, f), which is a decompose_factor of f.
    The scale is in the left factor, and alpha / r is 1.

    Args:
        adapter: what open_adapter gave.
        out: the folder to write.
        lycoris: write LyCORIS's file (lokr.safetensors) in place of PEFT's.
        force: replace `out`.
        progress: wraps the modules' names, for a progress bar.

    Raises:
        ConfigError: experts, or `out` is not free.

    Cost: the KPSVD of one term per module, on the dense update; none for a LoKr of the same shapes.
    """
    check_output(out, force, [adapter.folder])
    updates = dict(adapter.updates())
    factor = _decompose_factor(updates.values(), lycoris)
    tensors: dict[str, Tensor] = {}
    modules, whole_rank = [], 1
    for name in progress(list(updates)):
        if updates[name].experts is not None:
            raise ConfigError(f"{name} is a weight of experts, which LoKr does not take. Use krontune merge.")
        term, norm = _term(updates[name], factor, lycoris)
        # from an r of half its size on, PEFT keeps a factor whole
        whole_rank = max(whole_rank, -(-max(term.right.shape) // 2))
        key = f"lycoris_{name.replace('.', '_')}" if lycoris else PREFIX + name
        tensors |= {f"{key}.lokr_w1": term.left.contiguous(), f"{key}.lokr_w2": term.right.contiguous()}
        if lycoris:
            tensors[f"{key}.alpha"] = torch.tensor(1.0)
        modules.append(ModuleExport(name, 1, term.error, norm))
    config = LoKrConfig(r=whole_rank, alpha=whole_rank, decompose_factor=factor, **_common(adapter))
    return _write(adapter, out, "lycoris" if lycoris else "lokr", tensors, None if lycoris else config, modules, force)


def _decompose_factor(updates: Iterable[Update], lycoris: bool) -> int:
    """LoKr's setting under which its shapes are those of the Kronecker terms at hand, where there is one; else -1."""
    kron = [u for u in updates if isinstance(u, KronUpdate)]
    shapes = {KronShape(*u.A.shape[-2:], *u.B.shape[-2:]) for u in kron}
    for factor in (-1, *sorted({shape.m1 for shape in shapes})):
        if shapes and all(lokr_shape(s.m, s.n, factor, lycoris) == s for s in shapes):
            return factor
    return -1


class Term(NamedTuple):
    """One Kronecker term, and how far it is from what it stands for."""

    left: Tensor
    right: Tensor
    error: float


def _term(update: Update, factor: int, lycoris: bool) -> tuple[Term, float]:
    """The nearest term of LoKr's shapes, as it is where it already is one, and the norm of the update."""
    if isinstance(update, KronUpdate) and len(update.A) == 1 and update.order is None:
        left, right = _one_term(update)
        shape = KronShape(*left.shape, *right.shape)
        if lokr_shape(shape.m, shape.n, factor, lycoris) == shape:
            return Term(left, right, 0.0), float(left.norm() * right.norm())
    W = update.dense()
    m, n = W.shape
    return _nearest_term(W, lokr_shape(m, n, factor, lycoris)), float(W.norm())


def _nearest_term(W: Tensor, shape: KronShape) -> Term:
    top = nearest_kron(W, shape, 1, tol=1e-6)
    left, right = top.A[0], top.B[0]
    rest = torch.linalg.vector_norm(W.double() - torch.kron(left.double(), right.double()))
    return Term(left, right, float(rest / W.double().norm().clamp_min(torch.finfo(torch.float64).tiny)))


def _one_term(update: Update) -> tuple[Tensor, Tensor]:
    """The factors of a LoKr, the scale in the left one."""
    if not isinstance(update, KronUpdate):
        raise ConfigError("the update is no Kronecker term.")
    return update.scale * update.A[0], update.B[0]


def _common(adapter: Adapter) -> dict[str, Any]:
    """What every config says of where an adapter belongs."""
    source = adapter.config
    return {
        "target_modules": sorted(adapter.modules),
        "modules_to_save": source.modules_to_save,
        "task_type": source.task_type,
        "base_model_name_or_path": source.base_model_name_or_path,
        "revision": source.revision,
        "inference_mode": True,
    }


def _write(
    adapter: Adapter,
    out: str | Path,
    to: str,
    tensors: dict[str, Tensor],
    config: PeftConfig | None,
    modules: list[ModuleExport],
    force: bool,
) -> Export:
    if config is not None:
        tensors = tensors | {PREFIX + key: adapter.read(key) for key in adapter.others}
    with output_folder(out, force, [adapter.folder]) as folder:
        name = SAFETENSORS_WEIGHTS_NAME if config is not None else "lokr.safetensors"
        save_tensors(tensors, folder / name)
        if config is not None:
            config.save_pretrained(str(folder))
    n_params = sum(t.numel() for key, t in tensors.items() if _MARK in key or ".soka_d" in key)
    n_bytes = sum(t.numel() * t.element_size() for t in tensors.values())
    left_out = len(adapter.others) if config is None else 0
    notes = [f"{left_out} {_NOT_IN_LYCORIS}"] if left_out else []
    return Export(Path(out), adapter.method, to, modules, n_params, n_bytes, notes=notes)
