"""Check first, then time: an operator's tests, then the errors of each case before its times are taken.

The bound is the house's (fastlora/bounds.py), for the same inputs, dropout mask included; eager PyTorch is the reference in the working dtype.
"""

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastlora
from fastlora import bounds, functional
from fastlora.frozen import packed

from . import rivals
from .cases import BOTH, CHECKS, TRAINING, BlockCase, Case, LoRALinearCase, MultiLoRACase, PrefixConcatCase
from .machine import ROOT, in_checkout
from .rivals import LoRALayer, PromptBatch, forced

Results = dict[str, Tensor]
Compute = Callable[[bool], Results]  # exactly, in float64, or in the working dtype


class CaseError(RuntimeError):
    """An implementation is outside its error bound on a case that was to be timed."""


class Error(NamedTuple):
    """The worst of an implementation's results, its errors divided by the largest value of the exact result."""

    result: str  # "y", "dx", "da", ...
    error: float
    eager: float
    bound: float


def _double(value: Any) -> Any:
    """Floating-point tensors in float64, in lists too, and trained if they were; anything else as it is."""
    if isinstance(value, list):
        return [_double(one) for one in value]
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    wide = value.detach().double()
    return nn.Parameter(wide) if value.requires_grad else wide


def _and_gradients(outputs: Results, leaves: Mapping[str, Sequence[Tensor]], dy: Sequence[Tensor]) -> Results:
    """The outputs, and under the name of some leaves their gradients, one after the other."""
    every = [leaf for some in leaves.values() for leaf in some]
    grads = iter(torch.autograd.grad(list(outputs.values()), every, list(dy)))
    found = {name: torch.cat([next(grads).flatten() for _ in some]) for name, some in leaves.items()}
    return {name: value.detach() for name, value in outputs.items()} | found


def _linear(case: LoRALinearCase | MultiLoRACase, training: bool, device: torch.device) -> Compute:
    (layer,) = rivals.make_layers(case, training, device)
    rest: dict[str, Any] = {"dropout_p": case.dropout_p, "training": training}
    if isinstance(case, LoRALinearCase):
        packed.register(layer.weight, packed.Budget())  # as `accelerate` does: what is checked is what is timed
    else:
        index = torch.tensor(case.adapters_of_examples(), device=device)

    def compute(exactly: bool) -> Results:
        x, weight, bias, lora_a, lora_b, dy = map(_double, layer) if exactly else layer
        if isinstance(case, LoRALinearCase):
            y = functional.lora_linear(x, weight, bias, lora_a[0], lora_b[0], rivals.SCALE, **rest)
        else:
            y = functional.multi_lora(x, weight, bias, lora_a, lora_b, [rivals.SCALE] * len(lora_a), index, **rest)
        return _and_gradients({"y": y}, {"dx": [x], "da": lora_a, "db": lora_b}, [dy]) if training else {"y": y}

    return compute


def _prefix_concat(case: PrefixConcatCase, training: bool, device: torch.device) -> Compute:
    batch = rivals.make_prompt_batch(case, device)
    dout = rivals.random_tensor(case.B, case.T + case.P, case.D, dtype=case.dtype, device=device)

    def compute(exactly: bool) -> Results:
        given = PromptBatch(*map(_double, batch)) if exactly else batch
        results = rivals.concat_fused(given)()._asdict()
        if training:
            dy = _double(dout) if exactly else dout
            results |= _and_gradients({"embeds": results["embeds"]}, {"dprompts": [given.prompts]}, [dy])
        return results

    return compute


def _block(case: BlockCase, device: torch.device) -> Compute:
    """Without dropout; the exact results are PEFT's own."""
    case = replace(case, dropout_p=0.0)
    inputs, dy = rivals.block_inputs(case, device)
    exact = rivals.make_block(case, True, device).double()
    accelerated = fastlora.accelerate(rivals.make_block(case, True, device))

    def compute(exactly: bool) -> Results:
        block, given, gradients = (exact, _double(inputs), _double(dy)) if exactly else (accelerated, inputs, dy)
        leaves = {f"dx{i}": [x] for i, x in enumerate(given)}
        leaves |= {name: [value] for name, value in block.named_parameters() if value.requires_grad}
        return _and_gradients({f"y{i}": y for i, y in enumerate(block(*given))}, leaves, gradients)

    return compute


