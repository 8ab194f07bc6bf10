"""`accelerate`, `restore`, `report`: any PEFT model with LoRA, IA³ or a soft prompt made faster in place, by other classes for its parts.

Parameters, submodules, state-dict keys and hooks on the layer stay where they are, so that saving, adding, switching, disabling and merging adapters
remain PEFT's own business. Frozen layers without an adapter are swapped where that is asked for. On a CPU the frozen weights may have packed copies.

obstacles    what a layer is about to compute, or what stands in the way
probing      whether a base layer computes what nn.Linear does
known        a layer's last plan, and whether it still holds
quantised    the weights of quantised layers
siblings     layers that share x
mixed        the names of a mixed batch, handed to all layers
composed     what a LoRA layer computes around the operator: DoRA's factors, trained biases, a head's loss
layers       the classes that layers are swapped to
experts      LoRA on a mixture's experts
embeddings   LoRA on embeddings
scaled       IA³'s layers
prompts      the class that a PeftModel with soft prompts is swapped to
merging      adapters in the weights for a while, and the weights back bit for bit
reporting    what computes each layer, and why

What swaps the model's loss, what stands between its layers, or what its rows share, is not PEFT's matter: model_loss.py, fusion.py, sharing.py.
"""

import functools
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from peft import PeftModelForCausalLM
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from fastlora import bottleneck, fusion, memory, model_loss, ops, packing, sharing
from fastlora.bottleneck import BottleneckLayer
from fastlora.checks import is_hooked
from fastlora.choice import table, trial
from fastlora.frozen import packed
from fastlora.peft import embeddings, experts, mixed, obstacles, prompts, quantised, reporting, scaled, siblings
from fastlora.peft.layers import (
    FrozenLinear,
    FrozenQuantised,
    Fused,
    FusedLinear,
    compute,
    frozen_base,
    frozen_class,
    fused_class,
    restore_layer,
)
from fastlora.peft.merging import merged
from fastlora.peft.prompts import ensemble
from fastlora.peft.reporting import LayerReport, Report, report
from fastlora.peft.silent import silent_adapters
from fastlora.swap import become, is_derived

__all__ = [
    "FrozenLinear",
    "FusedLinear",
    "LayerReport",
    "Report",
    "accelerate",
    "ensemble",
    "merged",
    "report",
    "restore",
]


