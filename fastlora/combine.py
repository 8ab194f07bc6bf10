"""Several adapters made into one, by PEFT's `add_weighted_adapter`, and how far that one is from their weighted sum."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from fastlora import adapters, writing
from fastlora.adapters import Adapter, AdapterError
from fastlora.config import CombinationType, MajoritySignMethod
from fastlora.merge import MergeError
from fastlora.models import base_of, load_base
from fastlora.typed import listed, shown

SUMS = ("linear", "cat", "svd")
"""The combinations that are meant to be the weighted sum of the updates; the others leave parts of it out on purpose."""
PRUNED = tuple(name for name in get_args(CombinationType) if name not in SUMS)


@dataclass(frozen=True)
class CombineReport:
    combination_type: str
    adapters: int
    r: int  # the largest of the combined adapter's ranks
    layers: int
    sum_relative_error: (
        float | None
    )  # ‖merged - Σ wᵢ sᵢ Bᵢ Aᵢ‖ / ‖Σ wᵢ sᵢ Bᵢ Aᵢ‖ over all layers; None: no sum was wanted
    distance_from_sum: float | None  # the same measure of what leaves values out on purpose
    largest_layer_error: float | None
    layer_errors: dict[str, float]  # by layer
    cosines: list[
        float
    ]  # of the merged update with each adapter's, over all layers: how much of each is in it, as to direction
    output: str


def combine(
    model: str | None,
    folders: Sequence[str | Path],
    output: str | Path,
    *,
    weights: Sequence[float],
    combination_type: CombinationType,
    density: float | None = None,
    svd_rank: int | None = None,
    majority_sign_method: MajoritySignMethod = "total",
    seed: int = 0,
    overwrite: bool = False,
    allow_missing: bool = False,
    allow_noop: bool = False,
) -> CombineReport:
    """Write one LoRA adapter that stands for several, in PEFT's format; computed on the CPU, in float32.

    PEFT combines: `cat` is the weighted sum exactly, of all ranks together; `svd` the nearest to it of `svd_rank` (Eckart and Young 1936); `linear`
    adds A and B each, which is the sum only where the adapters are alike. `ties` (Yadav et al. 2023, TIES), `dare_linear`, `dare_ties` (Yu et al.
    2023, DARE) and `magnitude_prune` keep the share `density` of the values, and with `_svd` do so on the product B A.

    Args:
        model: the base: a folder or a hub id; None: the one that the first adapter names.
        folders: two or more, of plain LoRA adapters.
        weights: one number an adapter.
        density: above 0, at most 1: the share that is kept, where values are pruned.
        svd_rank: of the result, with `svd` and what ends in it; None: the largest of the adapters' ranks.
        majority_sign_method: of `ties` and `dare_ties`: total or frequency.
        seed: of what DARE drops.
        overwrite: replace the adapter in the output folder; never a source's own folder.
        allow_missing, allow_noop: as `load_model`'s; allow_noop also takes a sum that is zero.

    Raises:
        FileExistsError, BlockingIOError, OSError: as `merge`.
        ValueError: too few adapters or not one weight an adapter; an option that the combination does not have, or lacks; PEFT cannot combine these.
        AdapterError: an adapter's files are not what they should be, it is no plain LoRA, or it or the sum changes nothing.
        MergeError: the written adapter is not the combined one.
    """
    from peft import get_peft_model_state_dict

    output = Path(output)
    _check(folders, weights, combination_type, density, svd_rank)
    read = [adapters.read(folder) for folder in folders]
    for one in read:
        _require_plain(one)
    base = model or base_of(read)
    for folder in folders:
        writing.require_apart(output, adapter=folder, model=base)
    with writing.locked(output):
        writing.require_files(output)
        held = [name for name in writing.results(output) if name in writing.HEADS or name.endswith(".safetensors")]
        if held and not overwrite:
            raise FileExistsError(
                f"output={output} holds a model or an adapter already ({held[0]}): overwrite=True replaces it"
            )
        named = {f"adapter_{number}": one for number, one in enumerate(read)}
        loaded = load_base(base, torch.float32, torch.device("cpu"))
        peft_model = adapters.load(loaded, named, allow_missing=allow_missing, allow_noop=allow_noop)
        _name_layers(peft_model, list(named))
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(seed)
            peft_model.add_weighted_adapter(
                list(named),
                list(weights),
                "default",
                combination_type,
                svd_rank=svd_rank,
                svd_full_matrices=False,
                density=density,
                majority_sign_method=majority_sign_method,
            )
        ranks = _settle(peft_model)
        errors = _errors(peft_model, list(named), weights)
        cosines = [_cosine(peft_model, name) for name in named]
        if not allow_noop and not _changes_something(peft_model, list(named), weights):
            raise ValueError(
                f"weights={list(weights)}: the combined adapter changes nothing (allow_noop=True takes it)"
            )

        def fill(folder: Path) -> None:
            kept = get_peft_model_state_dict(peft_model, adapter_name="default", save_embedding_layers=False)
            peft_model.save_pretrained(folder, selected_adapters=["default"], save_embedding_layers=False)
            back = adapters.read(folder).tensors
            if back.keys() != kept.keys() or any(not torch.equal(back[key], kept[key]) for key in kept):
                raise MergeError(f"output={output}: reads back as another adapter; nothing was written")

        writing.publish(output, fill)
    is_sum = combination_type in SUMS
    by_layer = {name: (lost / wanted) ** 0.5 if wanted else 0.0 for name, (lost, wanted) in errors.items()}
    whole = sum(wanted for _, wanted in errors.values())
    distance = (sum(lost for lost, _ in errors.values()) / whole) ** 0.5 if whole else None
    return CombineReport(
        combination_type,
        len(read),
        max(ranks.values()),
        len(ranks),
        distance if is_sum else None,
        None if is_sum else distance,
        max(by_layer.values()) if is_sum else None,
        by_layer if is_sum else {},
        cosines,
        str(output),
    )


def _check(
    folders: Sequence[Any], weights: Sequence[float], combination_type: str, density: float | None, svd_rank: int | None
) -> None:
    types = get_args(CombinationType)
    if combination_type not in types:
        raise ValueError(f"combination_type={combination_type!r}: expected one of {listed(types)}")
    if len(folders) < 2:
        raise ValueError(f"combination_type={combination_type}: got {len(folders)} adapter, expected two or more")
    if len(weights) != len(folders) or not all(adapters.is_number(one) for one in weights):
        raise ValueError(f"weights={list(weights)}: expected {len(folders)} numbers, one an adapter")
    prunes, decomposes = combination_type in PRUNED, combination_type.endswith("svd")
    if prunes != (density is not None) or not 0 < (1.0 if density is None else density) <= 1:
        wanted = "a share above 0, at most 1" if prunes else f"none with combination_type={combination_type}"
        raise ValueError(f"density={density}: expected {wanted}")
    if svd_rank is not None and (not decomposes or not 1 <= svd_rank <= adapters.LARGEST_RANK):
        wanted = "a rank of at least 1" if decomposes else f"none with combination_type={combination_type}"
        raise ValueError(f"svd_rank={svd_rank}: expected {wanted}")


PLAIN: dict[str, Any] = {
    **dict.fromkeys(("lora_bias", "use_qalora"), False),
    **dict.fromkeys(("modules_to_save", "trainable_token_indices", "target_parameters"), None),
    "bias": "none",
}
"""What of a LoRA config must be so, for a weighted sum of A and B to be all of it."""


def _require_plain(adapter: Adapter) -> None:
    config, file = adapter.config, adapter.folder / adapters.CONFIG
    if config.peft_type != "LORA":
        raise AdapterError(file, "peft_type", f"expected LORA, got {config.peft_type.value}: it cannot be combined")
    variants = dict.fromkeys((one.name for one in fields(config) if one.metadata.get("is_lora_variant")), None)
    for key, plain in {**PLAIN, **variants}.items():
        value = getattr(config, key, plain)
        if value != plain and (value or plain):
            raise AdapterError(file, key, f"expected {plain!r} in an adapter that is combined, got {shown(value)}")


def _layers(peft_model: Any) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    for path, module in peft_model.named_modules():
        if isinstance(module, LoraLayer):
            yield path.removeprefix("base_model.model."), module


def _name_layers(peft_model: Any, names: Sequence[str]) -> None:
    """Have configs name their layers one by one where PEFT would take the first one's way of naming them for all: layers would be missing."""
    configs = [peft_model.peft_config[name] for name in names]
    if all(
        isinstance(one.target_modules, set) and one.layers_to_transform is None and not one.exclude_modules
        for one in configs
    ):
        return
    for name, config in zip(names, configs, strict=True):
        config.target_modules = {path for path, layer in _layers(peft_model) if name in layer.r}
        config.layers_to_transform = config.layers_pattern = config.exclude_modules = None


