"""What runs layers and their backward: the case that they are, by rows, dropout and weight as they were measured; together where that gains."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from measurements import entry, hold

from fastlora import ops
from fastlora.choice import table
from fastlora.frozen import composed
from fastlora.functional import group_rows
from fastlora.operators import lora_linear
from fastlora.operators.lora_linear import CASES

EVERY_CASE = pytest.mark.parametrize(("shared", "mixed"), CASES, ids=CASES.values())
Ran = list[tuple[str, str, int]]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Ran:
    """What has run so far: the case, the implementation, and how many layers it was given. Each computes as the reference does."""
    seen: Ran = []

    def noting(case: str, name: str) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            seen.append((case, name, len(args["_backward" not in case])))
            return ops.implementations[case, "plain"](*args)

        return run

    every = [case + suffix for case in CASES.values() for suffix in ("", "_backward")]
    plain = {(case, "plain"): ops.implementation(case, "reference") for case in every}
    noted = {(case, name): noting(case, name) for case in every for name in ("reference", "cpu")}
    monkeypatch.setattr(ops, "implementations", ops.implementations | plain | noted)
    monkeypatch.setattr(ops, "forced", None)
    return seen


def train(shared: bool, mixed: bool, rows: int = 64, dropout_p: float = 0.0) -> None:
    """Forward and backward of two layers or of one, of two adapters or of one."""
    G, S = 1 + shared, 1 + mixed
    x, a, b = (torch.randn(shape, requires_grad=True) for shape in ((rows, 24), (2, 24), (16, 2)))
    adapters = [a] * (G * S), [b] * (G * S), [1.0] * (G * S), [dropout_p] * (G * S)
    groups = group_rows(torch.arange(rows) % 2, 2) if mixed else None
    ys = lora_linear.compute(x, [torch.randn(16, 24)] * G, [None] * G, *adapters, groups)
    torch.stack(list(ys)).sum().backward()


def both(case: str) -> tuple[str, str]:
    return case, f"{case}_backward"


def names(shared: bool, mixed: bool) -> list[str]:
    """Of the case, and of its layers alone."""
    return [name for case in {CASES[shared, mixed], CASES[False, mixed]} for name in both(case)]


@EVERY_CASE
def test_each_case_runs_what_is_implemented_for_it(shared: bool, mixed: bool, ran: Ran) -> None:
    """All layers at once."""
    train(shared, mixed)
    assert ran == [(name, "cpu", 1 + shared) for name in both(CASES[shared, mixed])]


@EVERY_CASE
def test_dropout_is_measured_apart(shared: bool, mixed: bool, ran: Ran) -> None:
    """Where plain PyTorch is faster it runs the layers one by one."""
    every = [(2.0 if dropout else 0.5, name, dropout) for name in names(shared, mixed) for dropout in (False, True)]
    hold(*(entry(ratio, name, dropout=dropout) for ratio, name, dropout in every))
    for dropout_p in (0.0, 0.5, 0.0):
        train(shared, mixed, dropout_p=dropout_p)
    together = [(name, "cpu", 1 + shared) for name in both(CASES[shared, mixed])]
    apart = [(name, "reference", 1) for name in both(CASES[False, mixed]) for _ in range(1 + shared)]
    assert ran == [*together, *apart, *together]


@EVERY_CASE
def test_rows_decide(shared: bool, mixed: bool, ran: Ran) -> None:
    hold(*(entry(ratio, name, rows) for ratio, rows in ((2.0, 1), (0.5, 64)) for name in names(shared, mixed)))
    for rows in (64, 1, 64):
        train(shared, mixed, rows)
    assert [name for _, name, _ in ran] == ["cpu"] * 2 + ["reference"] * (2 + 2 * shared) + ["cpu"] * 2


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("has_both", [True, False])
def test_what_is_forced_runs_layers_together_if_it_can(
    mixed: bool, has_both: bool, ran: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "forced", "cpu")
    if not has_both:
        for name in both(CASES[True, mixed]):
            monkeypatch.delitem(ops.implementations, (name, "cpu"))
    train(True, mixed)
    apart = [(name, "cpu", 1) for name in both(CASES[False, mixed]) for _ in range(2)]
    assert ran == ([(name, "cpu", 2) for name in both(CASES[True, mixed])] if has_both else apart)


@pytest.mark.parametrize("trained", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_the_backward_is_asked_for_what_trains_alone(
    trained: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[bool, ...]] = []
    plain = ops.implementations["lora_linear_backward", "reference"]
    watched = {("lora_linear_backward", "reference"): lambda *args: asked.append(args[-3:]) or plain(*args)}
    monkeypatch.setattr(ops, "implementations", ops.implementations | watched)
    monkeypatch.setattr(ops, "forced", "reference")
    leaves = [
        torch.randn(shape, requires_grad=own)
        for shape, own in zip(((2, 5, 24), (2, 24), (16, 2)), trained, strict=True)
    ]
    x, a, b = leaves
    lora_linear.lora_linear(x, torch.randn(16, 24), None, a, b, 1.0).sum().backward()
    assert asked == [trained] and [one.grad is not None for one in leaves] == list(trained)


@pytest.mark.parametrize("trained", [True, False])
def test_autocast_is_off_where_an_implementation_runs(trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told its dtypes."""
    seen: list[bool] = []

    def watched(case: str) -> Any:
        plain = ops.implementations[case, "reference"]
        return lambda *args: seen.append(torch.is_autocast_enabled("cpu")) or plain(*args)

    cases = {(case, "reference"): watched(case) for case in ("lora_linear", "lora_linear_backward")}
    monkeypatch.setattr(ops, "implementations", ops.implementations | cases)
    monkeypatch.setattr(ops, "forced", "reference")
    x, a, b = torch.randn(5, 24), torch.randn(2, 24), torch.randn(16, 2)
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(trained):
        y = lora_linear.lora_linear(x, torch.randn(16, 24), None, a.requires_grad_(trained), b, 1.0)
        assert y.dtype == torch.bfloat16 and torch.is_autocast_enabled("cpu")
        if trained:
            y.sum().backward()
    assert seen == [False] * (1 + trained)


