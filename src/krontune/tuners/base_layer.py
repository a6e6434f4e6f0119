"""The adapter layer but for its mathematics: forward, merging, mixed batches, expert parameters, for both methods."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from krontune.errors import CheckpointError, ConfigError
from krontune.kron.autograd import must_be_plain
from krontune.tuners import _peft
from krontune.tuners.hosts import host_of, restore_codes, storage_of
from krontune.tuners.remembered import Remembered


class KronLayer(_peft.BaseTunerLayer):
    """A base layer with any number of adapters of one method. Subclasses hold the factors and know their product.

    A subclass lists its containers in `adapter_layer_names` (trainable) and `other_param_names` (frozen), and gives
    `allocate`, `delta_matrix`, `delta_linear` and `delta_rows`.
    """

    other_param_names: tuple[str, ...] = ("specs", "scaling", "kron_dropout")

    def __init__(
        self, base_layer: nn.Module, name: str = "", parameter_name: str | None = None, **quantisation: Any
    ) -> None:
        nn.Module.__init__(self)
        base = base_layer.get_base_layer() if isinstance(base_layer, _peft.BaseTunerLayer) else base_layer
        self.quantization_backend = _peft.resolve_quantization_backend(base, **quantisation)
        self.host = host_of(base, name, self.quantization_backend is not None, parameter_name)
        self.base_layer = base_layer
        self.module_name = name
        self.weight_name = parameter_name or "weight"
        self.is_tied = False  # whether another layer has the same parameter; the tuner finds out
        self.specs: dict[str, Any] = {}
        self.scaling: dict[str, float] = {}
        self.kron_dropout = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._unmerged: dict | None = None  # the weight as it was before the first merge
        self._awaiting: set[str] = set()  # adapters whose factors a checkpoint has yet to bring
        self._built: dict[str, Remembered] = {}  # per adapter: what inference need not build from the factors again

    # ------------------------------------------------------------------------------------------- the method's own part

    def allocate(self, adapter: str, spec: Any, start: Any | None, dtype: torch.dtype, device: torch.device) -> None:
        """Create the factors of `adapter`: from `start`, or as NaN placeholders that a checkpoint fills (None)."""
        raise NotImplementedError

    def start_like(self, adapter: str) -> Any:
        """A copy of the adapter's factors, in the form that `allocate` takes."""
        raise NotImplementedError

    def delta_matrix(self, adapter: str) -> Tensor:
        """The dense update, scale included: (m, n), or (experts, m, n)."""
        raise NotImplementedError

    def delta_linear(self, x: Tensor, adapter: str, base: nn.Linear | None = None) -> Tensor:
        """x @ delta_matrix.T without forming it, (..., n) -> (..., m); with `base`, base(x) + that in one product."""
        raise NotImplementedError

    def delta_rows(self, ids: Tensor, adapter: str) -> Tensor:
        """delta_matrix[ids] without forming it: (...) -> (..., n)."""
        raise NotImplementedError

    def factors(self, adapter: str) -> list[Tensor]:
        """Every stored tensor of the adapter, trainable ones first."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------------- adapters come in

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """(m, n), or (experts, m, n), of the base weight seen as a matrix."""
        return self.host.matrix_shape(self.get_base_layer())

    @property
    def sizes(self) -> tuple[int | None, int, int]:
        """(experts or None, m, n)."""
        *experts, m, n = self.matrix_shape
        return (experts[0] if experts else None), m, n

    @property
    def base_parameter(self) -> Tensor:
        """The adapted parameter of the base layer as it is stored (codes, where quantised)."""
        if self.quantization_backend is not None:
            restore_codes(self.get_base_layer())
        return getattr(self.get_base_layer(), self.weight_name)

    def storage(self) -> str:
        """How the base weight is stored: "float32", "bnb 4bit nf4", ..."""
        return storage_of(self.base_parameter, self.quantization_backend)

    def add(
        self,
        adapter: str,
        spec: Any,
        alpha: float,
        dropout: float,
        start: Any | None,
        trainable: bool,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Give this layer an adapter with the resolved `spec`; see `allocate` for `start`. The base's dtype if None."""
        if dropout and not self.host.takes_dropout:
            warnings.warn(f"dropout={dropout} has no effect on an embedding: its input is indices.", stacklevel=2)
        self.specs[adapter] = spec
        self.scaling[adapter] = alpha
        self.kron_dropout[adapter] = nn.Dropout(dropout) if dropout else nn.Identity()
        device, base_dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        if self.weight_name != "weight":
            device, base_dtype = self.base_parameter.device, self.base_parameter.dtype
        if base_dtype is None or not base_dtype.is_floating_point or base_dtype.itemsize < 2:
            base_dtype = torch.float32
        self.allocate(adapter, spec, start, dtype or base_dtype, device)
        is_empty = any(f.is_meta for f in self.factors(adapter)) and not self.base_parameter.is_meta
        (self._awaiting.add if start is None or is_empty else self._awaiting.discard)(adapter)
        self.set_requires_grad(adapter, trainable)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move, and never cast: PEFT's own casts to the base's dtype, which would round what a checkpoint brought."""
        if adapter_name not in self.specs:
            return
        device = device or self.base_parameter.device
        for factor in self.factors(adapter_name):
            if not factor.is_meta and device.type != "meta":
                factor.data = factor.data.to(device)

    def dtype_of(self, adapter: str) -> torch.dtype:
        """The dtype of the adapter's factors."""
        return self.factors(adapter)[0].dtype

    def buffers_of(self, adapter: str) -> list[Any]:
        """The containers of the adapter's frozen tensors."""
        named = [getattr(self, name) for name in self.other_param_names]
        return [held for held in named if isinstance(held, _peft.BufferDict) and adapter in held]

    def is_trainable(self, adapter: str) -> bool:
        """Whether the adapter's factors take gradients."""
        return any(factor.requires_grad for factor in self.factors(adapter))

    def check_loaded(self, adapters: Iterable[str]) -> None:
        """Raise CheckpointError for one that was built without values, which were not loaded. Looks until they were."""
        waiting = [] if torch.compiler.is_compiling() else self._awaiting.intersection(adapters)
        for adapter in waiting:
            factors = self.factors(adapter)
            if any(f.is_meta for f in factors):
                raise CheckpointError(
                    f"The adapter {adapter!r} was built with low_cpu_mem_usage, and its weights were never loaded. "
                    "Load them (set_peft_model_state_dict with low_cpu_mem_usage=True does), or leave it out."
                )
            # One that is NaN throughout is a placeholder: what a diverged run left is refused as it is loaded.
            if any(torch.isnan(f.detach()).all() for f in factors):
                raise CheckpointError(
                    f"The adapter {adapter!r} was built from a checkpoint's config, and its weights were never loaded. "
                    "Load them (PeftModel.from_pretrained does), or set config.resolved = None to start a new adapter."
                )
            self._awaiting.discard(adapter)

    # ---------------------------------------------------------------------------------------------------------- forward

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter_names = kwargs.pop("adapter_names", None)
        if self.disable_adapters and self.merged:
            self.unmerge()
        if adapter_names is not None and not self.disable_adapters:
            return self._mixed_forward(x, adapter_names, *args, **kwargs)
        off = self.disable_adapters or self.merged
        adapters = [] if off else [adapter for adapter in self.active_adapters if adapter in self.specs]
        self.check_loaded(adapters)
        if len(adapters) == 1 and self._takes_base(x, adapters[0]):
            return self.delta_linear(x, adapters[0], cast(nn.Linear, self.base_layer))
        result = self.base_layer(x, *args, **kwargs)
        for adapter in adapters:
            result = result + self.update(x, adapter).to(result.dtype)
        return result

    def train(self, mode: bool = True) -> KronLayer:
        """As nn.Module's; a quantised base layer is also put into the form that has a gradient."""
        if mode and self.quantization_backend is not None:
            restore_codes(self.get_base_layer())
        return super().train(mode)

    def _takes_base(self, x: Tensor, adapter: str) -> bool:
        """Whether the frozen weight can go into the adapter's product, which saves passes over memory.

        Where the base layer is more than a matrix (quantised, hooked, offloaded, another dtype), it is called as it is.
        """
        base = self.base_layer
        if type(base) is not nn.Linear or self.quantization_backend is not None or x.itemsize < 4:
            return False
        if self.training and type(self.kron_dropout[adapter]) is nn.Dropout:
            return False
        if x.dtype != base.weight.dtype:
            return False
        hooks = (base._forward_hooks, base._forward_pre_hooks, base._backward_hooks, base._backward_pre_hooks)
        return not any(hooks) and "forward" not in vars(base)

    def remembered(self, x: Tensor, adapter: str) -> Remembered | None:
        """Where what the factors make up is kept between forwards: in eval mode, without gradients, on the CPU."""
        if self.training or torch.is_grad_enabled() or not x.is_cpu or torch.is_autocast_enabled("cpu"):
            return None
        return None if must_be_plain() else self._built.setdefault(adapter, Remembered())

    def update(self, x: Tensor, adapter: str) -> Tensor:
        """What `adapter` adds to the layer's output for the input x."""
        if self.host.takes_dropout:
            x = self.kron_dropout[adapter](self._cast_input_dtype(x, self.factors(adapter)[0].dtype))
        return self.host.update(self, x, adapter)

    def _mixed_forward(self, x: Tensor, adapter_names: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
        """Row i of the batch goes through adapter_names[i]; "__base__" is the base model."""
        self.check_loaded(adapter_names)
        result = self.base_layer(x, *args, **kwargs)
        for adapter in dict.fromkeys(adapter_names):
            if adapter in self.specs:
                rows = [i for i, name in enumerate(adapter_names) if name == adapter]
                index = torch.tensor(rows, device=x.device)
                result = result.index_add(0, index, self.update(x[index], adapter).to(result.dtype))
        return result

    # ---------------------------------------------------------------------------------------------------------- merging

    def get_base_weight(self) -> Tensor:
        """The base weight, dequantised where it is quantised."""
        stored = self.base_parameter
        return super().get_base_weight() if self.quantization_backend else stored.data

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The dense update in the base weight's own layout, scale included, dtype of the factors."""
        return self.host.from_matrix(self.delta_matrix(adapter), self.get_base_layer())

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the updates to the base weight, summed in float32 (float64 where it is that) and rounded once.

        The original weight is kept in host memory (quantised and tied ones where they are), so that `unmerge` restores
        its bits. A weight that is tied to another layer's is untied for as long, as the update is this layer's alone.

        Args:
            safe_merge: check the result for NaN and Inf before the weight is written.
            adapter_names: which; the active ones if None.

        Raises:
            ConfigError: safe_merge found a NaN or Inf, or the weight cannot be written: it is quantised in such a way,
                or parametrised.
        """
        new = [a for a in _peft.check_adapters_to_merge(self, adapter_names) if a in self.specs]
        if not new:
            return
        if self.quantization_backend is not None and not self.quantization_backend.supports_merge:
            raise ConfigError(
                f"A {self.quantization_backend.backend_name} weight cannot be merged into. Keep the adapter unmerged, "
                "or load the base model unquantised."
            )
        if self.quantization_backend is None and self.weight_name not in self.get_base_layer()._parameters:
            raise ConfigError(
                f"The {self.weight_name} of {self.module_name} is computed from other parameters (weight norm or "
                "another parametrisation), so that nothing can be merged into it. Keep the adapter unmerged, or remove "
                "the parametrisation before get_peft_model."
            )
        self.check_loaded(new)
        if self.quantization_backend is not None:
            warnings.warn(f"Merging into a {self.storage()} weight rounds the update to that format.", stacklevel=2)
        original = self._unmerged or self._snapshot()
        merged = self._merged_weight(original["data"], self.merged_adapters + new)
        if safe_merge and not torch.isfinite(merged).all():
            raise ConfigError(
                f"NaN or Inf in the merged weight of {self.module_name}: one of the adapters {new} is broken. The "
                "weight was not written. Train with a smaller learning rate, or leave the adapter out."
            )
        self._unmerged = original
        if self.quantization_backend is not None:
            self.set_base_weight(merged)
        elif self.is_tied:
            setattr(self.get_base_layer(), self.weight_name, nn.Parameter(merged, self.base_parameter.requires_grad))
        else:
            self.base_parameter.data = merged
        self.merged_adapters.extend(new)

    @torch.no_grad()
    def _merged_weight(self, original: Tensor, adapters: Sequence[str]) -> Tensor:
        total = original.to(self.base_parameter.device, torch.promote_types(original.dtype, torch.float32))
        for adapter in adapters:
            total = total + self.get_delta_weight(adapter).to(total.dtype)
        return total.to(original.dtype)

    def _snapshot(self) -> dict:
        """What `unmerge` puts back, and the original weight as float `data`."""
        base = self.get_base_layer()
        if self.quantization_backend is None:
            parameter = self.base_parameter
            return {"data": parameter.data, "tied": parameter} if self.is_tied else {"data": parameter.data.cpu()}
        state = getattr(base, "state", None)  # bitsandbytes 8-bit keeps its codes and scales there
        return {
            "data": self.get_base_weight().detach(),
            "base": base,
            "parameters": dict(base._parameters),
            "weight": dict(vars(base.weight)),
            "state": dict(vars(state)) if state is not None else None,
        }

    def unmerge(self) -> None:
        """Put the original base weight back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        original, self._unmerged = self._unmerged, None
        self.merged_adapters.clear()
        if not original:
            return
        if self.is_tied:
            setattr(self.get_base_layer(), self.weight_name, original["tied"])
            return
        if self.quantization_backend is None:
            self.base_parameter.data = original["data"].to(self.base_parameter)
            return
        base = original["base"]
        if self.get_base_layer() is not base:  # some backends replace the layer itself
            self.base_layer = base
        base._parameters.update(original["parameters"])
        vars(base.weight).update(original["weight"])
        if original["state"] is not None:
            vars(base.state).update(original["state"])

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """PEFT calls this to take the adapters off: the base layer, with them in its weight if `merge`."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.get_base_layer()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return self.host.has_lora

    def extra_repr(self) -> str:
        return "\n".join(
            f"({adapter}): {spec}, scaling={self.scaling[adapter]}" for adapter, spec in self.specs.items()
        )


class ParameterLayer(KronLayer):
    """Adapts one bare parameter of a module, such as the 3-D weights of experts, whose input is not seen.

    While the module runs, the parameter reads as W + dW through a parametrisation. Wrappers nest, one a parameter. The
    subclasses must be called ParamWrapper: PEFT knows such a layer by that name.
    """

    @property
    def parameter_name(self) -> str:
        return self.weight_name

    def __getattr__(self, name: str) -> Any:
        """What others ask the owner for, such as nn.TransformerEncoderLayer its attention for batch_first."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":  # a copy that is not filled yet has none
                raise
            return getattr(self.base_layer, name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kwargs.pop("adapter_names", None)  # with disable_adapter() alone
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer(x, *args, **kwargs)
        with self._parametrised([a for a in self.active_adapters if a in self.specs]):
            return self.base_layer(x, *args, **kwargs)

    @contextmanager
    def _parametrised(self, adapters: Sequence[str]) -> Iterator[None]:
        if not adapters:
            yield
            return
        self.check_loaded(adapters)
        base, name = self.get_base_layer(), self.weight_name
        delta = torch.stack([self.get_delta_weight(a) for a in adapters]).sum(0).to(self.base_parameter.dtype)
        trainable = self.base_parameter.requires_grad
        parametrize.register_parametrization(base, name, _Added(delta), unsafe=True)
        base.parametrizations[name].original.requires_grad_(trainable)
        try:
            with parametrize.cached():
                yield
        finally:
            parametrize.remove_parametrizations(base, name, leave_parametrized=False)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """PEFT calls this to take off the wrapper, those nested in it, and adapters inside, which it does not find."""
        layer: nn.Module = self
        while isinstance(layer, ParameterLayer):
            if merge:
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            layer = layer.base_layer
        _unload_children(layer, merge=merge, safe_merge=safe_merge, adapter_names=adapter_names)
        return layer


def _unload_children(module: nn.Module, **how: Any) -> None:
    """Take the adapters off all modules below one; `how` as for unload_and_optionally_merge_module."""
    for name, child in list(module.named_children()):
        unload = getattr(child, "unload_and_optionally_merge_module", None)
        if callable(unload):
            setattr(module, name, unload(**how))
        else:
            _unload_children(child, **how)


class _Added(nn.Module):
    """The parametrisation W -> W + delta."""

    def __init__(self, delta: Tensor):
        super().__init__()
        self.delta = (delta,)  # in a tuple: it is a value of this forward, neither parameter nor buffer

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.delta[0].to(weight.dtype)