def _settle(peft_model: Any) -> dict[str, int]:
    """Have the combined adapter's config say what its tensors are, all with a scaling of 1; returns each layer's rank.

    PEFT copies rank stabilisation, by which the result would be scaled once more, and gives every layer the largest rank.
    """
    config = peft_model.peft_config["default"]
    config.use_rslora, config.inference_mode = False, True
    ranks = {}
    for path, layer in _layers(peft_model):
        if "default" in layer.r:
            layer.scaling["default"] = 1.0
            ranks[path] = len(_factors(layer, "default")[0])
    config.rank_pattern = {path: rank for path, rank in ranks.items() if rank != config.r}
    config.alpha_pattern = dict(config.rank_pattern)
    return ranks


Factors = tuple[Tensor, Tensor]


def _factors(layer: Any, name: str) -> Factors:
    """(A [R, K], s B [N, R]) of one adapter of a layer, in float64."""
    embedded = name in layer.lora_embedding_A
    a = layer.lora_embedding_A[name] if embedded else layer.lora_A[name].weight
    b = layer.lora_embedding_B[name] if embedded else layer.lora_B[name].weight
    return a.detach().flatten(1).double(), layer.scaling[name] * b.detach().flatten(1).double()


def _changes_something(peft_model: Any, names: Sequence[str], weights: Sequence[float]) -> bool:
    """Whether more is left of the updates than float32's rounding where they cancel."""
    left = parts = 0.0
    for _, layer in _layers(peft_model):
        left += _square_of_sum([_factors(layer, "default")]) if "default" in layer.r else 0.0
        own = [(weight, _factors(layer, name)) for name, weight in zip(names, weights, strict=True) if name in layer.r]
        parts += sum(weight**2 * _square_of_sum([factors]) for weight, factors in own)
    return left**0.5 > torch.finfo(torch.float32).eps * parts**0.5


