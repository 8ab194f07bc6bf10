"""What updates a training's weights: its optimiser, the rate of each step, the scale of a float16 loss; and how their state is read again.

`--optim` has transformers' names. Each optimiser's line in KINDS says how it is made and what it keeps of a weight: `load_state` takes nothing else.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora import schedules
from fastlora.checkpoint import CheckpointError, require_keys
from fastlora.config import MOST, TrainConfig
from fastlora.typed import fits, shown

SMALLEST_SCALE = 1.0  # of a float16 loss: a gradient that overflows here overflows by itself


class Kept(NamedTuple):
    """One thing that an optimiser keeps of a weight."""

    shape: tuple[int, ...] | None  # None: a Python number
    least: float = 0.0


class Kind(NamedTuple):
    of: Callable[[], Any]  # the class
    options: Callable[[TrainConfig], dict[str, Any]]
    keeps: Callable[[Tensor], dict[str, Kept]]  # of a weight, once it has been updated


def _adamw(config: TrainConfig) -> dict[str, Any]:
    return {"betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_epsilon}


def _moments(weight: Tensor) -> dict[str, Kept]:
    shape = tuple(weight.shape)
    return {"step": Kept((), 1.0), "exp_avg": Kept(shape, -math.inf), "exp_avg_sq": Kept(shape)}


def _adafactor() -> Any:
    from transformers.optimization import Adafactor

    return Adafactor


def _factors(weight: Tensor) -> dict[str, Kept]:
    """A matrix's second moments by row and by column (Shazeer and Stern 2018)."""
    shape = tuple(weight.shape)
    common = {"step": Kept(None, 1), "RMS": Kept(())}
    if len(shape) < 2:
        return {**common, "exp_avg_sq": Kept(shape)}
    return {**common, "exp_avg_sq_row": Kept(shape[:-1]), "exp_avg_sq_col": Kept((*shape[:-2], shape[-1]))}


KINDS: dict[str, Kind] = {
    "adamw_torch_fused": Kind(lambda: torch.optim.AdamW, lambda config: {**_adamw(config), "fused": True}, _moments),
    "adamw_torch": Kind(lambda: torch.optim.AdamW, _adamw, _moments),
    # As transformers' trainer has it: the rate is the schedule's. By its own a B of zeros would hardly move.
    "adafactor": Kind(_adafactor, lambda _: {"scale_parameter": False, "relative_step": False}, _factors),
    "sgd": Kind(lambda: torch.optim.SGD, lambda _: {}, lambda _: {}),
}
"""By the names that optim has."""


def build(config: TrainConfig, model: Any, trained: Iterable[Tensor]) -> Any:
    """The optimiser of the trained weights; under LoRA+ (Hayou et al. 2024) B's rate is a multiple of A's, in PEFT's groups.

    Norms and biases do not decay, as in transformers' Trainer.

    Args:
        model: whose weights they are.
    """
    kind, lr = KINDS[config.optim], config.lr or 0.0
    options = kind.options(config)
    if config.loraplus_lr_ratio is None:
        return kind.of()(_groups(model, list(trained), config.weight_decay), lr=lr, **options)
    from peft.optimizers import create_loraplus_optimizer

    return create_loraplus_optimizer(
        model,
        kind.of(),
        lr=lr,
        loraplus_lr_ratio=config.loraplus_lr_ratio,
        loraplus_lr_embedding=config.loraplus_lr_embedding,
        loraplus_weight_decay=config.weight_decay,
        **options,
    )


UNDECAYED = (r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)")
"""In the names, in small letters, of what transformers' Trainer keeps from decaying, beside torch's LayerNorms."""


def _groups(model: Any, trained: list[Tensor], weight_decay: float) -> list[dict[str, Any]]:
    from transformers.trainer_pt_utils import get_parameter_names

    if not weight_decay:
        return [{"params": trained, "weight_decay": 0.0}]
    names = {*get_parameter_names(model, [torch.nn.LayerNorm], [*UNDECAYED])}
    decayed = {id(weight) for name, weight in model.named_parameters(remove_duplicate=False) if name in names}
    parts = [(weight_decay, [one for one in trained if id(one) in decayed])]
    parts.append((0.0, [one for one in trained if id(one) not in decayed]))
    return [{"params": weights, "weight_decay": decay} for decay, weights in parts if weights]


def scheduler(config: TrainConfig, optimizer: torch.optim.Optimizer, steps: int) -> Any:
    """The schedule of all groups' rates.

    Raises:
        ValueError: it does not fit into so many steps.
    """
    from torch.optim.lr_scheduler import LambdaLR

    warmup = schedules.warmup_steps(config.warmup_steps, config.warmup_ratio, steps)
    kwargs = config.lr_scheduler_kwargs
    rate = schedules.multiplier(
        config.lr_scheduler_type, kwargs if isinstance(kwargs, dict) else {}, config.lr or 0.0, steps, warmup
    )
    return LambdaLR(optimizer, rate)