def test_how_a_weight_lies_is_asked_of_each_on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that CUDA C++ would copy is not run by what ran another of its size."""
    ours = {("lora_linear", name): lambda *_, name=name: name for name in ("reference", "cuda")}
    monkeypatch.setattr(ops, "implementations", ours)
    monkeypatch.setattr(ops, "_loaders", {})
    monkeypatch.setattr(ops, "forced", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    hold(entry(0.5, dtype="bfloat16", implementation="cuda"), device_type="cuda")
    x: Any = SimpleNamespace(is_cuda=True, device=torch.device("cuda"), dtype=torch.bfloat16, shape=(64, 16))
    dense, odd = torch.ones(16, 16), torch.ones(17, 17)[:16, :16]
    ran = [lora_linear.run(x, [one], [None], [], [], [], [], None, None, None) for one in (dense, odd, dense)]
    assert ran == ["cuda", "reference", "cuda"]


def test_ways_to_add_an_adapter_are_measured_on_a_cpu_alone() -> None:
    every = lora_linear.linear_classes("cuda", torch.float32, ["small"])
    assert any(rows >= composed.FEWEST_MEASURED for rows, *_ in every)
    assert list(lora_linear.rank_classes("cuda", torch.float32, ["small"])) == []
    found = list(lora_linear.rank_classes("cpu", torch.float32, ["small"]))
    assert found and min(rows for rows, *_ in found) == composed.FEWEST_MEASURED


def test_ways_to_add_an_adapter_are_measured_with_one_layer_and_one_adapter() -> None:
    found = lora_linear.calls(table.rank_case(4), 4, 8, 6, 5, torch.float32, torch.device("cpu"), False)
    every = [call for calls in found.values() for call in calls]
    assert every and all({len(one) for one in call if isinstance(one, (list, tuple))} == {1} for call in every)
