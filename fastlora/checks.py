"""What every operator's public function asks of its arguments, before any memory is touched: each error names the argument, what it is, and
what was expected. And what torch may want beside the values: autocast, transforms, indices that only a GPU can look at.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def shown(value: Any) -> str:
    """For people: a tensor by its dtype, shape and device."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}"
    return repr(value)


def wrong(name: str, value: Any, expected: str) -> ValueError:
    return ValueError(f"{name}: got {shown(value)}, expected {expected}")


def wrong_type(name: str, value: Any, expected: str) -> TypeError:
    return TypeError(f"{name}: got {type(value).__name__}, expected {expected}")


def check_floats(value: Any, name: str) -> None:
    if not isinstance(value, Tensor):
        raise wrong_type(name, value, "a torch.Tensor")
    if value.dtype not in FLOATS:
        raise wrong(name, value, "float32, bfloat16, float16 or float64")


def check_number(value: Any, name: str) -> None:
    if isinstance(value, Tensor) or not isinstance(value, (int, float)):
        raise wrong_type(name, value, "a float")
    if not -math.inf < value < math.inf:
        raise wrong(name, value, "a finite number")


def check_probability(value: Any, name: str) -> None:
    check_number(value, name)
    if not 0 <= value <= 1:
        raise wrong(name, value, "a probability between 0 and 1")


def check_integers(value: Any, name: str, shape: Sequence[int], device: torch.device) -> None:
    if not isinstance(value, Tensor):
        raise wrong_type(name, value, "an integer tensor")
    dtype = value.dtype
    if dtype is not torch.int64 and (dtype.is_floating_point or dtype.is_complex or dtype is torch.bool):
        raise wrong(name, value, "an integer tensor")
    if value.shape != tuple(shape):
        raise wrong(name, value, f"shape {list(shape)}")
    if value.device != device:
        raise wrong(name, value, f"device {device}")


def check_base(x: Tensor, weight: Tensor, bias: Tensor | None, autocast: bool) -> None:
    """x, weight and bias fit together; under autocast their dtypes may differ, since all three are cast."""
    check_floats(weight, "weight")
    if x.dim() == 0:
        raise wrong("x", x, "at least one dimension, the last of size K")
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise wrong("weight", weight, f"shape [N, {x.shape[-1]}] to match the last dimension of x {list(x.shape)}")
    if bias is not None:
        check_floats(bias, "bias")
        if bias.dim() != 1 or bias.shape[0] != weight.shape[0]:
            raise wrong("bias", bias, f"shape [{weight.shape[0]}]")
    for value, name in ((weight, "weight"), (bias, "bias")):
        if value is not None and value.dtype != x.dtype and not autocast:
            raise wrong(name, value, f"x's dtype {x.dtype}")
        if value is not None and value.device != x.device:
            raise wrong(name, value, f"x's device {x.device}")
    check_frozen(weight=weight, bias=bias)


def check_frozen(**named: Tensor | None) -> None:
    """None of them requires a gradient, which would not be computed."""
    for name, value in named.items():
        if value is not None and value.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name}: requires a gradient, expected a frozen tensor (call {name}.requires_grad_(False))"
            )


class _Pending(NamedTuple):
    flag: Tensor  # one bool in pinned memory, written by the device
    event: "torch.cuda.Event"
    message: str


_pending: list[_Pending] = []
"""Values that a GPU found out of range and that no one has read back yet."""


def check_in_range(numbers: Tensor, least: int, most: int, message: str, where: Tensor | None = None) -> None:
    """Raise IndexError where one of the numbers, or of those where `where` is not 0, is not among `least` to `most`: at once on a CPU; on a GPU
    at the first check after the device has got there.
    """
    if torch.compiler.is_compiling() or not numbers.numel():
        return
    if numbers.device.type == "cpu":
        lowest, highest = torch.aminmax(numbers)
        if lowest >= least and highest <= most:
            return
    bad = (numbers < least) | (numbers > most)
    if where is not None:
        bad &= where != 0
    if bad.device.type == "cpu":
        if bool(bad.any()):
            raise IndexError(message)
    elif bad.device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        raise_pending()
        flag = torch.empty(1, dtype=torch.bool, pin_memory=True)
        flag.copy_(bad.any().reshape(1), non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        _pending.append(_Pending(flag, event, message))


def raise_pending() -> None:
    """Raise the IndexError of an earlier call whose index was out of range on a GPU, if the device has found one. Never waits."""
    while _pending and _pending[0].event.query():
        found = _pending.pop(0)
        if bool(found.flag):
            raise IndexError(f"{found.message} (found on the GPU by an earlier call, whose rows are NaN)")


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast would give x Wᵀ here, or None where autocast is off or leaves x alone."""
    if not torch._C._is_any_autocast_enabled() or x.dtype is torch.float64:
        return None
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Autocast off, where it is on: the operators are told their dtypes."""
    if not torch._C._is_any_autocast_enabled():
        return nullcontext()
    on = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


PLAIN = "fastlora.restore(model), or plain PyTorch's operations, can do it"


def transform_obstacle() -> str | None:
    """Why an operator might leave out what torch wants beside the values, or None: all that it has is a backward."""
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func is at work (vmap, jvp, grad, ...)"
    return "forward-mode differentiation is on" if forward_ad._current_level >= 0 else None


def check_transforms(*tensors: Tensor | None) -> None:
    """Raise NotImplementedError where torch wants more of an operator on these tensors than it has."""
    obstacle = transform_obstacle()
    if obstacle is None:
        return
    plain = [tensor for tensor in tensors if tensor is not None]
    if torch._C._are_functorch_transforms_active() or any(
        forward_ad.unpack_dual(one).tangent is not None for one in plain
    ):
        raise NotImplementedError(f"fastlora: {obstacle}, for which the operators have no rule; {PLAIN}")


def is_sharded(tensor: Any) -> bool:
    """Whether it is torch's DTensor, of which a process holds a part; by name, since importing that takes longer than most of this package."""
    return type(tensor).__name__ == "DTensor"


def is_hooked(*modules: nn.Module) -> bool:
    """Whether calling one of the modules does more than its class's forward."""
    for module in modules:
        state = module.__dict__
        if (
            state["_forward_hooks"]
            or state["_forward_pre_hooks"]
            or state["_backward_hooks"]
            or state["_backward_pre_hooks"]
            or "forward" in state
            or "_hf_hook" in state
        ):
            return True
    return False