def _errors(peft_model: Any, names: Sequence[str], weights: Sequence[float]) -> dict[str, tuple[float, float]]:
    """By layer, ‖merged - wanted‖² and ‖wanted‖², wanted being the weighted sum of the updates."""
    found = {}
    for path, layer in _layers(peft_model):
        merged = [_factors(layer, "default")] if "default" in layer.r else []
        own = [(weight, *_factors(layer, name)) for name, weight in zip(names, weights, strict=True) if name in layer.r]
        wanted = [(a, weight * b) for weight, a, b in own]
        found[path] = (_square_of_sum([*merged, *((a, -b) for a, b in wanted)]), _square_of_sum(wanted))
    return found


def _cosine(peft_model: Any, name: str) -> float:
    """⟨merged, s B A⟩ / (‖merged‖ ‖s B A‖) over all layers of both updates; 0 where one of them is zero."""
    product = merged = own = 0.0
    for _, layer in _layers(peft_model):
        found = {one: _factors(layer, one) for one in ("default", name) if one in layer.r}
        merged += _square_of_sum([found["default"]]) if "default" in found else 0.0
        own += _square_of_sum([found[name]]) if name in found else 0.0
        if len(found) == 2:
            (a, b), (other_a, other_b) = found.values()
            product += ((b.t() @ other_b) * (a @ other_a.t())).sum().item()
    return product / (merged * own) ** 0.5 if merged and own else 0.0


def _square_of_sum(terms: Sequence[Factors]) -> float:
    """‖Σ B A‖² of A [R, K] and B [N, R], by the triangles of both sides' QR: exact to float64's rounding also where terms cancel."""
    right = torch.linalg.qr(torch.cat([a for a, _ in terms]).t(), mode="r").R
    left = torch.linalg.qr(torch.cat([b for _, b in terms], dim=1), mode="r").R
    return (left @ right.t()).square().sum().item()
