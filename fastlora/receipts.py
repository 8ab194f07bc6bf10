"""What the adapters on a model change, and by how much: the commonest fault of an adapter is a valid file that silently does nothing.

`receipt(model)` looks at a PEFT model as it is, accelerated or not, and changes nothing. Where fastlora has loaded an adapter (adapters.py) the
receipt also knows its files, by their hashes.
"""

import functools
import hashlib
import re
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from fastlora.typed import listed

BLOCK = 1 << 22  # elements of a weight that are looked at once: a copy in float64 is large


@dataclass(frozen=True)
class LayerReceipt:
    """What one adapter does to one layer. Norms are Frobenius', in float64."""

    name: str
    method: (
        str  # LoRA, DoRA, IA3, copy (modules_to_save), tokens, norm, prompt, or PEFT's class where it is none of these
    )
    r: int | None
    dtype: str  # the adapter's
    changes: bool | None  # None: not known
    norm: float | None = None  # of W' - W, W' being the weight with the adapter; a prompt's own
    weight_norm: float | None = None  # of W; None: there is none, or `note` says why it is not known
    merge_error: float | None = (
        None  # ‖round(W') - W'‖ / ‖W' - W‖ in W's dtype, where that has 16 bits: what merging would lose
    )
    note: str = ""

    @property
    def change(self) -> float | None:
        """‖W' - W‖ / ‖W‖."""
        return self.norm / self.weight_norm if self.norm is not None and self.weight_norm else None


@dataclass(frozen=True)
class Source:
    """The files of an adapter."""

    folder: str
    hashes: Mapping[str, str]  # SHA-256, by file name
    unmatched: tuple[str, ...]  # keys in the file that are nothing of this adapter's on this model
    missing: tuple[str, ...]  # keys of the adapter that the file lacks: they are as PEFT begins


@dataclass(frozen=True)
class AdapterReceipt:
    name: str
    method: str  # PEFT's name
    dtypes: tuple[str, ...]
    layers: tuple[LayerReceipt, ...]
    absent: tuple[str, ...]  # what the config names and the model lacks
    source: Source | None  # None: PEFT has loaded or made it

    @property
    def changes_nothing(self) -> bool:
        """Whether the model computes the same without it; False also where that is not known."""
        return all(layer.changes is False for layer in self.layers)

    @property
    def change(self) -> float | None:
        """‖W' - W‖ / ‖W‖ over all layers where both are known."""
        known = [(one.norm, one.weight_norm) for one in self.layers if one.norm is not None and one.weight_norm]
        whole = sum(weight**2 for _, weight in known)
        return (sum(norm**2 for norm, _ in known) / whole) ** 0.5 if whole else None

    @property
    def merge_error(self) -> float | None:
        """The part of the update that rounding would lose, over all layers with 16-bit weights."""
        known = [(one.norm, one.merge_error) for one in self.layers if one.norm and one.merge_error is not None]
        whole = sum(norm**2 for norm, _ in known)
        return (sum((norm * error) ** 2 for norm, error in known) / whole) ** 0.5 if whole else None


@dataclass(frozen=True)
class Receipt:
    """What each adapter on a model changes; prints as a table."""

    model: str  # its class
    adapters: tuple[AdapterReceipt, ...] = field(default=())

    def __str__(self) -> str:
        return "\n\n".join("\n".join(_lines(one)) for one in self.adapters)


HEADINGS = ("layer", "method", "r", "dtype", "‖W'-W‖/‖W‖", "merging loses", "")


