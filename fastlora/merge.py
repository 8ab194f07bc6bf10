"""Fold an adapter into its base's weights, and say what rounding to the weights' dtype cost."""

import copy
import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastlora import adapters, writing
from fastlora.models import base_of, load_base, load_model
from fastlora.receipts import BLOCK

logger = logging.getLogger("fastlora")

PROBES, PROBE_TOKENS = 4, 64
LARGEST_LOSS = 0.05  # of the update, before a warning


class MergeError(RuntimeError):
    """What was written does not read back as what was merged; nothing is left of it."""


@dataclass(frozen=True)
class MergeReport:
    dtype: str
    layers: int  # merged
    # Of LoRA, and None of what is no sum with a weight, as IA3's factors:
    weight_max_error: float | None  # |merged weight - the one computed in float64|, largest element of all layers
    weight_relative_error: (
        float | None
    )  # norm of that difference over the norm of the merged weights, all layers together
    update_relative_error: (
        float | None
    )  # that norm over the norm of s B A, or of a DoRA's change: the part of the adapter that rounding lost
    logits_max_error: float  # |logits of the model that was written - those with the adapter beside the base|
    logits_relative_error: float  # norm of that difference over the norm of the logits
    untied: str | None  # weights that were one with another and have become their own
    output: str


def merge(
    model: str | None,
    adapter: str | Path,
    output: str | Path,
    *,
    dtype: str = "auto",
    overwrite: bool = False,
    allow_missing: bool = False,
    allow_noop: bool = False,
) -> MergeReport:
    """Write the base with W + s B A, or what DoRA makes of it, in every layer of the adapter: an ordinary transformers model, with its tokenizer.

    The sums are computed in float32 and rounded once. The weights' error is measured layer by layer against the same sum in float64, the logits'
    on four sequences of 64 random tokens with the model as it reads back. It is written elsewhere and renamed: what stands there is whole.

    Args:
        model: the base: a folder or a hub id; None: the one that the adapter names.
        dtype: the merged weights' and the one the logits are compared in: auto (as the base is stored), float32 or bfloat16.
        overwrite: replace the model or adapter in the output folder; never the base's or the adapter's own folder.
        allow_missing, allow_noop: as `load_model`'s.

    Raises:
        FileExistsError: the output folder holds a model or an adapter, and overwrite was not asked for.
        BlockingIOError: a training or another merge writes into it.
        ValueError: the output folder is the adapter's or the base's, or in it or around it; the adapter makes some weight infinite or NaN.
        AdapterError: the adapter's files are not what they should be.
        TypeError: the adapter has other variants of LoRA than DoRA on linear layers, or is a soft prompt or a bottleneck adapter.
        OSError: something is not there, or the disk is full.
        MergeError: the written model is not the merged one.
    """
    output = Path(output)
    base = model or base_of([adapters.read(adapter)])
    writing.require_apart(output, adapter=adapter, model=base)
    with writing.locked(output):
        writing.require_files(output)
        held = [
            name for name in writing.results(output) if name in writing.HEADS or name.endswith((".safetensors", ".bin"))
        ]
        if held and not overwrite:
            raise FileExistsError(
                f"output={output} holds a model or an adapter already ({held[0]}): overwrite=True replaces it"
            )
        return _merge(base, adapter, output, dtype, allow_missing, allow_noop)


