"""Fold an adapter into its base's weights, and say what rounding to the working dtype cost."""

import importlib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlora.inference import load_model

PROBES, PROBE_TOKENS = 4, 64


@dataclass(frozen=True)
class MergeReport:
    dtype: str
    layers: int  # merged
    weight_max_error: float  # |merged weight - the one computed in float64|, largest element of all layers
    weight_relative_error: float  # norm of that difference over the norm of the merged weights, all layers together
    update_relative_error: (
        float  # norm of that difference over the norm of s B A: the part of the adapter that rounding lost
    )
    logits_max_error: float  # |merged model's logits - those with the adapter beside the base|
    logits_relative_error: float  # norm of that difference over the norm of the logits
    output: str


def merge(
    model: str | None, adapter: str | Path, output: str | Path, *, dtype: str = "auto", overwrite: bool = False
) -> MergeReport:
    """Write the base with W + s B A in every layer of the adapter: an ordinary transformers model, with its tokenizer.

    The weights' error is measured layer by layer against the same sum in float64, the logits' on four sequences of 64
    random tokens.

    Args:
        model: the base: a folder or a hub id; None: the one that the adapter names.
        dtype: the merged weights' and the one the logits are compared in: auto, float32 or bfloat16.

    Raises:
        FileExistsError: the output folder holds a model already, and overwrite was not asked for.
        ValueError: the adapter makes some weight infinite or NaN.
        TypeError: the adapter has layers whose update is no sum (DoRA and other variants).
    """
    output = Path(output)
    if (output / "config.json").exists() and not overwrite:
        raise FileExistsError(f"output={output} holds a model already: --overwrite replaces it")
    peft_model, tokenizer = load_model(model, {"default": adapter}, dtype=dtype, accelerate=False)
    probes = _probes(peft_model)
    before = _logits(peft_model, probes)
    errors = _merge_layers(peft_model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="All adapters are already merged")
        merged = peft_model.merge_and_unload()
    after = _logits(merged, probes)
    merged.save_pretrained(output)
    tokenizer.save_pretrained(output)
    return MergeReport(
        dtype=str(merged.dtype).removeprefix("torch."),
        layers=errors.layers,
        weight_max_error=errors.largest,
        weight_relative_error=errors.difference**0.5 / errors.weight**0.5,
        update_relative_error=(errors.difference / errors.update) ** 0.5 if errors.update else 0.0,
        logits_max_error=(after - before).abs().max().item(),
        logits_relative_error=((after - before).norm() / before.norm()).item(),
        output=str(output),
    )


@dataclass
class _Errors:
    layers: int = 0
    largest: float = 0.0
    difference: float = 0.0  # sums of squares
    weight: float = 0.0
    update: float = 0.0


@torch.no_grad()
def _merge_layers(peft_model: Any) -> _Errors:
    lora_layer = importlib.import_module("peft.tuners.lora").LoraLayer
    errors = _Errors()
    layers = [module for module in peft_model.modules() if isinstance(module, lora_layer)]
    variants = [layer for layer in layers if getattr(layer, "lora_variant", {})]
    if variants:
        raise TypeError(
            f"adapter: expected plain LoRA layers, {len(variants)} of {len(layers)} are variants such as DoRA;"
            " PEFT's merge_and_unload merges them"
        )
    for layer in layers:
        # One layer at a time, so that a second copy of one weight is all that measuring costs.
        update = layer.get_delta_weight("default").double()
        exact = layer.get_base_layer().weight.double() + update
        layer.merge(safe_merge=True)
        difference = layer.get_base_layer().weight.double() - exact
        errors.layers += 1
        errors.largest = max(errors.largest, difference.abs().max().item())
        errors.difference += _square(difference)
        errors.weight += _square(exact)
        errors.update += _square(update)
    return errors


def _square(tensor: Tensor) -> float:
    return tensor.square().sum().item()


def _probes(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    length = min(PROBE_TOKENS, getattr(model.config, "max_position_embeddings", PROBE_TOKENS))
    return torch.randint(model.config.vocab_size, (PROBES, length), generator=generator).to(model.device)


@torch.no_grad()
def _logits(model: Any, input_ids: Tensor) -> Tensor:
    return model(input_ids=input_ids, use_cache=False).logits.float()
