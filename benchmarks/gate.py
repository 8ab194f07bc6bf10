"""Check first, then time: an operator's tests, then the errors of each case before its times are taken.

    error of an implementation  <=  2 * error of eager PyTorch + tiny

Errors are the largest absolute difference from the float64 result for the same inputs, dropout mask included; eager
PyTorch is the reference in the working dtype; tiny is one unit in the last place of the largest value. NaN fails.
"""

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastlora
from fastlora import functional, ops, packed

from .cases import BOTH, CHECKS, TRAINING, BlockCase, Case, LoRALinearCase, MultiLoRACase, PrefixConcatCase
from .machine import ROOT, in_checkout
from .rivals import (
    SCALE,
    block_inputs,
    forced,
    implementations,
    make_adapter,
    make_block,
    make_prompt_batch,
    random_tensor,
)

Compute = Callable[[str, Callable[[Any], Any]], dict[str, Tensor]]


class Error(NamedTuple):
    """The worst of an implementation's results, its errors divided by the largest value of the exact result."""

    result: str  # "y", "dx", "da", ...
    error: float
    eager: float
    bound: float

    @property
    def within(self) -> bool:
        return self.error <= self.bound


def _double(value: Any) -> Any:
    """Floating-point tensors in float64, in lists too; anything else as it is."""
    if isinstance(value, Tensor):
        return value.detach().double() if value.is_floating_point() else value
    return [_double(one) for one in value] if isinstance(value, list) else value


def _lora_linear(case: LoRALinearCase, training: bool, device: torch.device) -> Compute:
    M, K, N = case.M, case.K, case.N
    x, dy = (random_tensor(M, width, dtype=case.dtype, device=device) for width in (K, N))
    weight = random_tensor(N, K, dtype=case.dtype, device=device, scale=K**-0.5)
    bias = random_tensor(N, dtype=case.dtype, device=device) if case.bias else None
    packed.register(weight, packed.Budget())  # as `accelerate` does: what is checked is what is timed
    a, b = (part.detach() for part in make_adapter(K, N, case.R, case.adapter_dtype, device))
    p = case.dropout_p if training else 0.0
    seed = torch.tensor(1234567, device=device) if p else None

    def compute(implementation: str, cast: Callable[[Any], Any]) -> dict[str, Tensor]:
        inputs = [cast(value) for value in (x, weight, bias, a, b)]
        y, xa, keep = ops.implementation("lora_linear", implementation)(*inputs, SCALE, p, seed)
        if not training:
            return {"y": y}
        x_, weight_, _, a_, b_ = inputs
        backward = ops.implementation("lora_linear_backward", implementation)
        dx, da, db = backward(cast(dy), x_, weight_, a_, b_, xa, keep, SCALE, p, True, True, True)
        return {"y": y, "dx": dx, "da": da, "db": db}

    return compute


def _multi_lora(case: MultiLoRACase, training: bool, device: torch.device) -> Compute:
    M, K, N = case.B * case.T, case.K, case.N
    x, dy = (random_tensor(M, width, dtype=case.dtype, device=device) for width in (K, N))
    weight = random_tensor(N, K, dtype=case.dtype, device=device, scale=K**-0.5)
    adapters = [make_adapter(K, N, rank, case.adapter_dtype, device) for rank in case.ranks]
    lora_a, lora_b = ([pair[part].detach() for pair in adapters] for part in range(2))
    S = len(case.ranks)
    scale, p = [SCALE] * S, [case.dropout_p if training else 0.0] * S
    seed = torch.tensor(1234567, device=device) if any(p) else None
    order, offsets = functional.group_rows(torch.tensor(case.adapters_of_examples(), device=device), S).for_rows(M)

    def compute(implementation: str, cast: Callable[[Any], Any]) -> dict[str, Tensor]:
        x_, weight_, a_, b_ = (cast(value) for value in (x, weight, lora_a, lora_b))
        forward = ops.implementation("multi_lora", implementation)
        y, xa, keep = forward(x_, weight_, None, a_, b_, scale, p, seed, order, offsets)
        if not training:
            return {"y": y}
        backward = ops.implementation("multi_lora_backward", implementation)
        state = (xa, keep, scale, p, order, offsets)
        dx, da, db = backward(cast(dy), x_, weight_, a_, b_, *state, True, True, True)
        return {"y": y, "dx": dx, "da": da, "db": db}

    return compute


