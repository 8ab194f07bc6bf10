"""Check first, then time: an operator's tests, then the errors of each case before its times are taken.

The bound is the house's (fastlora/bounds.py), for the same inputs, dropout mask included; eager PyTorch is the reference in the working dtype.
"""

import importlib.util
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastlora import bounds
from fastlora.choice import measure

from . import rivals
from .cases import BlockCase, Case, LoRALinearCase
from .machine import ROOT, in_checkout
from .probe import flaws
from .rivals import FASTLORA, Contest, build, forced

AWKWARD = measure.ODD_SHAPE, (1, 65, 48), (130, 257, 96)  # M, K, N
Results = dict[str, Tensor]


class CaseError(RuntimeError):
    """An implementation is outside its error bound on a case that was to be timed."""


@dataclass(frozen=True)
class Error:
    """The worst of an implementation's results, its errors divided by the largest value of the exact result."""

    result: str  # "y", "dx", "da", ...
    error: float
    eager: float
    bound: float


def results_of(contest: Contest, name: str, training: bool) -> Results:
    """Every result of a rival by name, always with the same dropout: its outputs, and in training their gradients."""
    rival = contest.rivals[name]
    torch.manual_seed(1)
    with torch.set_grad_enabled(training):
        given = rival.call(0) if rival.every is None else rival.every()
    if isinstance(given, Tensor):
        outputs = {"y": given}
    else:
        outputs = dict(given) if isinstance(given, Mapping) else {f"y{i}": y for i, y in enumerate(given)}
    if not training:
        return outputs
    (leaves,) = rival.leaves
    differentiable = [value for value in outputs.values() if value.requires_grad]
    every = [leaf for some in leaves.values() for leaf in some]
    grads = iter(torch.autograd.grad(differentiable, every, contest.dy))
    found = {gradient: torch.cat([next(grads).flatten() for _ in some]) for gradient, some in leaves.items()}
    return {output: value.detach() for output, value in outputs.items()} | found


def errors(case: Case, training: bool, implementation: str | None, device: torch.device) -> dict[str, bounds.Errors]:
    """The errors of every result of a case over the largest value of the exact one. implementation: None for what `choose` says.

    A block is checked without dropout, for its exact results are PEFT's own.

    Raises:
        fastlora.ops.ImplementationError: the implementation is not here.
    """
    judge = FASTLORA
    if isinstance(case, BlockCase):
        case, judge = replace(case, dropout_p=0.0), "peft"
    wide = build(case, training, device, [judge], to_check=True, exactly=True)
    right = forced(results_of, "reference")(wide, judge, training)
    contest = build(case, training, device, [FASTLORA], to_check=True)
    eager, values = (forced(results_of, name)(contest, FASTLORA, training) for name in ("reference", implementation))
    found = {}
    for name, exact in right.items():
        largest = max(bounds.largest_value(exact), torch.finfo(torch.float32).tiny)
        one = bounds.compare(values[name], eager[name], exact)
        found[name] = bounds.Errors(*(each / largest for each in one))
    return found


def require_right(case: Case, training: bool, implementation: str | None, device: torch.device) -> Error:
    """The worst of the errors: outside its bound if there is one, else the largest.

    Raises:
        CaseError: it is beyond its bound.
    """
    found = errors(case, training, implementation, device)
    name, worst = max(found.items(), key=lambda one: (not one[1].within, one[1].error))
    if not worst.within:
        what = f"{case.operator} {implementation or 'by choice'}, {case.title(training)}"
        raise CaseError(f"{what}: the error of {name} is {worst.error:.2g}, its bound {worst.bound:.2g}: not timed")
    return Error(name, worst.error, worst.eager, worst.bound)


def errors_beside_peft(case: LoRALinearCase, names: Sequence[str], device: torch.device) -> dict[str, dict[str, float]]:
    """||result - exact|| / ||exact|| of PEFT's own layer and of each implementation named of the accelerated one, without dropout, by result.

    float32 adapters on a 16-bit base run under autocast, as PEFT trains them. Returns {"peft" or an implementation: {"y": ..., "dx": ...}}.
    """
    case = replace(case, dropout_p=0.0)
    exact = results_of(build(case, True, device, ["peft"], to_check=True, exactly=True), "peft", True)
    contest = build(case, True, device, ["peft", FASTLORA], to_check=True)
    if case.adapter_dtype != case.dtype:
        contest = rivals.under_autocast(contest, case.dtype, device)
    found = {"peft": results_of(contest, "peft", True)}
    found |= {name: forced(results_of, name)(contest, FASTLORA, True) for name in names}
    return {
        name: {
            result: ((value.double() - exact[result]).norm() / exact[result].norm()).item()
            for result, value in values.items()
        }
        for name, values in found.items()
    }


def check(operator: str, device: torch.device) -> list[str]:
    """What is wrong with the implementations on this device, on small, awkward sizes against the float64 reference."""
    return [flaw for shape in AWKWARD for flaw in flaws(device, of=operator, shape=shape)]


def tests_of(operator: str) -> str | None:
    """The file of its own tests, where they can be run: in a checkout with pytest. A step's are those of what `accelerate` does to a PEFT model."""
    name = f"tests/test_{ {'step': 'peft', 'adapters': 'mixed_batches'}.get(operator, operator) }.py"
    here = in_checkout() and (ROOT / name).is_file() and importlib.util.find_spec("pytest") is not None
    return name if here else None


def run_tests(tests: str) -> bool:
    """Run a file of tests in a process of its own; whether they are green."""
    return subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", tests], cwd=ROOT, check=False).returncode == 0