def _frozen_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that are, or may become, a FrozenLinear: frozen, plain, and not part of an adapter."""
    adapters = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    inside = {part for adapter in adapters for part in _parts(adapter)}
    return [module for module in model.modules() if module not in inside and _is_frozen_product(module)]


def _is_frozen_product(module: Any) -> bool:
    """Whether it is, or may become, a FrozenLinear or a FrozenQuantised."""
    if isinstance(module, (FrozenLinear, FrozenQuantised)):
        return type(module) is FrozenLinear or isinstance(module, FrozenQuantised)
    if is_hooked(module):
        return False
    if isinstance(quantised.base_of(module), quantised.Base):
        return True
    return type(module) is nn.Linear and obstacles.weight_obstacle(module.weight, module.bias) is None


def _parts(adapter: nn.Module) -> Iterable[nn.Module]:
    """What an adapter's layer is made of. A bottleneck adapter stands around a whole sublayer, whose layers are the model's."""
    return bottleneck.own_parts(adapter) if isinstance(adapter, BottleneckLayer) else adapter.modules()


LEFT = "; frozen=True, fuse=True and loss=True speed up the rest of the model"


def accelerate(
    model: nn.Module,
    *,
    frozen: bool = False,
    loss: bool = False,
    fuse: bool = False,
    share_prefix: bool = False,
    pack_budget: int | None = None,
) -> nn.Module:
    """Make a PEFT model with LoRA, IA³ or a soft prompt faster, in place, with the same results; returns the model.

    Swaps the class of every `peft.tuners.lora.Linear` that can be fused (nn.Linear, Conv1D or what computes the same underneath, frozen, plain
    LoRA or DoRA, with trained biases or without), and on a CPU of those over bitsandbytes' NF4, FP4 and int8 layers and torchao's int8 weights
    (quantised.py), to a subclass whose forward and backward run as one operator, with a factor a column for DoRA; and of what `target_parameters`
    wraps around a mixture's experts, where a few random numbers show that they compute what is computed here (experts.py). Layers that share x,
    as query, key and value do, read it once (siblings.py). LoRA on embeddings is swapped, too (embeddings.py), and so are IA³'s layers (scaled.py).
    Layers of PEFT's other methods stay PEFT's. Call it again after new layers were added; `restore` undoes it.

    `adapter_names=`, an adapter's name or `__base__` for each row, may name LoRA, DoRA and IA³ adapters, in training, too, and in `generate` with
    beams (mixed.py). Where PEFT would ignore the names they are an error.

    A PeftModel with a soft prompt (prompt tuning, P-tuning, multitask prompts, prefix tuning, a cartridge) gets a class derived from its own, in
    which each row is as it were alone, in any padding, packed or generated from; a causal model's prompt runs once for all rows (peft/prompts.py).
    Its logits are of the batch's own tokens, [B, T, V]. `adapter_names=` gives each row its own prompt, as it gives it its own LoRA.

    frozen: also swap every plain frozen nn.Linear without an adapter, such as lm_head, and on a CPU quantised layers without one; the model then
    needs no LoRA layers.
    loss: also swap the class of the transformers model with the language model's head. In training mode with gradients on,
    `model(**batch).loss` then comes from the logits of labelled tokens only, a block of the vocabulary at a time
    (operators/linear_cross_entropy.py), and `logits` is None. In eval mode, without gradients or without labels the model runs as before and
    returns its logits, which an evaluation's metrics read. The loss is the labelled tokens' mean, or with `num_items_in_batch` their sum over
    that; what the model adds to it is added still. The first batch decides, by comparing a few tokens' logits and loss with the model's own,
    whether the model allows it in full, in part or not; `report` says so. The model needs no LoRA layers: full fine-tuning can have the loss alone.
    A model that is compiled as a whole keeps its own loss: compile its layers. TRL's SFTTrainer has a fused head of its own, which stays; its
    versions from before that read the logits, and get them. A head with LoRA has its loss so, too, unless that is a DoRA or has a trained bias.
    fuse: also swap the classes of a Llama-like model's norms, gated MLPs and attention, as far as they compute what our operators do, which a few
    random numbers decide (fusion.py): RMSNorm, SwiGLU, rotary embeddings, and on a CPU the attention that transformers leaves to torch. With
    `loss=True` a padded batch then runs without its padding, where a small batch shows that the model gives the same (packing.py).
    share_prefix: also let the causal model run what a batch's rows begin with once, as an instruction's template or the G answers to one prompt:
    tokens that are the same, at the same positions, up to the first that predicts one with a label (sharing.py). Exact, forward and backward, as a
    small batch shows first; dropout draws once for a token that is shared. `report` says how many tokens the last call has saved.
    pack_budget: bytes that packed copies of frozen weights may take on a CPU, 0 for none; None: a sixteenth of the machine's memory. A
    copy is made by the first product for which it was measured to pay on this kind of machine; `report` names those that did not fit. A write to
    a frozen weight is seen, by whatever hand (packed.py). A weight that another module has, too, such as a tied embedding, has no copies.

    On a kind of CPU or GPU that nobody has measured, it first measures, once: for seconds to half a minute on a CPU, for a minute or two on a GPU,
    whose kernels are compiled meanwhile (`fastlora.choice.trial.try_out`; FASTLORA_TRIAL=0: never). A model that is on a CPU may yet be moved:
    where there is a card, that is measured as well.
    Under torch.distributed every process calls it, and all choose as rank 0 does.

    What torch keeps for 16-bit products of ever new numbers of rows on a CPU is bounded by two variables of the environment, unless they are set
    (memory.py): else batches of ever new lengths take a gigabyte and more, a little with every step.

    PEFT's `unload` and `merge_and_unload` restore the model first: what they return has nothing of fastlora's.

    Raises:
        ValueError: the model has nothing to accelerate, or no head where its loss is to be, or pack_budget is no number of bytes.
        fastlora.ops.ImplementationError: FASTLORA_IMPL names nothing that this machine can run.
    Warns:
        UserWarning: not one of the LoRA layers could be fused, or the model has layers of PEFT's other methods alone; a LoRA adapter that PEFT has
            loaded for inference changes nothing.
    """
    ops.read_environment()
    memory.bound_product_caches()
    budget = packed.Budget(pack_budget)
    layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    plain = _frozen_layers(model) if frozen else []
    adapted = [
        module
        for module in model.modules()
        if isinstance(module, BaseTunerLayer) and not isinstance(module, BottleneckLayer)
    ]
    prompted = [module for module in model.modules() if prompts.is_prompted(module)]
    more = bool(prompted) or loss or fuse or share_prefix
    if not adapted and not frozen and not more:
        raise ValueError("model: has no PEFT LoRA layers, expected the result of peft.get_peft_model with a LoraConfig")
    if not adapted and not plain and not more:
        raise ValueError(
            "model: has no LoRA layers and no frozen nn.Linear, expected one (model.requires_grad_(False) freezes)"
        )
    outer = any(sharing.KEY in module.__dict__ for module in model.modules())
    for module in model.modules() if outer else ():
        sharing.detach(module)  # it stands before the loss
    if loss:
        model_loss.attach(model)
    if share_prefix or outer:
        sharing.attach(model)
    if fuse:
        fusion.attach(model)
    for module in prompted:
        prompts.attach(module)
    if share_prefix or outer or any(isinstance(module, PeftModelForCausalLM) for module in prompted):
        fusion.attach_segments(model)
    for layer in layers:
        restore_layer(layer.base_layer)  # of a layer that got its adapter since the last call
        if not isinstance(layer, Fused) and obstacles.swap_obstacle(layer) is None:
            own: Any = type(layer)
            become(layer, fused_class(own))
            quantised.hold(layer.base_layer)
        embeddings.attach(layer)
    experts.attach(model)
    left = [obstacle for one in adapted if not isinstance(one, LoraLayer) and (obstacle := scaled.attach(one))]
    for linear in plain:
        if isinstance(quantised.base_of(linear), quantised.Base):
            kind: Any = type(linear)
            become(linear, kind if isinstance(linear, FrozenQuantised) else frozen_class(kind))
            quantised.hold(linear)
        else:
            become(linear, FrozenLinear)
    bases = [base for base in map(frozen_base, model.modules()) if base is not None]
    shared = _weights_of_others(model, bases)
    for base in bases:
        if base.weight in shared:
            packed.detach(base)
        else:
            packed.attach(base, budget)
    for module in model.modules():
        siblings.leave(module)
        if isinstance(module, BaseTuner):
            for name in UNLOADING:
                module.__dict__[name] = functools.partial(_unload_restored, module, name)
            mixed.attach(module)
    for family in siblings.find_families(model, lambda module: isinstance(module, Fused), compute):
        family.attach()
    if layers and not any(isinstance(layer, Fused) or is_derived(layer) for layer in layers):
        warnings.warn(
            f"fastlora.accelerate fused none of {len(layers)} LoRA layers: {reporting.obstacle_of(layers[0])}",
            stacklevel=2,
        )
    if left and len(left) == len(adapted):
        warnings.warn(
            f"fastlora.accelerate left {len(left)} layers to PEFT: {left[0]}{LEFT * (not (frozen or loss or fuse))}",
            stacklevel=2,
        )
    for name in silent_adapters(model):
        warnings.warn(
            f"fastlora.accelerate: adapter {name!r} is loaded for inference and changes nothing, as all its B are zero:"
            " its file may be a fresh adapter's, or have keys that match nothing (fastlora.receipt tells)",
            stacklevel=2,
        )
    trial.try_out({**_weights_by_operator(model), **fusion.weights(model)})
    return model


def _weights_of_others(model: nn.Module, bases: Sequence[nn.Module]) -> packed.Places:
    """Where the weights of all modules but these lie. A tied embedding's is written to by others: PEFT merges a few of its rows through `.data`."""
    others = set(model.modules()).difference(bases)
    return packed.Places(weight for module in others for weight in module._parameters.values())


