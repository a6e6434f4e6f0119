"""How an (m, n) update meets each kind of layer: as which matrix its weight is seen, and how the update is applied.

A method knows matrices alone; a host knows layers alone. A new kind of layer is a new host, for both methods at once.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from krontune.errors import ConfigError

if TYPE_CHECKING:
    from krontune.tuners.base_layer import KronLayer


class LinearHost:
    """nn.Linear and quantised linears: W (out, in) as it is."""

    kind = "linear"  # what the checkpoint calls such a layer
    takes_dropout = True
    has_lora = True  # whether PEFT can convert the adapter to a LoRA of such a layer

    def describe(self, base: nn.Module) -> dict[str, object]:
        """What a conversion has to know of the layer, for the checkpoint."""
        return {"layer": self.kind, "shape": list(self.matrix_shape(base))}

    def matrix_shape(self, base: Any) -> tuple[int, ...]:
        """(m, n), or (experts, m, n), of the weight seen as a matrix."""
        return base.out_features, base.in_features

    def to_matrix(self, weight: Tensor) -> Tensor:
        """The weight as that matrix."""
        return weight

    def from_matrix(self, matrix: Tensor, base: Any) -> Tensor:
        """The matrix in the weight's own layout."""
        return matrix

    def update(self, layer: KronLayer, x: Tensor, adapter: str) -> Tensor:
        """What the adapter adds to the layer's output for the input x."""
        return layer.delta_linear(x, adapter)


class Conv1DHost(LinearHost):
    """transformers' Conv1D (GPT-2): a linear whose weight is stored as (in, out)."""

    kind = "conv1d"

    def matrix_shape(self, base: Any) -> tuple[int, ...]:
        n, m = base.weight.shape
        return m, n

    def to_matrix(self, weight: Tensor) -> Tensor:
        return weight.T

    def from_matrix(self, matrix: Tensor, base: Any) -> Tensor:
        return matrix.T


class EmbeddingHost(LinearHost):
    """nn.Embedding: W (vocabulary, width); the update is gathered row by row."""

    kind = "embedding"
    takes_dropout = False  # the input is indices
    has_lora = False

    def matrix_shape(self, base: Any) -> tuple[int, ...]:
        return base.num_embeddings, base.embedding_dim

    def update(self, layer: KronLayer, x: Tensor, adapter: str) -> Tensor:
        rows = layer.delta_rows(x, adapter)
        scale = layer._get_embed_scale()  # some models scale inside their embedding's forward
        return rows if scale is None else rows * scale.to(rows.dtype)


class ConvHost(LinearHost):
    """nn.Conv1d, 2d and 3d: W (out, in/groups, *kernel) flattened to (out, in/groups * kernel).

    The update is convolved as a kernel of its own: convolutions are small and applied at many places, so that forming
    it costs less than unfolding the input would.
    """

    kind = "conv"
    has_lora = False

    def describe(self, base: Any) -> dict[str, object]:
        return {**super().describe(base), "kernel": list(base.weight.shape[1:])}

    def matrix_shape(self, base: Any) -> tuple[int, ...]:
        return base.weight.shape[0], math.prod(base.weight.shape[1:])

    def to_matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def from_matrix(self, matrix: Tensor, base: Any) -> Tensor:
        return matrix.view(base.weight.shape)

    def update(self, layer: KronLayer, x: Tensor, adapter: str) -> Tensor:
        base = layer.get_base_layer()
        kernel = layer.delta_matrix(adapter).to(x.dtype)
        return base._conv_forward(x, self.from_matrix(kernel, base), None)


class ParameterHost(LinearHost):
    """A bare nn.Parameter, (m, n) or (experts, m, n), whose input is not seen."""

    kind = "parameter"
    takes_dropout = False
    has_lora = False

    def __init__(self, parameter_name: str):
        self.parameter_name = parameter_name

    def matrix_shape(self, base: Any) -> tuple[int, ...]:
        shape = tuple(getattr(base, self.parameter_name).shape)
        if len(shape) not in (2, 3):
            raise ConfigError(
                f"target_parameters: {self.parameter_name} has the shape {shape}. Only 2-D parameters and 3-D ones "
                "(experts, m, n) can be adapted."
            )
        return shape


def host_of(base: nn.Module, name: str, quantised: bool, parameter_name: str | None = None) -> LinearHost:
    """The host for a base layer.

    Raises:
        ConfigError: a layer of this type cannot be adapted.
    """
    if parameter_name is not None:
        return ParameterHost(parameter_name)
    if isinstance(base, nn.Embedding):
        return EmbeddingHost()
    if isinstance(base, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return ConvHost()
    if isinstance(base, Conv1D):
        return Conv1DHost()
    if isinstance(base, nn.Linear) or quantised:
        return LinearHost()
    raise ConfigError(
        f"target_modules: {name} is a {type(base).__name__}, which cannot be adapted. Supported are Linear (also "
        "quantised), transformers' Conv1D, Embedding, Conv1d, Conv2d and Conv3d; for a bare parameter use "
        "target_parameters."
    )


def storage_of(weight: Tensor, backend: Any) -> str:
    """How a weight is stored: its dtype's name, or its quantisation backend's."""
    if backend is not None:  # one backend serves nf4 and fp4, or torchao's int8, int4 and float8
        kind = getattr(getattr(weight, "quant_state", None), "quant_type", "")
        if backend.backend_name == "torchao":
            kind = type(weight).__name__
        return f"{backend.backend_name} {kind}".strip()
    return str(weight.dtype).removeprefix("torch.")


def restore_codes(base: nn.Module) -> None:
    """Undo what bitsandbytes does to 4-bit weights in a forward in eval mode on CPUs with AVX512-BF16: reorder them.

    In that order a weight can be neither dequantised nor trained through (its product has no gradient), and
    bitsandbytes' own way back leaves the scales of a weight without nested quantisation transposed. The codes come
    back bit for bit; the scales have been rounded to bfloat16, once and for all. The next forward in eval mode reorders
    them again. Does nothing for any other layer.
    """
    weight: Any = getattr(base, "weight", None)
    state: Any = getattr(weight, "quant_state", None)
    if not getattr(state, "packing_format_for_cpu", False):
        return
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    state.original_nested = False  # the scales are plain now; quantising them again would round them again
    weight.data, weight.quant_state = _convert_weight_packed_for_cpu_inverse(weight.data, state)
    state.absmax = state.absmax.T.reshape(-1).float()


def to_float_matrix(layer: KronLayer) -> Tensor:
    """The base weight as a dequantised float32 matrix, (m, n) or (experts, m, n)."""
    with torch.no_grad():
        return layer.host.to_matrix(layer.get_base_weight()).detach().float()
