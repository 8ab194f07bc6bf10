"""Check first, then time: an operator's tests, then the errors of each case before its times are taken.

The bound is the house's (fastlora/bounds.py), for the same inputs, dropout mask included; eager PyTorch is the reference in the working dtype.
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
from fastlora import bounds, functional, ops
from fastlora.frozen import packed

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
    peft_layer,
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
        return self.error <= self.bound  # not where one is NaN


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
    try:
        found = bounds.compare(value, eager, exact)
    except ValueError as error:
        raise RuntimeError(f"{result}: {error}") from error
    largest = max(bounds.largest_value(exact), torch.finfo(torch.float32).tiny)
    return Error(result, *(one / largest for one in (found.error, found.eager, found.bound)))


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


def block_errors(case: BlockCase, device: torch.device, implementation: str | None = None) -> list[Error]:
    """The errors of the accelerated block (by what `choose` says, or by one implementation) without dropout, against PEFT's own in float64.

    Eager is the reference in the working dtype.
    """
    case = replace(case, dropout_p=0.0)
    inputs, gradients = block_inputs(case, device)

    def compute(block: nn.Module, cast: Callable[[Any], Any]) -> dict[str, Tensor]:
        activations = [cast(value).detach().requires_grad_() for value in inputs]
        trained = {f"d{name}": value for name, value in block.named_parameters() if value.requires_grad}
        outputs = block(*activations)
        grads = torch.autograd.grad(outputs, [*activations, *trained.values()], cast(gradients))
        names = [*(f"y{i}" for i in range(len(outputs))), *(f"dx{i}" for i in range(len(inputs))), *trained]
        return dict(zip(names, [*outputs, *grads], strict=True))

    def same(value: Any) -> Any:
        return value

    exact = compute(make_block(case, True, device).double(), _double)
    accelerated = fastlora.accelerate(make_block(case, True, device))
    eager = forced(lambda _: compute(accelerated, same), "reference")(0)
    values = forced(lambda _: compute(accelerated, same), implementation or ops.forced)(0)
    return [_error(name, values[name].detach(), eager[name].detach(), exact[name].detach()) for name in exact]


def errors_beside_peft(
    case: LoRALinearCase, implementations: Sequence[str], device: torch.device
) -> dict[str, dict[str, float]]:
    """||result - exact|| / ||exact|| of PEFT's own layer and of each implementation of the accelerated one, without dropout, by result.

    float32 adapters on a 16-bit base run under autocast, as PEFT trains them. Returns {"peft" or an implementation: {"y": ..., "dx": ...}}.
    """
    torch.manual_seed(0)
    M, K, N = case.M, case.K, case.N
    x, dy = (random_tensor(M, width, dtype=case.dtype, device=device) for width in (K, N))
    weight = random_tensor(N, K, dtype=case.dtype, device=device, scale=K**-0.5)
    pair = make_adapter(K, N, case.R, case.adapter_dtype, device)

    def compute(layer: nn.Module, cast: Callable[[Any], Any], autocast: bool) -> dict[str, Tensor]:
        activation = cast(x).detach().requires_grad_()
        adapter = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        with torch.autocast(device.type, case.dtype, enabled=autocast):
            y = layer(activation)
        grads = torch.autograd.grad(y, [activation, *adapter], cast(dy))
        return dict(zip(("y", "dx", "da", "db"), (y.detach(), *grads), strict=True))

    autocast = case.adapter_dtype != case.dtype
    layer = peft_layer(weight, None, [pair], 0.0, True)
    found = {"peft": compute(layer, lambda value: value, autocast)}
    fastlora.accelerate(layer)
    for name in implementations:
        found[name] = forced(lambda _: compute(layer, lambda value: value, autocast), name)(0)
    double = [nn.Parameter(_double(one)) for one in pair]
    exact = compute(peft_layer(_double(weight), None, [(double[0], double[1])], 0.0, True), _double, False)
    return {
        name: {
            result: ((value.double() - exact[result]).norm() / exact[result].norm()).item()
            for result, value in values.items()
        }
        for name, values in found.items()
    }


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