def _merge(
    base: str, adapter: str | Path, output: Path, dtype: str, allow_missing: bool, allow_noop: bool
) -> MergeReport:
    chosen = "stored" if dtype == "auto" else dtype
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")  # merging is right here
        peft_model, tokenizer = load_model(
            base,
            {"default": adapter},
            dtype=chosen,
            accelerate=False,
            allow_missing=allow_missing,
            allow_noop=allow_noop,
        )
    probes = _probes(peft_model)
    before = _logits(peft_model, probes)
    merged, errors = fold(peft_model)
    del peft_model
    written_dtype, after = merged.dtype, _logits(merged, probes)
    read_back = after

    def fill(folder: Path) -> None:
        nonlocal merged, read_back
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        device = merged.device
        del merged  # before its like is loaded
        read_back = _logits(load_base(str(folder), None, device), probes)
        if not _relative(read_back, after) <= 0.01:  # NaN fails, too
            raise MergeError(f"output={output}: reads back as another model than the merged one; nothing was written")

    try:
        writing.publish(output, fill)
    except OSError as error:
        if error.errno not in writing.DISK:
            raise
        raise OSError(
            f"output={output}: {error.strerror or error} ({writing.free(output)}); what was written is removed again"
        ) from error
    report = MergeReport(
        dtype=str(written_dtype).removeprefix("torch."),
        layers=errors.layers,
        weight_max_error=errors.largest if errors.measured else None,
        weight_relative_error=_ratio(errors.difference, errors.weight) if errors.measured else None,
        update_relative_error=_ratio(errors.difference, errors.update) if errors.measured else None,
        logits_max_error=(read_back - before).abs().max().item(),
        logits_relative_error=_relative(read_back, before),
        untied=", ".join(errors.untied) or None,
        output=str(output),
    )
    if report.update_relative_error is not None and report.update_relative_error > LARGEST_LOSS:
        logger.warning(
            "merging in %s lost %.0f %% of the adapter's update to rounding: merge with dtype=float32, or keep the adapter beside the base",
            report.dtype,
            100 * report.update_relative_error,
        )
    return report


def _ratio(error: float, whole: float) -> float:
    """Of the norms whose squares these are."""
    return (error / whole) ** 0.5 if whole else 0.0