def rates(optimizer: torch.optim.Optimizer) -> list[float]:
    """The rates of the next update, each once, in the order of the groups that have weights."""
    return list(dict.fromkeys(group["lr"] for group in optimizer.param_groups if group["params"]))


def scaler(device: torch.device, dtype: torch.dtype, trained: Mapping[str, Tensor]) -> Any:
    """What keeps a float16 loss's gradients from vanishing (Micikevicius et al. 2018); for other dtypes it does nothing.

    Raises:
        ValueError: dtype is float16, and so is a trained weight.
    """
    narrow = next((name for name, weight in trained.items() if weight.dtype == torch.float16), None)
    if narrow and dtype == torch.float16:
        raise ValueError(f"dtype=float16: expected trained weights in float32, {narrow} is in float16: try bfloat16")
    return torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


def overflowed(scaler: Any, optimizer: torch.optim.Optimizer) -> bool:
    """After a gradient that is not finite: whether a smaller scale may mend it. If so the scale is smaller, and no gradient is left."""
    if not scaler.is_enabled() or scaler.get_scale() <= SMALLEST_SCALE:
        return False
    scaler.update()
    optimizer.zero_grad()
    return True


def _is_equal(value: Any, expected: Any) -> bool:
    try:
        return bool(value == expected)
    except Exception:  # a tensor in the place of a number
        return False


def load_state(
    path: Path,
    state: Mapping[str, Any],
    step: int,
    trained: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    optim: str,
) -> None:
    """Give an optimiser and its schedule the state that they had after a step.

    Args:
        path: the file that it is from, for messages.
        state: optimizer and scheduler, as their `state_dict` gives them.
        trained: the optimiser's weights, by name.
        optim: of KINDS, what it is.

    Raises:
        CheckpointError: it is no state of these weights after that step; nothing is changed then.
    """
    own, own_schedule = state["optimizer"], state["scheduler"]
    # All but what it keeps of the weights follows from the options and the step.
    rates = [base * rate(step) for base, rate in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    done = {"last_epoch": step, "_step_count": step + 1, "_last_lr": rates}
    if not _is_equal(own_schedule, {**scheduler.state_dict(), **done}):
        raise CheckpointError(f"{path}: scheduler: expected the state of step {step}")
    groups = [{**group, "lr": rate} for group, rate in zip(optimizer.state_dict()["param_groups"], rates, strict=True)]
    if not _is_equal(own["param_groups"], groups):
        kind = type(optimizer).__name__
        raise CheckpointError(f"{path}: optimizer.param_groups: expected {kind}'s of step {step} of this run")
    names = {id(weight): name for name, weight in trained.items()}
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for index, kept in own["state"].items():
        there = 0 <= index < len(weights)
        name = names[id(weights[index])] if there else f"parameter {index}"
        expected = KINDS[optim].keeps(weights[index]) if there else {}
        if not expected or set(kept) != set(expected):
            what = ", ".join(expected) or "nothing"
            raise CheckpointError(f"{path}: optimizer: {name}: expected {what} of a trained weight")
        for key, value in kept.items():
            _check_kept(f"{path}: optimizer: {key} of {name}", value, expected[key])
    # Equal groups need not be of equal types: True is 1, and torch's fused kernels tell them apart.
    optimizer.load_state_dict({**own, "param_groups": groups})
    scheduler.load_state_dict(own_schedule)


def _check_kept(where: str, value: Any, kept: Kept) -> None:
    if kept.shape is None:
        if not fits(value, int) or not kept.least <= value <= MOST:
            raise CheckpointError(f"{where}: expected a number from {kept.least:g} to {MOST}, got {shown(value)}")
        return
    whole = isinstance(value, Tensor) and list(value.shape) == [*kept.shape] and value.is_floating_point()
    if not whole or not value.isfinite().all() or (value < kept.least).any():
        got = f"{value.dtype} of shape {list(value.shape)}" if isinstance(value, Tensor) else shown(value)
        raise CheckpointError(f"{where}: expected numbers of shape {[*kept.shape]} from {kept.least:g} on, got {got}")


def load_scaler(path: Path, state: Any, scaler: Any) -> None:
    """Give a loss's scale the state that it had.

    Raises:
        CheckpointError: it is none of this run's; nothing is changed then.
    """
    wanted = scaler.state_dict()
    require_keys(f"{path}: scaler", state, *wanted)
    if not wanted:
        return
    scale, tracker = state["scale"], state["_growth_tracker"]
    if not fits(scale, float) or not 0 < scale <= torch.finfo(torch.float32).max:
        raise CheckpointError(f"{path}: scaler: scale={shown(scale)}: expected a number above 0 that float32 holds")
    if not fits(tracker, int) or not 0 <= tracker < wanted["growth_interval"]:
        raise CheckpointError(f"{path}: scaler: _growth_tracker={shown(tracker)}: expected steps since it grew")
    if not _is_equal(state, {**wanted, "scale": scale, "_growth_tracker": tracker}):
        raise CheckpointError(f"{path}: scaler: expected the factors of this run's")
    scaler.load_state_dict({**state, "scale": float(scale)})  # an integer may be more than torch takes