def _lines(one: AdapterReceipt) -> Iterator[str]:
    changed = sum(layer.changes is not False for layer in one.layers)
    dtypes = f", {' and '.join(one.dtypes)}" if one.dtypes else ""
    yield f"adapter {one.name!r}: {one.method}{dtypes}: " + (
        "changes nothing" if one.changes_nothing else f"changes {changed} of {len(one.layers)} layers"
    )
    if one.change is not None:
        yield f"  ‖W'-W‖/‖W‖ over all layers: {one.change:.3g}"
    if one.merge_error is not None:
        yield f"  merging into the 16-bit weights would lose {100 * one.merge_error:.2g} % of the update"
    if one.source is None:
        yield "  files: not known, fastlora has not loaded it; receipt(model, {NAME: FOLDER}) looks"
    else:
        yield f"  files: {one.source.folder}"
        yield from (f"    sha256 {value}  {name}" for name, value in one.source.hashes.items())
        for what, keys in (("not matched", one.source.unmatched), ("missing in the file", one.source.missing)):
            if keys:
                yield f"  keys {what}: {listed(list(keys))}"
    yield from (f"  absent: {name}" for name in one.absent)
    rows = [HEADINGS, *map(_row, one.layers)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    for row in rows:
        yield "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _row(layer: LayerReceipt) -> tuple[str, ...]:
    change = "" if layer.change is None else f"{layer.change:.3g}"
    lost = "" if layer.merge_error is None else f"{100 * layer.merge_error:.2g} %"
    norm = f"norm {layer.norm:.3g}" if layer.change is None and layer.norm is not None else ""
    note = "; ".join(part for part in (norm, layer.note) if part)
    return layer.name, layer.method, "" if layer.r is None else str(layer.r), layer.dtype, change, lost, note


_sources: "weakref.WeakKeyDictionary[nn.Module, dict[str, Source]]" = weakref.WeakKeyDictionary()
"""By model, and outside of it: no copy, pickle or state dict sees them."""


def note(model: nn.Module, adapter_name: str, source: Source | None) -> None:
    """Remember from which files an adapter came; None: it has gone."""
    from fastlora.peft import silent  # PEFT is imported by those who need it: a command first makes it silent

    sources, judged = _sources.setdefault(model, {}), silent.judged.setdefault(model, set())
    if source is None:
        sources.pop(adapter_name, None)
        judged.discard(adapter_name)
    else:
        sources[adapter_name] = source
        judged.add(adapter_name)


def file_hash(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def receipt(model: nn.Module, folders: Mapping[str, str | Path] | None = None) -> Receipt:
    """What each adapter on the model changes; print it for a table.

    For LoRA the change is ‖s B A‖ / ‖W‖, by way of matrices of the rank's size; no B A is made but by blocks of rows, to see what merging into a
    16-bit weight would round off. The model stays as it is, and nothing is multiplied by its weights.

    Args:
        model: a model with PEFT's adapters: LoRA and DoRA, IA³, layer norms, trainable tokens, whole modules, soft prompts. Layers of other methods
            are named, and not measured.
        folders: by adapter name, the folders of adapters that PEFT has loaded: their keys are compared, and their files hashed. Those that fastlora
            has loaded are known.

    Raises:
        ValueError: the model has no adapters, or none of a name in folders.
        OSError: a file cannot be read.
    """
    configs: Mapping[str, Any] = getattr(model, "peft_config", None) or {}
    if not configs:
        raise ValueError("model: has no adapters, expected a PEFT model")
    folders = {} if folders is None else folders
    for name in folders:
        if name not in configs:
            raise ValueError(f"folders: got {name!r}, expected the model's adapters {listed(list(configs))}")
    sources = {**_sources.get(model, {}), **{name: _look(model, name, Path(at)) for name, at in folders.items()}}
    weights, wrapped = _Norms(), cast(Any, model)
    return Receipt(
        type(wrapped.get_base_model() if hasattr(wrapped, "get_base_model") else wrapped).__name__,
        tuple(_of_adapter(model, name, config, sources.get(name), weights) for name, config in configs.items()),
    )


def _look(model: Any, name: str, folder: Path) -> Source:
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    files = [folder / "adapter_config.json", folder / "adapter_model.safetensors"]
    with safe_open(files[1], "pt") as content:
        given = set(content.keys())
    expected = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False).keys()
    hashes = {file.name: file_hash(file) for file in files}
    return Source(str(folder), hashes, tuple(sorted(given - expected)), tuple(sorted(expected - given)))


@torch.no_grad()
def _of_adapter(model: nn.Module, name: str, config: Any, source: Source | None, weights: "_Norms") -> AdapterReceipt:
    layers = tuple(_layers(model, name, config, weights))
    dtypes = tuple(sorted({layer.dtype for layer in layers if layer.dtype}))
    method = str(getattr(config.peft_type, "value", config.peft_type))
    return AdapterReceipt(name, method, dtypes, layers, tuple(_absent(config, layers)), source)


def _layers(model: nn.Module, adapter: str, config: Any, weights: "_Norms") -> Iterator[LayerReceipt]:
    from peft.tuners.ia3 import IA3Layer
    from peft.tuners.ln_tuning.layer import LNTuningLayer
    from peft.tuners.lora import LoraLayer
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    for path, module in model.named_modules():
        name = path.removeprefix("base_model.model.")
        one: Any = module
        if isinstance(module, LoraLayer):
            if adapter in one.r:
                yield _of_lora(name, one, adapter, weights)
        elif isinstance(module, IA3Layer):
            if adapter in one.ia3_l:
                yield _of_ia3(name, one, adapter, weights)
        elif isinstance(module, LNTuningLayer):
            if adapter in one.ln_tuning_layers:
                yield _of_copy(name, "norm", *_norms_of(one, adapter))
        elif isinstance(module, TrainableTokensLayer):
            if adapter in one.trainable_tokens_delta:
                yield _of_tokens(name.removesuffix(".token_adapter"), one, adapter, weights)
        elif isinstance(module, ModulesToSaveWrapper):
            if adapter in one.modules_to_save:
                yield _of_copy(name, "copy", one.original_module, one.modules_to_save[adapter])
        elif isinstance(module, BaseTunerLayer):
            tables: list[Any] = [getattr(one, part, None) for part in one.adapter_layer_names]
            if any(isinstance(part, (nn.ModuleDict, nn.ParameterDict)) and adapter in part for part in tables):
                yield LayerReceipt(name, type(one).__name__, None, "", None, note="not measured: another method")
    prompts: Any = getattr(model, "prompt_encoder", None)
    if config.is_prompt_learning and isinstance(prompts, nn.ModuleDict) and adapter in prompts:
        own = list(prompts[adapter].parameters())
        norm = sum(_square(one) for one in own) ** 0.5
        # Tokens of nothing are attended to as well.
        yield LayerReceipt(
            "prompt", "prompt", None, _dtypes(own), True, norm, note=f"{config.num_virtual_tokens} tokens"
        )


class Part(NamedTuple):
    """W [N, K], and what is added to it: s B A, A being [R, K] and B [N, R]."""

    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor


def _of_lora(name: str, layer: Any, adapter: str, weights: "_Norms") -> LayerReceipt:
    variant = layer.lora_variant.get(adapter)
    kind = "LoRA" if variant is None else type(variant).__name__.removesuffix("LinearVariant")
    embedded = adapter in layer.lora_embedding_A
    a: Tensor = layer.lora_embedding_A[adapter] if embedded else layer.lora_A[adapter].weight
    b: Tensor = layer.lora_embedding_B[adapter] if embedded else layer.lora_B[adapter].weight
    bias = None if embedded else layer.lora_B[adapter].bias
    told = functools.partial(LayerReceipt, name, {"Dora": "DoRA"}.get(kind, kind), layer.r[adapter], _dtypes([a, b]))
    if kind not in ("LoRA", "Dora"):
        return told(None, note=f"not measured: a {kind} variant")
    if a.is_meta or b.is_meta:
        return told(None, note="the adapter has no values (on the meta device)")
    held = list(layer.merged_adapters)
    notes = [f"merged: W holds {listed(held)}; what rounding lost is not known any more"] if held else []
    if bias is not None:
        notes.append(f"with a bias of norm {abs(layer.scaling[adapter]) * _square(bias) ** 0.5:.3g}")
    scale, matrices = layer.scaling[adapter], _matrices(layer, a, b)
    norm: float = abs(scale) * sum(_square_of_product(*one) for one in matrices) ** 0.5
    changes = norm != 0 or (bias is not None and bool(bias.any()))
    own: Any = layer.get_param() if hasattr(layer, "get_param") else getattr(layer.get_base_layer(), "weight", None)
    weight = own if hasattr(layer, "get_param") else _dequantised(layer)
    obstacle = _obstacle(weight)
    parts = None if obstacle else _parts(layer, weight, matrices, embedded)
    if parts is None:
        notes.append(obstacle or f"not measured: the weight has shape {list(weight.shape)}")
        known = kind == "LoRA"  # a DoRA is nothing without its W
        return told(changes if known else None, norm if known else None, note="; ".join(notes))
    if held:
        merged = [_merged_part(layer, weight, one, embedded) for one in held]
        if kind != "LoRA" or any(one is None for one in merged):
            notes.append("not measured: W as it was is not known")
            return told(changes if kind == "LoRA" else None, norm if kind == "LoRA" else None, note="; ".join(notes))
        return told(changes, norm, _norm_without([one for one in merged if one is not None]), None, "; ".join(notes))
    error = None
    if kind == "Dora":
        magnitude = layer.lora_magnitude_vector[adapter].weight.flatten()
        norm, error = _walk(parts, functools.partial(_with_magnitudes, magnitude), scale)
        # Magnitudes begin as W's norms, rounded: that is no change.
        short = weight is not own or any(one.dtype.itemsize == 2 for one in (magnitude, weight))
        changes = changes or norm > (1e-2 if short else 1e-5) * weights.of(own, weight)
    elif norm and own.dtype.itemsize == 2:
        error = _walk(parts, lambda start, rows, update: rows + update, scale)[1]
    rounds = weight is own and own.dtype.itemsize == 2  # what is merged into a quantised weight is quantised anew
    return told(changes, norm, weights.of(own, weight), error if rounds else None, "; ".join(notes))


def _norms_of(layer: Any, adapter: str) -> tuple[nn.Module, nn.Module]:
    """The base's norm, and the adapter's: PEFT merges one by exchanging the two."""
    merged = next(iter(layer.merged_adapters), None)  # there is one at most
    base = layer.base_layer if merged is None else layer.ln_tuning_layers[merged]
    return base, layer.base_layer if adapter == merged else layer.ln_tuning_layers[adapter]


def _merged_part(layer: Any, weight: Tensor, adapter: str, embedded: bool) -> tuple[float, list[Part]] | None:
    """The scale and matrices that a merged adapter has added to W; None where it has done something else."""
    if layer.lora_variant.get(adapter) is not None:
        return None
    a = layer.lora_embedding_A[adapter] if embedded else layer.lora_A[adapter].weight
    b = layer.lora_embedding_B[adapter] if embedded else layer.lora_B[adapter].weight
    parts = _parts(layer, weight, _matrices(layer, a, b), embedded)
    return None if parts is None else (layer.scaling[adapter], parts)


def _norm_without(merged: list[tuple[float, list[Part]]]) -> float:
    """‖W‖ less what the merged adapters have added to it, a block of rows at a time."""
    total = 0.0
    for same in zip(*(parts for _, parts in merged), strict=True):
        weight = same[0].weight
        rows = max(1, BLOCK // weight.shape[1])
        for start in range(0, len(weight), rows):
            block = weight[start : start + rows].double()
            for (scale, _), part in zip(merged, same, strict=True):
                block -= scale * (part.lora_b[start : start + rows].double() @ part.lora_a.double())
            total += block.square().sum().item()
    return total**0.5


def _matrices(layer: Any, a: Tensor, b: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(A [R, K], B [N, R]) of a layer, or of each of a mixture's experts."""
    experts = getattr(layer, "num_experts", 1)
    if experts == 1:
        return [(a.flatten(1), b.flatten(1))]
    by_expert_a = a.reshape(experts, -1, a.shape[-1])  # [E, R, K]
    by_expert_b = b.reshape(b.shape[0], -1, experts)  # [N, R, E]
    return [(by_expert_a[e], by_expert_b[..., e]) for e in range(experts)]


def _parts(layer: Any, weight: Tensor, matrices: list[tuple[Tensor, Tensor]], embedded: bool) -> list[Part] | None:
    """W as [N, K] beside each A and B; None where it has another shape, as a convolution by groups has."""
    if hasattr(layer, "get_param") and layer.num_experts > 1:
        found = [weight[e] if layer._did_swap_in_out_features else weight[e].t() for e in range(layer.num_experts)]
    else:
        turned = embedded or getattr(layer, "fan_in_fan_out", False)
        found = [weight.flatten(1).t() if turned else weight.flatten(1)]
    parts = [Part(one, a, b) for one, (a, b) in zip(found, matrices, strict=True)]
    return parts if all(one.weight.shape == (one.lora_b.shape[0], one.lora_a.shape[1]) for one in parts) else None


def _walk(parts: list[Part], changed: Any, scale: float) -> tuple[float, float | None]:
    """‖W' - W‖, and ‖round(W') - W'‖ over that, a block of rows at a time.

    changed: (first row, rows of W, rows of s B A) -> rows of W', all in float64.
    """
    update = lost = 0.0
    for weight, a, b in parts:
        wide_a = a.double()
        rows = max(1, BLOCK // weight.shape[1])
        for start in range(0, len(weight), rows):
            old = weight[start : start + rows].double()
            new = changed(start, old, scale * (b[start : start + rows].double() @ wide_a))
            update += (new - old).square().sum().item()
            lost += (new.to(weight.dtype).double() - new).square().sum().item()
    return update**0.5, (lost / update) ** 0.5 if update else None


def _with_magnitudes(magnitude: Tensor, start: int, rows: Tensor, update: Tensor) -> Tensor:
    new = rows + update
    own = magnitude[start : start + len(rows)].double()
    return new * (own / torch.linalg.vector_norm(new, dim=1)).unsqueeze(1)


def _of_ia3(name: str, layer: Any, adapter: str, weights: "_Norms") -> LayerReceipt:
    factors: Tensor = layer.ia3_l[adapter]
    told = functools.partial(LayerReceipt, name, "IA3", None, _dtypes([factors]), bool((factors != 1).any()))
    own: Any = getattr(layer.get_base_layer(), "weight", None)
    weight = _dequantised(layer)
    obstacle = _obstacle(weight)
    if not obstacle and layer.merged_adapters:
        obstacle = f"not measured: merged, W holds the factors of {listed(list(layer.merged_adapters))}"
    if obstacle:
        return told(note=obstacle)
    matrix = weight.flatten(1).t() if getattr(layer, "fan_in_fan_out", False) else weight.flatten(1)
    wide = factors.flatten().double()
    if matrix.shape[1 if layer.is_feedforward else 0] != len(wide):
        return told(note=f"not measured: the weight has shape {list(weight.shape)}")

    def scaled(start: int, rows: Tensor, _: Tensor) -> Tensor:
        return rows * (wide if layer.is_feedforward else wide[start : start + len(rows)].unsqueeze(1))

    nothing = matrix.new_zeros(0, matrix.shape[1]), matrix.new_zeros(matrix.shape[0], 0)
    norm, error = _walk([Part(matrix, *nothing)], scaled, 1.0)
    return told(norm, weights.of(own, weight), error if weight is own and own.dtype.itemsize == 2 else None)


def _of_copy(name: str, method: str, original: nn.Module, own: nn.Module) -> LayerReceipt:
    """A whole module of the adapter's in the place of the base's."""
    before, after = dict(original.named_parameters()), dict(own.named_parameters())
    told = functools.partial(LayerReceipt, name, method, None, _dtypes(after.values()))
    obstacle = next((text for one in before.values() if (text := _obstacle(one))), None)
    if obstacle:
        return told(None, note=obstacle)
    if before.keys() != after.keys() or any(before[key].shape != after[key].shape for key in before):
        return told(True, note="it has other weights than the base's")
    norm = sum(_square(after[key], before[key]) for key in before) ** 0.5
    return told(norm != 0, norm, sum(map(_square, before.values())) ** 0.5)


def _of_tokens(name: str, layer: Any, adapter: str, weights: "_Norms") -> LayerReceipt:
    rows: Tensor = layer.trainable_tokens_delta[adapter]
    weight, tokens = layer.get_base_layer().weight, layer.token_indices[adapter]
    told = functools.partial(LayerReceipt, name, "tokens", None, _dtypes([rows]))
    obstacle = _obstacle(weight)
    if obstacle:
        return told(None, note=f"{len(tokens)} tokens; {obstacle}")
    merged = adapter in layer.merged_adapters
    before = layer.trainable_tokens_original[adapter] if merged else weight[tokens]
    norm = _square(rows, before) ** 0.5
    return told(norm != 0, norm, weights.of(weight), note=f"{len(tokens)} tokens{', merged' if merged else ''}")


def _dequantised(layer: Any) -> Any:
    """The weight of the layer's base; a copy in memory of a quantised one, where its elements can be read on a CPU."""
    from fastlora.peft import quantised

    base = layer.get_base_layer()
    found = quantised.base_of(base)
    return found.weight() + 0 if isinstance(found, quantised.Base) else getattr(base, "weight", None)


def _obstacle(weight: Any) -> str | None:
    """Why a weight cannot be measured, or None."""
    if not isinstance(weight, Tensor):
        return "it has no one weight"
    if weight.device.type == "meta":
        return "the weight is absent (on the meta device)"
    if type(weight) not in (Tensor, nn.Parameter):
        return f"the weight is quantised or sharded ({type(weight).__name__}): its norm is not known"
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:
        return f"the weight is quantised ({_name(weight.dtype)}): its norm is not known"
    return None


def _square_of_product(a: Tensor, b: Tensor) -> float:
    """‖B A‖² = tr(Bᵀ B A Aᵀ), of A [R, K] and B [N, R]."""
    a, b = a.double(), b.double()
    return max(0.0, ((b.t() @ b) * (a @ a.t())).sum().item())


def _square(tensor: Tensor, less: Tensor | None = None) -> float:
    """‖tensor - less‖², a block at a time."""
    flat, other = tensor.detach().flatten(), None if less is None else less.detach().flatten()
    total = 0.0
    for start in range(0, flat.numel(), BLOCK):
        part = flat[start : start + BLOCK].double()
        total += (part if other is None else part - other[start : start + BLOCK].double()).square().sum().item()
    return total


class _Norms:
    """‖W‖ of each weight, asked for once for every adapter."""

    def __init__(self) -> None:
        self._found: dict[int, float] = {}

    def of(self, own: Tensor, weight: Tensor | None = None) -> float:
        """weight: what is measured in its place, of a quantised one."""
        if id(own) not in self._found:
            self._found[id(own)] = _square(own if weight is None else weight) ** 0.5
        return self._found[id(own)]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtypes(tensors: Any) -> str:
    return ", ".join(sorted({_name(one.dtype) for one in tensors}))


def _absent(config: Any, layers: tuple[LayerReceipt, ...]) -> Iterator[str]:
    """What a config names, and no layer of the adapter's answers to."""
    named = [layer.name for layer in layers if layer.method not in ("copy", "tokens", "prompt")]
    copies = [layer.name for layer in layers if layer.method == "copy"]

    def unanswered(key: str, names: list[str]) -> Iterator[str]:
        wanted = getattr(config, key, None) or ()
        for one in () if isinstance(wanted, str) else sorted(wanted):
            if not any(name == one or name.endswith(f".{one}") for name in names):
                yield f"{key} {one!r} matches no layer"

    yield from unanswered("target_modules", named)
    yield from unanswered("modules_to_save", copies)
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in sorted(getattr(config, key, None) or {}):
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in named):
                yield f"{key} {pattern!r} matches no layer"
    numbers = getattr(config, "layers_to_transform", None)
    for number in [numbers] if isinstance(numbers, int) else numbers or ():
        if not any(f".{number}." in f".{name}." for name in named):
            yield f"layers_to_transform {number} matches no layer"