def _relative(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


@dataclass
class Errors:
    """What rounding cost, over all layers; sums of squares but for the largest. And which weights are tied no longer."""

    layers: int = 0  # merged
    measured: bool = True  # LoRA's alone are
    largest: float = 0.0
    difference: float = 0.0
    weight: float = 0.0
    update: float = 0.0
    untied: tuple[str, ...] = ()


@torch.no_grad()
def fold(peft_model: Any) -> tuple[Any, Errors]:
    """The base model of a PeftModel with the active adapters' updates in its weights, and no adapter left.

    No weight is written to: each that changes becomes a new Parameter, so that whoever shared the old one (tied embeddings) keeps it. Where two
    tied weights have come out different, they are untied: `tie_word_embeddings` is False in the model's config and in that of its text part, and
    each has memory of its own.

    The PeftModel is used up, also where a weight turns out to be infinite.

    Raises:
        ValueError: some weight would become infinite or NaN.
        TypeError: a layer is another variant of LoRA than DoRA on a linear layer, or its weight is quantised; the adapter is none of weights: a soft
            prompt, or a bottleneck.
    """
    if any(config.is_prompt_learning for config in peft_model.peft_config.values()):
        raise TypeError("adapter: a soft prompt cannot be merged: it stands before the tokens, and changes no weight")
    base = peft_model.get_base_model()
    configs = {id(config): config for config in (base.config, base.config.get_text_config())}.values()
    flags = [(config, config.tie_word_embeddings) for config in configs if hasattr(config, "tie_word_embeddings")]
    tied = dict(getattr(base, "all_tied_weights_keys", {}))
    _merge_tokens(peft_model)
    errors = _merge_layers(peft_model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that all is merged already, and what it thinks of tied weights
        merged = peft_model.merge_and_unload()
    for config, flag in flags:
        config.tie_word_embeddings = flag  # PEFT sets it from the first config alone
    errors.untied = _untie(merged, tied)
    return merged, errors


def _merge_tokens(peft_model: Any) -> None:
    """Rows that PEFT's trainable_token_indices replace."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    for layer in [module for module in peft_model.modules() if isinstance(module, TrainableTokensLayer)]:
        names = [name for name in layer.active_adapters if name in layer.token_indices]
        if names:
            layer._check_overlapping_tokens(names)
            layer.get_base_layer().weight = nn.Parameter(layer.get_merged_weights(names), requires_grad=False)
            layer.merged_adapters.extend(names)


def _merge_layers(peft_model: Any) -> Errors:
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    layers: dict[str, Any] = {name: one for name, one in peft_model.named_modules() if isinstance(one, LoraLayer)}
    variants = [name for name, layer in layers.items() if getattr(layer, "lora_variant", {}) and not _is_dora(layer)]
    if variants:
        raise TypeError(
            f"adapter: expected plain LoRA layers, or linear ones with one DoRA, {len(variants)} of {len(layers)} are others"
            f" (the first: {variants[0]}); PEFT's merge_and_unload merges them"
        )
    if not layers:  # PEFT merges what there is else
        return Errors(sum(isinstance(one, BaseTunerLayer) for one in peft_model.modules()), measured=False)
    errors = Errors()
    for name, layer in layers.items():
        if isinstance(layer.base_layer, AuxiliaryTrainingWrapper):  # LoRA over a head that follows trainable tokens
            layer.base_layer = layer.base_layer.unload_and_optionally_merge_module(True, False, None)
        base, weight_name = layer.get_base_layer(), getattr(layer, "parameter_name", "weight")
        weight = getattr(base, weight_name, None)
        if not isinstance(weight, Tensor) or not weight.dtype.is_floating_point or weight.dtype.itemsize < 2:
            raise TypeError(
                f"adapter: {name} stands over a {type(base).__name__}; expected one weight of 16 bits or more"
            )
        for adapter in [one for one in layer.active_adapters if one in layer.scaling]:
            # One layer at a time, so that a second copy of one weight is all that merging costs.
            if adapter in getattr(layer, "lora_variant", {}):
                base.weight = _scaled(f"{name}.weight", layer, adapter, errors)
                layer.merged_adapters.append(adapter)
                errors.layers += 1
                continue
            updates = {weight_name: layer.get_delta_weight(adapter)}
            if layer.lora_bias.get(adapter):
                updates["bias"] = layer.lora_B[adapter].bias * layer.scaling[adapter]
                if base.bias is None:
                    raise TypeError(f"adapter: {name} has a bias in its update (lora_bias) and none in its base")
            for changed, update in updates.items():
                setattr(base, changed, _added(f"{name}.{changed}", getattr(base, changed), update, errors))
            layer.merged_adapters.append(adapter)
            errors.layers += 1
    return errors


def _is_dora(layer: Any) -> bool:
    """Whether a layer is linear and its one adapter a DoRA, of which the merged weight is known."""
    from peft.tuners import lora
    from peft.tuners.lora.variants import DoraLinearVariant

    used = [one for one in layer.active_adapters if one in layer.scaling]
    plain = isinstance(layer, lora.Linear) and len(used) == 1 and not layer.lora_bias.get(used[0])
    return plain and all(type(one) is DoraLinearVariant for one in layer.lora_variant.values())


def _scaled(name: str, layer: Any, adapter: str, errors: Errors) -> nn.Parameter:
    """A DoRA layer's merged weight: m (W + s B A) / ‖W + s B A‖ by rows, or by columns where W lies by column."""
    weight, update = layer.get_base_layer().weight, layer.get_delta_weight(adapter)
    magnitude = layer.lora_magnitude_vector[adapter].weight.flatten()  # [N]
    if not layer.fan_in_fan_out:
        return _added(name, weight, update, errors, magnitude)
    merged = _added(name, weight.t(), update.t(), errors, magnitude)
    return nn.Parameter(merged.t().contiguous(), requires_grad=False)


def _added(name: str, weight: Tensor, update: Tensor, errors: Errors, magnitude: Tensor | None = None) -> nn.Parameter:
    """weight + update, its rows made as long as `magnitude` says, computed in float32 and rounded once, as a Parameter of its own."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    merged = _sum(weight, update, magnitude, wide).to(weight.dtype)
    if not merged.isfinite().all():
        raise ValueError(f"adapter: {name} would become infinite or NaN in {weight.dtype}")
    rows = max(1, BLOCK // max(1, weight[0].numel()))
    for start in range(0, len(weight), rows):
        block = slice(start, start + rows)
        old, length = weight[block].double(), None if magnitude is None else magnitude[block]
        exact = _sum(old, update[block], length, torch.float64)
        difference = merged[block].double() - exact
        errors.largest = max(errors.largest, difference.abs().max().item())
        errors.difference += difference.square().sum().item()
        errors.weight += exact.square().sum().item()
        errors.update += (update[block].double() if length is None else exact - old).square().sum().item()
    return nn.Parameter(merged, requires_grad=False)


def _sum(weight: Tensor, update: Tensor, magnitude: Tensor | None, dtype: torch.dtype) -> Tensor:
    found = weight.to(dtype) + update.to(dtype)
    if magnitude is None:
        return found
    return found * (magnitude.to(dtype) / torch.linalg.vector_norm(found, dim=1)).unsqueeze(1)


def _untie(model: Any, tied: Mapping[str, str]) -> tuple[str, ...]:
    """Tie again what is still equal, and give what is not its own memory, in the saved files, too. Returns the names of the latter.

    Args:
        tied: the name of each weight that was one with another, and that other's.
    """
    weights = dict(model.named_parameters(remove_duplicate=False))
    apart = tuple(name for name, source in tied.items() if not torch.equal(weights[name], weights[source]))
    still = {name: source for name, source in tied.items() if name not in apart}
    if apart and _can_say_untied(model.config):
        _say_untied(model.config)
        still = {}
    # Where the config cannot say it, transformers ties what the files do not hold twice with different values.
    for name, source in still.items():
        _put(model, name, weights[source])
    # The rest must share no memory: neither what has come apart, nor what transformers does not know of (layers that PEFT has replicated).
    holders: dict[int, nn.Module] = {}
    for name, weight in list(model.named_parameters(remove_duplicate=False)):
        holder = model.get_submodule(name.rpartition(".")[0])
        if name not in still and holders.setdefault(weight.data_ptr(), holder) is not holder:
            _put(model, name, nn.Parameter(weight.clone(), requires_grad=False))
    if apart:
        model.all_tied_weights_keys = still
    return apart


def _put(model: Any, name: str, weight: nn.Parameter) -> None:
    holder, _, own_name = name.rpartition(".")
    setattr(model.get_submodule(holder), own_name, weight)


def _say_untied(config: Any) -> None:
    config.tie_word_embeddings = False
    config.get_text_config().tie_word_embeddings = False


def _can_say_untied(config: Any) -> bool:
    """Whether the config, saved with tie_word_embeddings=False, is read again as that and nothing else: T5's means another scale by it."""
    untied = copy.deepcopy(config)
    _say_untied(untied)
    as_is, read_back = type(config).from_dict(config.to_dict()), type(config).from_dict(untied.to_dict())
    if read_back.tie_word_embeddings or read_back.get_text_config().tie_word_embeddings:
        return False
    _say_untied(as_is)
    return as_is.to_dict() == read_back.to_dict()


def _probes(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    config = model.config.get_text_config()
    length = min(PROBE_TOKENS, getattr(config, "max_position_embeddings", PROBE_TOKENS))
    return torch.randint(config.vocab_size, (PROBES, length), generator=generator).to(model.device)


@torch.no_grad()
def _logits(model: Any, input_ids: Tensor) -> Tensor:
    more = {"decoder_input_ids": input_ids} if model.config.is_encoder_decoder else {}
    return model.eval()(input_ids=input_ids, use_cache=False, **more).logits.float()
