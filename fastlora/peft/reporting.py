"""What computes each layer of a model, and why, in words: of its last call, of calls before, and of what stands in the way of the next."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import Embedding, LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastlora import checks, fusion, model_loss, ops, sharing
from fastlora.bottleneck import BottleneckLayer
from fastlora.frozen import composed, products
from fastlora.operators import frozen_linear, lora_linear
from fastlora.packing import is_compiled
from fastlora.peft import embeddings, experts, obstacles, prompts, quantised, scaled, siblings
from fastlora.peft.layers import (
    NOT_CALLED,
    OWN_FORWARD,
    ROWS_BEFORE_ANY_CALL,
    SEEN,
    FrozenLinear,
    FrozenQuantised,
    Seen,
    frozen_base,
)

BOTTLENECK = (
    "a bottleneck adapter around a sublayer, two small products in plain PyTorch; the sublayer's parts are told apart"
)
NOT_OBSERVED = "compiled: not observed"


def linear_weight(base: nn.Module, dtype: torch.dtype | None = None) -> Tensor:  # [N, K]
    """The weight that a layer multiplies by, for an x of that dtype."""
    weight = obstacles.multiplied(base, dtype)
    if checks.is_sharded(weight):  # as the layer has it in a call
        weight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    return weight.t() if isinstance(base, Conv1D) else weight


class LayerReport(NamedTuple):
    """One LoRA layer, one frozen layer that was swapped, the loss, or parts of a model that are alike: what computes it and why.

    name: the layer's in the model; the loss's is that of the transformers model that computes it, and `loss`.
    implementation: one of `ops.IMPLEMENTATIONS`, that of the last call ("reference" where that was PEFT's own forward), or "peft" where the class
        was not swapped. Before any call it is a guess, for 512 rows. Calls that torch.compile has compiled are not observed.
        The loss's is `fused`, `labelled` or `all`, as of LanguageModelLoss. That of norms, MLPs and attention (fusion.py), which are told together,
        is "transformers" where they run their own forward.
    """

    name: str
    implementation: str
    reason: str


class Report(list[LayerReport]):
    """The LayerReports of a model; prints as a table."""

    def __str__(self) -> str:
        rows = [LayerReport._fields, *self]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        )


def report(model: nn.Module) -> Report:
    """What computes each LoRA layer of the model, each frozen layer that was swapped, the loss and what was fused, and why; print it for a table.

    It tells of the last call that was not compiled, and what differs from it: calls before, and what stands in the way of the next.
    """
    return Report([*layers(model), *(LayerReport(*one) for one in fusion.describe(model))])


def layers(model: nn.Module) -> list[LayerReport]:
    """`report`, without the parts that are told together."""
    prefixes = tuple(f"{name}." if name else "" for name, module in model.named_modules() if is_compiled(module))
    found: list[LayerReport] = []
    for name, module in model.named_modules():
        compiled = f"{name}.".startswith(prefixes)
        if isinstance(module, experts.ParamWrapper) and name.endswith("base_layer"):
            around = found[-1]  # the wrapper around this one, which computes both
            told = f"with {around.name}" if around.implementation != "peft" else around.reason
            found.append(LayerReport(name, around.implementation, told))
        elif isinstance(module, Embedding):
            found.append(LayerReport(name, *embeddings.describe(module)))
        elif isinstance(module, (LoraLayer, FrozenLinear, FrozenQuantised)):
            found.append(LayerReport(name, *_explain(module, compiled)))
        elif isinstance(module, BottleneckLayer):
            found.append(LayerReport(name, "reference", BOTTLENECK))
        elif isinstance(module, BaseTunerLayer) and not name.endswith(".token_adapter"):  # trainable_token_indices
            found.append(LayerReport(name, *scaled.describe(module)))
        for key, what in ((prompts.KEY, "prompt"), (sharing.KEY, "share_prefix")):
            if key in module.__dict__:
                found.append(
                    LayerReport(
                        f"{name}.{what}".lstrip("."), *module.__dict__[key].describe("forward" in module.__dict__)
                    )
                )
        below = module.__dict__.get(sharing.BELOW)
        if below is not None and below.last is not None and below.last[0] != sharing.APART:  # else it had nothing to do
            found.append(LayerReport(f"{name}.share_prefix".lstrip("."), *below.last))
        if model_loss.KEY in module.__dict__:
            path, reason = module.__dict__[model_loss.KEY].describe(replaced="forward" in module.__dict__)
            reason = f"{NOT_OBSERVED}; in its last eager call {reason}" if compiled else reason
            found.append(LayerReport(f"{name}.loss".lstrip("."), path, reason))
    return found


@contextmanager
def unobserved(model: nn.Module) -> Iterator[None]:
    """What `report` says of the model's last calls stays as it is, whatever is called inside."""
    modules, keys = list(model.modules()), (SEEN, OWN_FORWARD, fusion.SEEN)
    seen = [{key: module.__dict__[key] for key in keys if key in module.__dict__} for module in modules]
    states: list[sharing.State] = [
        module.__dict__[key]
        for module in modules
        for key in (prompts.KEY, sharing.KEY, sharing.BELOW)
        if key in module.__dict__
    ]
    last = [state.last for state in states]
    try:
        yield
    finally:
        for module, before in zip(modules, seen, strict=True):
            for key in keys:
                module.__dict__.pop(key, None)
            module.__dict__.update(before)
        for state, call in zip(states, last, strict=True):
            state.last = call


def obstacle_of(layer: Any) -> str | None:
    """Why the class of a LoRA layer is not swapped, or None."""
    return embeddings.swap_obstacle(layer) if isinstance(layer, Embedding) else experts.obstacle_of(layer)


def _explain(layer: Any, compiled: bool) -> tuple[str, str]:
    """(implementation, reason) of a layer; compiled: torch.compile may run it, which nobody observes."""
    base = frozen_base(layer) or experts.swapped_base(layer)
    if base is None:
        return "peft", experts.obstacle_of(layer) or "not accelerated: call fastlora.accelerate(model)"
    own_name = "its own forward" if isinstance(layer, FrozenQuantised) else "nn.Linear's own forward"
    plain = own_name if base is layer else "PEFT's own forward"
    seen, own = layer.__dict__.get(SEEN), layer.__dict__.get(OWN_FORWARD)
    obstacle = _present_obstacle(layer, base, seen)
    if own is not None and own.before is seen:  # the last call
        gone = "" if own.passing or own.obstacle == obstacle else f", now {obstacle or 'no longer'}"
        reason = f"{plain}: {own.obstacle}{gone}"
        if seen is not None:
            before, why = _describe(layer, base, seen)
            reason += f"; before, {before}, {why}"
        return "reference", f"{NOT_OBSERVED}; in its last eager call {reason}" if compiled else reason
    in_pieces = (
        obstacle == obstacles.IN_PIECES
    )  # after `accelerate`, which leaves such layers to PEFT: FSDP2 makes it whole in a call
    if in_pieces:
        obstacle = None
    if obstacle is not None and seen is None:
        return "reference", f"{NOT_OBSERVED if compiled else NOT_CALLED}; {plain}: {obstacle}"
    implementation, reason = _describe(layer, base, seen or _before_any_call(layer, base, compiled), compiled)
    if in_pieces:
        reason += "; sharded between calls"
    if own is not None:
        reason += f"; earlier also {plain}: {own.obstacle}"
    if obstacle is not None:
        reason += f"; from now on {plain}: {obstacle}"
    if compiled:
        reason = f"{NOT_OBSERVED}; {'a guess' if seen is None else 'its last eager call'}, {reason}"
    elif seen is None:
        reason = f"{NOT_CALLED}; {reason}"
    return implementation, reason


def _present_obstacle(layer: Any, base: Any, seen: Seen | None) -> str | None:
    """Why the next call will run the forward of the layer's own class, as far as the layer tells, or None."""
    if isinstance(layer, FrozenQuantised):
        found = quantised.base_of(layer)
        return found if isinstance(found, str) else None
    if base is layer:
        return obstacles.weight_obstacle(layer.weight, layer.bias)
    if isinstance(layer, experts.ParamWrapper):
        lasting = experts.lasting_plan(layer)
        return lasting if isinstance(lasting, str) else None
    mixed = seen is not None and seen.mixed
    plan = obstacles.lasting_plan(layer, list(layer.lora_A) if mixed else obstacles.used_adapters(layer, None))
    return plan if isinstance(plan, str) else None


def _describe(layer: Any, base: Any, seen: Seen, compiled: bool = False) -> tuple[str, str]:
    """(implementation, reason) of a fused call."""
    of_experts = isinstance(layer, experts.ParamWrapper)
    weight = experts.weight_of(base) if of_experts else linear_weight(base, seen.dtype)
    if of_experts and seen.shared:
        return "reference", "all experts at once, by torch's grouped products"
    rows = math.prod(seen.shape[:-1])
    like_x = siblings.like_rows(seen.shape, weight, seen.dtype)
    family = layer.__dict__.get(siblings.KEY)
    shared = seen.shared and family is not None and family.dissolved is None

    def chosen(backward: bool) -> tuple[ops.Choice, bool]:
        """The choice, and whether it runs the layer's family together."""
        if shared:
            first = linear_weight(frozen_base(family.layers[0]), seen.dtype)
            return lora_linear.choose_shared(like_x, first, seen.dropout, backward, mixed=seen.mixed)
        if base is layer:
            return frozen_linear.choose(like_x, weight, backward), False
        return lora_linear.choose(like_x, weight, seen.dropout, backward, mixed=seen.mixed), False

    try:
        (implementation, reason, _), together = chosen(backward=False)
    except ops.ImplementationError as error:
        return str(ops.forced), f"cannot run: {error}"
    each = f" for each of {base.num_experts} experts" if of_experts else ""
    reason = f"{rows} row{'s' * (rows != 1)}{each}: {reason}"
    if implementation == "cpu":
        fused = base is not layer and not seen.dropout
        reason += f"; x Wᵀ by {products.describe(weight, seen.dtype, rows, fused)}"
        if base is not layer and not seen.mixed:
            rank = max((layer.r[name] for name in obstacles.used_adapters(layer, None)), default=1)
            adapter = composed.describe(like_x, weight, rank, seen.dropout)
            reason += f"; {adapter}" if adapter else ""
    if family is not None and (seen.shared or not seen.mixed):
        few = siblings.are_few(seen.shape, weight.device)
        reason += f"; {family.describe(layer, few, seen.shared, together, compiled)}"
    try:
        backward, _ = chosen(backward=True)
    except ops.ImplementationError as error:  # forced, and has the forward alone
        return implementation, f"{reason}; no backward: {error}"
    if backward.implementation != implementation:
        reason += f"; backward {backward.implementation}: {backward.reason}"
    return implementation, reason


def _before_any_call(layer: Any, base: Any, compiled: bool) -> Seen:
    if isinstance(layer, experts.ParamWrapper):
        weight = experts.weight_of(base)
        return Seen((ROWS_BEFORE_ANY_CALL, weight.shape[1]), weight.dtype, shared=weight.device.type in experts.GROUPED)
    used = [] if base is layer else obstacles.used_adapters(layer, None)
    drops = [obstacles.adapter_of(layer, name)[2] for name in used]
    dropout = any(one.p for one in drops if isinstance(one, nn.Dropout) and one.training)
    shared = siblings.KEY in layer.__dict__ and len(used) == 1 and not compiled
    return Seen((ROWS_BEFORE_ANY_CALL, layer.in_features), linear_weight(base).dtype, dropout, shared=shared)