def _weights_by_operator(model: nn.Module) -> dict[str, list[Tensor]]:
    """For each operator, the frozen weights that the swapped layers call it with."""
    fused = [module for module in model.modules() if isinstance(module, Fused)]
    grouped = [layer for layer in fused if siblings.KEY in layer.__dict__]
    swapped = [base for base in map(frozen_base, model.modules()) if base is not None]
    weight_of = obstacles.multiplied
    of_experts = experts.weights(model)
    by_rank: dict[str, list[Tensor]] = {}
    for weight, ranks in [*((weight_of(layer.base_layer), layer.r.values()) for layer in fused), *of_experts]:
        for rank in ranks:
            by_rank.setdefault(table.rank_case(rank), []).append(weight)
    return {
        "frozen_linear": [*(weight_of(base) for base in swapped), *(weight for weight, _ in of_experts)],
        **by_rank,
        "lora_linear": [*(weight_of(layer.base_layer) for layer in fused), *(weight for weight, _ in of_experts)],
        "lora_linear_shared": [weight_of(layer.base_layer) for layer in grouped],
        "multi_lora": [weight_of(layer.base_layer) for layer in fused if len(layer.lora_A) > 1],
        "multi_lora_shared": [weight_of(layer.base_layer) for layer in grouped if len(layer.lora_A) > 1],
    }


def _has_mixed_rows(model: nn.Module) -> bool:
    return mixed.under_way > 0 and any(mixed.names_of(module) is not None for module in model.modules())


def _knows_examples(module: nn.Module) -> bool:
    """Whether layers know each example's adapter by its place in the batch; what a sweep hands out knows of padding."""
    given = [mixed.names_of(one) for one in module.modules()] if mixed.under_way else []
    return any(names is not None and not isinstance(names, mixed.RowNames) for names in given)


sharing.TELLERS.append(_has_mixed_rows)
packing.TELLERS.append(_knows_examples)


UNLOADING = ("unload", "merge_and_unload")
"""The methods of PEFT's tuners that hand out a plain model."""


def _unload_restored(tuner: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    """Stands before a tuner's own method. Layers are restored here since PEFT does not look at all: not into modules_to_save."""
    restore(tuner)
    return getattr(tuner, name)(*args, **kwargs)


def restore(model: nn.Module) -> nn.Module:
    """Undo `accelerate`, in place, and free the packed copies; returns the model."""
    for module in model.modules():
        siblings.leave(module)
        prompts.detach(module)
        sharing.detach(module)
        model_loss.detach(module)
        fusion.detach(module)
        embeddings.detach(module)
        experts.detach(module)
        restore_layer(module)
        if isinstance(module, BaseTuner):
            for name in UNLOADING:
                module.__dict__.pop(name, None)
            mixed.detach(module)
    return model