def _prefix_concat(case: PrefixConcatCase, training: bool, device: torch.device) -> Compute:
    batch = make_prompt_batch(case, device)
    prompts = batch.prompts.detach().flatten(0, 1)  # [S P, D]
    starts = torch.arange(case.S + 1, device=device) * case.P
    dout = random_tensor(case.B, case.T + case.P, case.D, dtype=case.dtype, device=device)

    def compute(implementation: str, cast: Callable[[Any], Any]) -> dict[str, Tensor]:
        places = (cast(prompts), starts, case.P, batch.prompt_index, None, batch.input_ids, cast(batch.embedding))
        forward = ops.implementation("prefix_concat", implementation)
        embeds, mask, positions, labels, source = forward(*places, batch.attention_mask, None, batch.labels)
        results = {"embeds": embeds, "attention_mask": mask, "position_ids": positions, "labels": labels}
        if training:
            backward = ops.implementation("prefix_concat_backward", implementation)
            results["dprompts"], _ = backward(cast(dout), source, len(prompts), case.T, True, False)
        return results

    return compute


def _error(result: str, value: Tensor, eager: Tensor, exact: Tensor) -> Error:
    if value.shape != exact.shape:
        raise RuntimeError(f"{result}: got shape {list(value.shape)}, expected {list(exact.shape)}")
    if exact.numel() == 0:
        return Error(result, 0.0, 0.0, 0.0)
    exact = exact.double()
    largest = exact.abs().max().clamp_min(torch.finfo(torch.float32).tiny).item()
    error, of_eager = ((one.double() - exact).abs().max().item() / largest for one in (value, eager))
    unit = torch.finfo(value.dtype).eps if value.is_floating_point() else 0.0
    return Error(result, error, of_eager, 2 * of_eager + unit)


def inputs_of(case: Case, training: bool, device: torch.device) -> Compute:
    """The case's tensors, seeded, behind a function (implementation, cast) -> results by name, of the cast tensors."""
    torch.manual_seed(0)
    if isinstance(case, LoRALinearCase):
        return _lora_linear(case, training, device)
    if isinstance(case, MultiLoRACase):
        return _multi_lora(case, training, device)
    return _prefix_concat(case, training, device)


def errors(case: Case, training: bool, implementation: str, device: torch.device) -> list[Error]:
    """The errors of every result of a case, in the order in which the results come.

    Raises:
        fastlora.ops.ImplementationError: the implementation is not here.
    """
    compute = inputs_of(case, training, device)
    exact = compute("reference", _double)
    eager = compute("reference", lambda value: value)
    values = compute(implementation, lambda value: value)
    return [_error(result, values[result], eager[result], exact[result]) for result in exact]


def block_errors(case: BlockCase) -> list[Error]:
    """The errors of the accelerated block without dropout, against PEFT's own in float64; eager is the reference in the working dtype."""
    case = replace(case, dropout_p=0.0)
    inputs, gradients = block_inputs(case)

    def compute(block: nn.Module, cast: Callable[[Any], Any]) -> dict[str, Tensor]:
        activations = [cast(value).detach().requires_grad_() for value in inputs]
        trained = {f"d{name}": value for name, value in block.named_parameters() if value.requires_grad}
        outputs = block(*activations)
        grads = torch.autograd.grad(outputs, [*activations, *trained.values()], cast(gradients))
        names = [*(f"y{i}" for i in range(len(outputs))), *(f"dx{i}" for i in range(len(inputs))), *trained]
        return dict(zip(names, [*outputs, *grads], strict=True))

    def same(value: Any) -> Any:
        return value

    exact = compute(make_block(case, True).double(), _double)
    accelerated = fastlora.accelerate(make_block(case, True))
    eager = forced(lambda _: compute(accelerated, same), "reference")(0)
    values = compute(accelerated, same)
    return [_error(name, values[name].detach(), eager[name].detach(), exact[name].detach()) for name in exact]


def worst(found: Sequence[Error]) -> Error:
    """The one to report: outside its bound if there is one, else the largest."""
    return max(found, key=lambda error: (not error.within, error.error))


def check(operator: str, device: torch.device) -> list[str]:
    """What is wrong with the implementations worth timing, on small, awkward cases against the float64 reference."""
    wrong = []
    for case in CHECKS[operator]:
        for pass_ in BOTH:
            for implementation in implementations(operator, case, pass_ == TRAINING, device):
                error = worst(errors(case, pass_ == TRAINING, implementation, device))
                if not error.within:
                    what = f"{operator} {implementation}, {case.name}, {pass_}"
                    wrong.append(f"{what}: error of {error.result} {error.error:.2g}, bound {error.bound:.2g}")
    return wrong


def has_tests(operator: str) -> bool:
    """Whether the operator's own tests can be run: a checkout with pytest."""
    present = (ROOT / "tests" / f"test_{test_stem(operator)}.py").is_file()
    return in_checkout() and present and importlib.util.find_spec("pytest") is not None


def test_stem(operator: str) -> str:
    """The stem of the operator's test file; a training step is tested as what `accelerate` does to a PEFT model."""
    return "peft" if operator == "step" else operator


def run_tests(operator: str) -> bool:
    """Run the operator's tests in a process of their own; whether they are green."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", f"tests/test_{test_stem(operator)}.py"]
    return subprocess.run(command, cwd=ROOT, check=False).returncode == 0
