"""The bound of every numeric test (fastlora/bounds.py has it), and the tensors that the tests are made of.

Eager PyTorch, and the float64 reference, compute on `dense` copies: what lies in the gaps of a view is no business of theirs, but there are
machines on which torch's own product reads it (amx_fault.py).
"""

import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from math import isnan
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastlora.bounds import Errors, compare, over_inputs

Compared = tuple[Tensor, Tensor, Tensor]  # a result's value, eager's and the exact one

INPUTS = 8  # over which errors are taken at first
ROUNDS = (1, 8, 64)  # times as many, where they are outside the bound
LUCK = 8  # times the bound: what is further out no luck explains


def assert_within_bound(name: str, value: Tensor, eager: Tensor, exact: Tensor) -> None:
    """`value` is as near to `exact` (float64) as twice the distance of `eager`; NaN fails."""
    errors = errors_of(name, value, eager, exact)
    assert errors.within, outside(name, errors)


def assert_within_bound_over_inputs(compute: Callable[[], Mapping[str, Compared]], inputs: int = INPUTS) -> None:
    """The same for each result of several inputs, which `compute` draws: the largest errors of all of them count.

    A result of few values rests on luck, eager's and ours: the largest error of eight inputs can be twice that of eight others. Where one is
    outside its bound, eight times as many inputs are taken, and eight times as many again, beside those that there were: what luck did they
    undo, what is wrong stays.
    """
    found: dict[str, list[Errors]] = defaultdict(list)
    decisive = [times * inputs for times in ROUNDS]
    for count, seed in enumerate(torch.randint(2**62, (decisive[-1],)).tolist(), start=1):
        torch.manual_seed(seed)  # `compute` may leave torch seeded
        for name, results in compute().items():
            found[name].append(errors_of(name, *results))
        if count in decisive:
            beyond = {name: errors for name, of_one in found.items() if not (errors := over_inputs(of_one)).within}
            if not beyond:
                return
            for name, errors in beyond.items():
                assert errors.error <= LUCK * errors.bound and count < decisive[-1], outside(name, errors)


def errors_of(name: str, value: Tensor, eager: Tensor, exact: Tensor) -> Errors:
    assert value.dtype == eager.dtype, f"{name}: got {value.dtype}, expected {eager.dtype}"
    errors = compare(value, eager, exact)
    assert not isnan(errors.eager), f"{name}: eager PyTorch's own result is NaN, where the exact one is not"
    return errors


def outside(name: str, errors: Errors) -> str:
    return f"{name}: error {errors.error:.3g}, bound {errors.bound:.3g}"


def next_seed(device: str, seed: int, layers: int = 1) -> Tensor:  # [layers]
    """The dropout seeds that fastlora.functional draws first after torch.manual_seed(seed); torch is left seeded."""
    torch.manual_seed(seed)
    drawn = torch.randint(0, 2**63 - 1, (layers,), dtype=torch.int64, device=device)
    torch.manual_seed(seed)
    return drawn


def flip_unread(keep: Tensor, read: Tensor) -> Tensor:  # uint8 [..., bytes], bool [..., K]
    """The bits of dropout, every one flipped but those that `read` says are read."""
    unread = np.ones((*read.shape[:-1], 8 * keep.shape[-1]), dtype=bool)
    unread[..., : read.shape[-1]] = ~read.cpu().numpy()
    return keep ^ torch.from_numpy(np.packbits(unread, axis=-1, bitorder="little")).to(keep.device)


def gapped(tensor: Tensor) -> Tensor:
    """The same values as a view into a larger tensor of NaN: a read outside the view shows."""
    around = tensor.new_full([size + 3 for size in tensor.shape], torch.nan)
    inside = around[tuple(slice(1, size + 1) for size in tensor.shape)]
    return inside.copy_(tensor.detach()).requires_grad_(tensor.requires_grad)


def dense(tensor: Tensor | None) -> Tensor | None:
    """A copy without gaps; a tensor that has none keeps its strides, also where it repeats itself."""
    if tensor is None:
        return None
    once = tensor.detach()[tuple(slice(None) if stride else slice(1) for stride in tensor.stride())]
    return once.clone().expand(tensor.shape).requires_grad_(tensor.requires_grad)


def transposed(tensor: Tensor) -> Tensor:
    """The same values [rows, columns] with column-major strides, as GPT-2 keeps its weights."""
    return tensor.detach().T.contiguous().T.requires_grad_(tensor.requires_grad)


def double(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().double()


class Layer(NamedTuple):
    """A frozen linear layer with one adapter and its input; x, lora_a and lora_b require gradients."""

    x: Tensor  # [M, K]
    weight: Tensor  # [N, K]
    bias: Tensor | None  # [N]
    lora_a: Tensor  # [R, K]
    lora_b: Tensor  # [N, R]
    dy: Tensor  # [M, N]


def make_layer(
    M: int,
    K: int,
    N: int,
    R: int,
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype | None = None,
    bias: bool = True,
    device: str = "cpu",
) -> Layer:
    """Random tensors in the scales of a trained layer: outputs of order 1, the adapter's part as large as the base's."""
    weight, lora_a, lora_b = torch.randn(N, K) / K**0.5, torch.randn(R, K) / K**0.5, torch.randn(N, R) / R**0.5
    base, adapter = {"device": device, "dtype": dtype}, {"device": device, "dtype": adapter_dtype or dtype}
    return Layer(
        torch.randn(M, K).to(**base).requires_grad_(),
        weight.to(**base),
        torch.randn(N).to(**base) if bias else None,
        lora_a.to(**adapter).requires_grad_(),
        lora_b.to(**adapter).requires_grad_(),
        torch.randn(M, N).to(**base),
    )


def gradients(output: Tensor, inputs: Sequence[Tensor], dy: Tensor) -> list[Tensor]:
    """d(output · dy) for each input, zeros where the output does not depend on it."""
    return list(torch.autograd.grad(output, inputs, dy, materialize_grads=True))


def run_apart(module: str, function: Callable[[], None], emulator: Sequence[str] = ()) -> str:
    """What `function` of the test module prints in a process of its own, which must end well: a crash ends only that process.

    emulator: the command that runs Python's; none: this machine itself.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    code = f"import amx_fault; amx_fault.install_if_asked(); import {module}; {module}.{function.__name__}()"
    command = [*emulator, sys.executable, "-c", code]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (
        f"{function.__name__} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    )
    return done.stdout


def print_accepted(op: str, right: Mapping[str, Any], wrong: Mapping[str, tuple[str, dict[str, Any]]]) -> None:
    """Call torch.ops.fastlora.<op> with each wrong change of the right arguments; print what does not raise or does not name the argument."""
    call = getattr(torch.ops.fastlora, op)
    call(*right.values())
    for case, (name, changes) in wrong.items():
        print(f"calling {op}, {case}", file=sys.stderr, flush=True)
        try:
            call(*{**right, **changes}.values())
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            if name not in str(error):
                print(f"{op}, {case}: {error!r} does not name {name}")
        else:
            print(f"{op}, {case}: accepted")
