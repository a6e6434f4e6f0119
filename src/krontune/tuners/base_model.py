"""The tuner, but for what a method resolves: injection in two phases, and the calls that PEFT makes.

PEFT decides which modules are adapted (phase one: they are wrapped, empty). Then all of them are known, and ranks that
depend on each other can be chosen and the factors made (phase two).
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from krontune.errors import CheckpointError, ConfigError
from krontune.tuners import _peft
from krontune.tuners.base_config import KronConfig
from krontune.tuners.base_layer import KronLayer, ParameterLayer
from krontune.tuners.checkpoint import check_base, check_state, fingerprint, spec_to_dict, stored_dtype
from krontune.tuners.gradient import drop_gradient, kept_gradient
from krontune.tuners.joining import check_join, join_saved_modules, joined_config
from krontune.tuners.mixed import adapter_by_row
from krontune.tuners.norms import norm_names


class Resolved(NamedTuple):
    """What a config means for one module."""

    spec: Any
    choice: dict | None = None  # how a rule arrived at it, for people to read
    computed: Any = None  # what was computed on the way and serves the start: a KPSVD


class KronModel(_peft.BaseTuner):
    """The tuner of a method. A subclass gives `layer_class`, `wrapper_class`, `resolve` and `start`."""

    target_module_mapping = _peft.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    layer_class: type[KronLayer]
    wrapper_class: type[KronLayer]

    # ------------------------------------------------------------------------------------------- the method's own part

    def resolve(self, config: Any, layers: dict[str, KronLayer]) -> dict[str, Resolved]:
        """Choose the sizes of every module, {module name: Resolved}."""
        raise NotImplementedError

    def start(self, config: Any, name: str, layer: KronLayer, resolved: Resolved, gradient: Tensor | None) -> Any:
        """The factors that a new adapter starts with, in the form that the layer's `allocate` takes."""
        raise NotImplementedError

    def join(self, layer: KronLayer, adapters: Sequence[str], weights: Sequence[float]) -> tuple[Any, Any]:
        """(spec, start) of the adapter whose update is sum_i weights_i * dW_i, scale included, exactly."""
        raise NotImplementedError

    # -------------------------------------------------------------------------------------------------------- injection

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        given = self.peft_config[adapter_name]
        twin = next((name for name, c in self.peft_config.items() if c is given and name != adapter_name), None)
        config = copy.deepcopy(given)  # the user's own object is never written to
        self.peft_config[adapter_name] = config
        undo = self._undo_of_injection(model, adapter_name)
        self._targets: dict[str, KronLayer] = {}
        places = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
        self._tied = {parameter for parameter, count in places.items() if count > 1}
        try:
            if config.train_norms:
                saved = config.modules_to_save or []
                config.modules_to_save = [*saved, *norm_names(model, saved)]
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
            if state_dict is None:
                self._adapt_inside_wrappers(config, adapter_name)
            with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                self._fill(config, adapter_name, twin)
        except BaseException:  # Ctrl-C during a long KPSVD, too
            undo()
            raise
        finally:
            del self._targets, self._tied

    @classmethod
    def _prepare_adapter_config(cls, peft_config: Any, model_config: dict) -> Any:
        """Fill in the architecture's default target_modules; target_parameters alone do without, as in LoRA."""
        if peft_config.target_modules is None:
            names = cls.target_module_mapping.get(model_config.get("model_type"))
            if names is None and not peft_config.target_parameters:
                raise ConfigError(
                    f"target_modules=None takes an architecture's defaults, and {model_config.get('model_type')!r} has "
                    "none. Name the modules, or say 'all-linear'."
                )
            peft_config.target_modules = set(names) if isinstance(names, list) else names
        return peft_config

    def _check_new_adapter_config(self, config: KronConfig) -> None:
        super()._check_new_adapter_config(config)
        for name, other in self.peft_config.items():
            ours, theirs = set(config.target_parameters or ()), set(other.target_parameters or ())
            if ours and theirs and ours != theirs:
                raise ConfigError(
                    f"target_parameters {sorted(ours)} differ from {sorted(theirs)} of the adapter {name!r}. "
                    "The wrappers of parameters nest, so all adapters of a model must have the same ones."
                )

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Put a module in another's place. PEFT's own also assigns `weight`, which experts and saved heads may lack."""
        setattr(parent, child_name, new_module)

    def _create_and_replace(
        self,
        config: KronConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
        **_: Any,
    ) -> None:
        if not isinstance(target, KronLayer) or (parameter_name and target.weight_name != parameter_name):
            if isinstance(parent, nn.MultiheadAttention):
                raise ConfigError(
                    f"{current_key}: nn.MultiheadAttention never calls {target_name}, it reads the weight, so that an "
                    "adapter there would do nothing. Adapt its in_proj_weight with target_parameters, and leave "
                    f"{target_name} out with exclude_modules."
                )
            cls = self.wrapper_class if parameter_name else self.layer_class
            layer = cls(target, current_key, parameter_name, **_peft.get_quantization_kwargs(self.model))
            layer.is_tied = id(layer.base_parameter) in self._tied
            if isinstance(parent, nn.TransformerEncoderLayer):
                layer.register_forward_hook(_seen)
            self._replace_module(parent, target_name, layer, target)
            target = layer
        self._targets[_unwrapped(current_key)] = target

    def _adapt_inside_wrappers(self, config: KronConfig, adapter_name: str) -> None:
        """Match the modules inside the owners of wrapped parameters: PEFT passes over them for a further adapter."""
        wrappers = [(path, m) for path, m in self.model.named_modules() if isinstance(m, ParameterLayer)]
        for path, wrapper in wrappers:
            for key, parent, child_name, child in list(_modules_inside(wrapper.base_layer, _unwrapped(path))):
                if self._check_target_module_exists(config, key):
                    self._create_and_replace(config, adapter_name, child, child_name, parent, current_key=key)
        if wrappers:  # what has been wrapped just now does not know yet which adapters are active
            self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _fill(self, config: KronConfig, adapter_name: str, twin: str | None) -> None:
        """Phase two: sizes, start and factors of every module that was matched.

        A config that is the very object of another adapter here, its `twin`, makes a copy of that adapter, frozen
        factors included: TRL adds its reference adapters in this way.
        """
        base = {name: self._describe(layer) for name, layer in self._targets.items()}
        if config.resolved is not None:
            check_base(config.resolved, base)
            resolved = {name: Resolved(config.spec(name)) for name in self._targets}
        else:
            self._check_weights()
            resolved = self.resolve(config, self._targets)
        for name, layer in self._targets.items():
            self._add(config, adapter_name, name, layer, resolved[name], twin)
        if twin is not None:
            for wrapper in self._saved_modules(adapter_name).values():
                wrapper.modules_to_save[adapter_name].load_state_dict(wrapper.modules_to_save[twin].state_dict())
        for layer in self._targets.values():
            drop_gradient(layer)
        if config.resolved is None:
            paths = {name: path for name, path, _ in self._named_layers()}
            config.resolved = {name: _entry(base[name], resolved[name], name, paths[name]) for name in self._targets}
            self._note_dtypes(adapter_name)
            config.saved_tensors = self._saved_tensors(adapter_name)

    def _add(
        self, config: Any, adapter_name: str, name: str, layer: KronLayer, resolved: Resolved, twin: str | None
    ) -> None:
        start, dtype = None, None
        if config.resolved is None:
            start = self.start(config, name, layer, resolved, kept_gradient(layer))
        elif twin is not None:
            layer.check_loaded([twin])
            start, dtype = layer.start_like(twin), layer.dtype_of(twin)
        else:
            dtype = stored_dtype(config.resolved[name])
        alpha = pattern_value(config.alpha_pattern, name, config.alpha)
        trainable = adapter_name in self.active_adapters and not config.inference_mode
        layer.add(adapter_name, resolved.spec, float(alpha), config.dropout, start, trainable, dtype)

    def _saved_tensors(self, adapter_name: str) -> list[str]:
        """Names of the tensors of this adapter's modules_to_save, as they are in the adapter file."""
        return [
            f"{path}.{key}"
            for path, wrapper in self._saved_modules(adapter_name).items()
            for key in wrapper.modules_to_save[adapter_name].state_dict()
        ]

    def _saved_modules(self, adapter_name: str) -> dict[str, Any]:
        """{path: wrapper} of every module that this adapter saves whole."""
        wrappers = {path: m for path, m in self.model.named_modules() if isinstance(m, _peft.ModulesToSaveWrapper)}
        return {path: wrapper for path, wrapper in wrappers.items() if adapter_name in wrapper.modules_to_save}

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Cast what is trained. PEFT's own also casts what is frozen, and makes a ParameterDict's tensors trainable."""
        layers = [layer for _, _, layer in self._named_layers() if adapter_name in layer.specs]
        trainable = [layer.is_trainable(adapter_name) for layer in layers]
        frozen = [(held, held[adapter_name]) for layer in layers for held in layer.buffers_of(adapter_name)]
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for layer, requires_grad in zip(layers, trainable, strict=True):
            layer.set_requires_grad(adapter_name, requires_grad)
        for held, tensor in frozen:
            held[adapter_name] = tensor
        self._note_dtypes(adapter_name)

    def _note_dtypes(self, adapter_name: str) -> None:
        """Write the factors' dtypes into `resolved`: a checkpoint is read back into the same, on any base."""
        resolved = self.peft_config[adapter_name].resolved
        for name, _, layer in self._named_layers():
            if adapter_name in layer.specs:
                resolved[name]["dtype"] = str(layer.dtype_of(adapter_name)).removeprefix("torch.")

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """PEFT 0.21 and later call this with what a file held, from a folder or the Hub."""
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        names = {name: name.replace(f"modules_to_save.{adapter_name}.", "") for name in state_dict}
        check_state(config, {names[n]: t for n, t in state_dict.items()}, _loading(adapter_name, config))
        return remapped

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Refuse tensors of modules that are saved whole by name; torch would list shapes in a traceback."""
        for adapter, config in self.peft_config.items():
            for path, wrapper in self._saved_modules(adapter).items():
                for key, tensor in wrapper.modules_to_save[adapter].state_dict().items():
                    given = state_dict.get(f"{prefix}model.{path}.modules_to_save.{adapter}.{key}", tensor)
                    if given.shape != tensor.shape:
                        raise CheckpointError(
                            f"{_loading(adapter, config)}: the tensor '{path}.{key}' has the shape "
                            f"{tuple(given.shape)}, and is {tuple(tensor.shape)} in this model. The file was edited, "
                            "or belongs to another base model."
                        )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _describe(self, layer: KronLayer) -> dict:
        described = layer.host.describe(layer.get_base_layer())
        return {**described, "base": fingerprint(layer.base_parameter, layer.storage())}

    def _check_weights(self) -> None:
        for name, layer in self._targets.items():
            weight = layer.base_parameter
            is_plain = layer.quantization_backend is None and weight.is_floating_point() and not weight.is_meta
            if is_plain and not bool(torch.isfinite(weight).all()):
                raise ConfigError(
                    f"The weight of {name} holds NaN or Inf, so that no adapter can be started from it. Load the base "
                    "model again, or leave the module out with exclude_modules."
                )

    def _undo_of_injection(self, model: nn.Module, adapter_name: str) -> Callable[[], None]:
        """What leaves the model as it is now, to be called if the injection fails."""
        children = [(module, dict(module._modules)) for module in model.modules()]
        trainable = [(p, p.requires_grad) for p in model.parameters()]
        names = [(matched, list(matched)) for matched in (self.targeted_module_names, self.targeted_parameter_names)]

        def undo() -> None:
            for layer in self._targets.values():
                if adapter_name in layer.specs:
                    layer.delete_adapter(adapter_name)
            for module, before in children:
                module._modules.clear()
                module._modules.update(before)
                if isinstance(module, _peft.AuxiliaryTrainingWrapper):
                    module._adapters.discard(adapter_name)
            for parameter, requires_grad in trainable:
                parameter.requires_grad_(requires_grad)
            for matched, before_names in names:
                matched[:] = before_names
            self.peft_config.pop(adapter_name, None)

        return undo

    # --------------------------------------------------------------------------------------------------- mixed batches

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT enters this for each forward and generate call, with its arguments."""
        names = kwargs.pop("adapter_names", None)
        with nullcontext() if names is None else adapter_by_row(self, names):
            yield

    # --------------------------------------------------------------------------------------------------------- joining

    @torch.no_grad()
    def add_weighted_adapter(
        self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, combination_type: str = "linear"
    ) -> None:
        """Add the adapter whose update is sum_i weights_i * dW_i, exactly: the terms are put side by side.

        Modules that are trained whole (modules_to_save, train_norms) are joined in the same way, from their changes:
        N_0 + sum_i weights_i * (N_i - N_0).

        Args:
            adapters: names of adapters with equal factor shapes on each module.
            weights: one multiplier each; the adapters' own scales are kept beside it.
            adapter_name: the new adapter's name. It is float32, and not active.
            combination_type: "linear" (or "cat", which is the same here).

        Raises:
            ConfigError: unknown or existing names, weights that are no numbers, trained biases, or factor shapes that
                differ.
        """
        check_join(self.peft_config, adapters, weights, adapter_name, combination_type)
        config = joined_config([self.peft_config[adapter] for adapter in adapters])
        self.peft_config[adapter_name] = config
        modules = []
        try:
            for name, path, layer in self._named_layers():
                present = [(a, w) for a, w in zip(adapters, weights, strict=True) if a in layer.specs]
                if present:
                    names, factors = zip(*present, strict=True)
                    layer.check_loaded(names)
                    spec, start = self.join(layer, names, factors)
                    layer.add(adapter_name, spec, 1.0, 0.0, start, trainable=False, dtype=torch.float32)
                    config.resolved[name] = _entry(self._describe(layer), Resolved(spec), name, path)
                    if not isinstance(layer, ParameterLayer):
                        modules.append(name)
            if modules:  # a pattern, which PEFT matches with the whole name: names in a set would match ends of others
                config.target_modules = "|".join(map(re.escape, modules))
            join_saved_modules(self.model, adapters, weights, adapter_name)
            self._note_dtypes(adapter_name)
            config.saved_tensors = self._saved_tensors(adapter_name)
        except BaseException:
            self.delete_adapter(adapter_name)
            raise

    def _named_layers(self) -> Iterator[tuple[str, str, KronLayer]]:
        """(name of the module or parameter in the base model, path of its layer in this one, layer)."""
        for path, module in self.model.named_modules():
            if isinstance(module, ParameterLayer):
                yield f"{_unwrapped(path)}.{module.parameter_name}", path, module
            elif isinstance(module, KronLayer):
                yield _unwrapped(path), path, module


