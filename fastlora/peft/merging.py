"""Merging for a while. PEFT's `unmerge_adapter` subtracts what it has added, which leaves other weights behind; here the very weights come back."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from fastlora.checks import wrong


@contextmanager
def merged(model: nn.Module, adapter_names: Sequence[str] | None = None) -> Iterator[nn.Module]:
    """Hold adapters merged into the weights, as PEFT merges them, as long as the context lasts: answers then cost what the base alone costs.

        with fastlora.merged(model):
            model.generate(...)

    Afterwards every weight is the very Parameter that it was, bit for bit, in every dtype. No weight is written to: an embedding tied to a merged
    head keeps the values it has. Meanwhile the merged weights take memory beside those they stand for.

    Args:
        model: a PEFT model, accelerated or not, whose layers PEFT merges: LoRA and its variants, IA³, layer norms, trainable tokens.
        adapter_names: which; None: the active ones.

    Raises:
        ValueError: the model has no such layers, is merged already, or has no adapter of one of the names.
        TypeError: a weight is quantised, or a layer has none of its own.
    """
    layers: list[Any] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if not layers:
        raise ValueError("model: has no adapters that could be merged")
    if any(layer.merged for layer in layers):
        raise ValueError("model: is merged already, expected an adapter beside its base (model.unmerge_adapter())")
    names = None if adapter_names is None else list(adapter_names)
    known: dict[str, Any] = getattr(model, "peft_config", {})
    for name in names or ():
        if name not in known:
            raise wrong("adapter_names", name, f"the model's adapters {', '.join(known)}")
    for tuner in model.modules():
        if isinstance(tuner, BaseTuner):
            tuner._check_merge_allowed()
    for layer in layers:
        _require_a_weight(layer)
    aside: list[tuple[nn.Module, str, nn.Parameter]] = []
    disabled: list[tuple[Any, bool]] = []
    try:
        for layer in layers:
            for base, name in _changed(layer):
                original: Any = base._parameters[name]
                aside.append((base, name, original))
                base._parameters[name] = nn.Parameter(original.detach().clone(), requires_grad=False)
            layer.merge(adapter_names=names)
            if not layer.merged:  # it has none of these, and would run the active adapter
                disabled.append((layer, layer._disable_adapters))
                layer._disable_adapters = True
        yield model
    finally:
        for layer, before in disabled:
            layer._disable_adapters = before
        for layer in layers:
            if isinstance(layer, LNTuningLayer) and layer.merged:
                layer.unmerge()  # exact: it has exchanged the norm as a whole
            layer.merged_adapters.clear()
        for base, name, original in reversed(aside):
            base._parameters[name] = original


def _changed(layer: Any) -> Iterator[tuple[nn.Module, str]]:
    """The modules and names of the weights that PEFT may write to as it merges a layer."""
    base = layer.get_base_layer()
    for name in (getattr(layer, "parameter_name", "weight"), "bias"):
        if base._parameters.get(name) is not None:
            yield base, name


def _require_a_weight(layer: Any) -> None:
    base = layer.get_base_layer()
    weight: Any = base._parameters.get(getattr(layer, "parameter_name", "weight"))
    if type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.dtype.itemsize < 2:
        raise TypeError(
            f"model: an adapter stands over a {type(base).__name__}, expected one weight of 16 bits or more"
        )