def results_of(case: Case | BlockCase, training: bool, device: torch.device) -> Compute:
    """A function that computes every result of the case by name, always of the same tensors and with the same dropout."""
    torch.manual_seed(0)
    if isinstance(case, BlockCase):
        compute = _block(case, device)
    elif isinstance(case, PrefixConcatCase):
        compute = _prefix_concat(case, training, device)
    else:
        compute = _linear(case, training, device)

    def seeded(exactly: bool) -> Results:
        torch.manual_seed(1)
        with torch.set_grad_enabled(training):
            return compute(exactly)

    return seeded


def errors(
    case: Case | BlockCase, training: bool, implementation: str | None, device: torch.device
) -> dict[str, bounds.Errors]:
    """The errors of every result of a case over the largest value of the exact one. implementation: None for what `choose` says.

    Raises:
        fastlora.ops.ImplementationError: the implementation is not here.
    """
    compute = results_of(case, training, device)
    exact, eager = (forced(compute, "reference")(exactly) for exactly in (True, False))
    values = forced(compute, implementation)(False)
    return {name: _relative(name, values[name], eager[name], exact[name]) for name in exact}


def _relative(name: str, value: Tensor, eager: Tensor, exact: Tensor) -> bounds.Errors:
    try:
        found = bounds.compare(value, eager, exact)
    except ValueError as error:
        raise RuntimeError(f"{name}: {error}") from error
    largest = max(bounds.largest_value(exact), torch.finfo(torch.float32).tiny)
    return bounds.Errors(*(one / largest for one in found))


def require_right(what: str, found: Mapping[str, bounds.Errors]) -> Error:
    """The worst of the errors: outside its bound if there is one, else the largest.

    Raises:
        CaseError: it is beyond its bound.
    """
    name, worst = max(found.items(), key=lambda one: (not one[1].within, one[1].error))
    if not worst.within:
        raise CaseError(f"{what}: the error of {name} is {worst.error:.2g}, its bound {worst.bound:.2g}: not timed")
    return Error(name, worst.error, worst.eager, worst.bound)


def errors_beside_peft(case: LoRALinearCase, names: Sequence[str], device: torch.device) -> dict[str, dict[str, float]]:
    """||result - exact|| / ||exact|| of PEFT's own layer and of each implementation named of the accelerated one, without dropout, by result.

    float32 adapters on a 16-bit base run under autocast, as PEFT trains them. Returns {"peft" or an implementation: {"y": ..., "dx": ...}}.
    """
    torch.manual_seed(0)
    (own,) = rivals.make_layers(case, True, device)

    def compute(module: nn.Module, one: LoRALayer, autocast: bool) -> Results:
        with torch.autocast(device.type, case.dtype, enabled=autocast):
            y = module(one.x)
        return _and_gradients({"y": y}, {"dx": [one.x], "da": one.lora_a, "db": one.lora_b}, [one.dy])

    wide = LoRALayer(*map(_double, own))
    exact = compute(rivals.peft_layer(wide, 0.0, True), wide, False)
    layer, autocast = rivals.peft_layer(own, 0.0, True), case.adapter_dtype != case.dtype
    found = {"peft": compute(layer, own, autocast)}
    fastlora.accelerate(layer)
    found |= {name: forced(compute, name)(layer, own, autocast) for name in names}
    return {
        name: {
            result: ((value.double() - exact[result]).norm() / exact[result].norm()).item()
            for result, value in values.items()
        }
        for name, values in found.items()
    }


def check(operator: str, device: torch.device) -> list[str]:
    """What is wrong with the implementations worth timing, on small, awkward cases against the float64 reference."""
    wrong = []
    for case in CHECKS[operator]:
        for pass_ in BOTH:
            training = pass_ == TRAINING
            for name in rivals.implementations(case, training, device):
                try:
                    require_right(f"{operator} {name}, {case.name}, {pass_}", errors(case, training, name, device))
                except CaseError as error:
                    wrong.append(str(error))
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