def _seen(module: nn.Module, args: tuple, output: Any) -> None:
    """A hook that does nothing: nn.TransformerEncoderLayer in eval mode reads base weights, unless a module has one."""


def _modules_inside(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    """(full name, parent, name, module) of all below a module but parameters' wrappers and adapter layers' parts."""
    for name, child in module.named_children():
        if not isinstance(child, ParameterLayer):
            yield f"{prefix}.{name}", module, name, child
        if not isinstance(child, KronLayer):
            yield from _modules_inside(child, f"{prefix}.{name}")


def _unwrapped(path: str) -> str:
    """The name in the base model of what has this path here: a module inside a parameter's owner is one level down."""
    return re.sub(r"\.base_layer(?=\.|$)", "", path)


def _loading(adapter: str, config: Any) -> str:
    """What an error on loading starts with: the file where there is one."""
    return f"Loading {adapter!r}" + (f" from {config.source}" if config.source else "")


def _entry(base: dict, resolved: Resolved, name: str, path: str) -> dict:
    """A module's entry in config.resolved."""
    entry = {"spec": spec_to_dict(resolved.spec), **base}
    if path != name:
        entry["path"] = path  # a wrapped parameter's layer is not called as the parameter is
    if resolved.choice is not None:
        entry["choice"] = resolved.choice
    return entry


def pattern_value(pattern: dict, name: str, default: Any) -> Any:
    """A module's entry of a rank_pattern or alpha_pattern: the first key that matches the name's end, as in PEFT."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default
