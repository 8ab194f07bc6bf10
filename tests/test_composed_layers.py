"""peft/composed.py's parts: whose rows have which factor, bias and dropout, with one adapter for all rows and with rows of several."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastlora.operators import lora_linear
from fastlora.operators.dora_factor import KeptNorm
from fastlora.operators.lora_linear import group_rows
from fastlora.peft import composed
from fastlora.peft.obstacles import Added, Plan

K, N, R = 4, 3, 2
X = torch.arange(20.0).view(5, K) + 1
INDEX = torch.tensor([1, -1, 0, 1, 2])  # of each row its adapter's number
ROWS = group_rows(INDEX, 4)  # the last has no row


def plan_of(doras: Any = (), dropout: Any = (0.0, 0.0, 0.0, 0.0), added: Any = (), bias: Tensor | None = None) -> Plan:
    """Four adapters, or as many as have a dropout; of these numbers DoRAs."""
    torch.manual_seed(0)
    count = len(dropout)
    lora_a, lora_b = [torch.randn(R, K) for _ in range(count)], [torch.randn(N, R) for _ in range(count)]
    return Plan(
        weight=torch.randn(N, K), bias=bias, transposed=False, lora_a=lora_a, lora_b=lora_b, scale=[0.5] * count,
        dropout_p=list(dropout), magnitude={i: torch.full((N,), i + 2.0) for i in doras},
        norm={i: KeptNorm() for i in doras}, added=list(added),
    )  # fmt: skip


def by_row(plan: Plan, x: Tensor, row: int) -> Tensor:
    """(W + s B A) x of one row by its own adapter, times m / ||W + s B A|| of a DoRA."""
    i = int(INDEX[row])
    weight = plan.weight if i < 0 else plan.weight + plan.scale[i] * plan.lora_b[i] @ plan.lora_a[i]
    factor = plan.magnitude[i] / weight.norm(dim=1) if i in plan.magnitude else 1
    return factor * (weight @ x[row])


BIAS, OF_A, OF_B = torch.tensor([1.0, 2, 3]), torch.tensor([10.0, 20, 30]), torch.tensor([100.0, 200, 300])


def test_biases_of_all_rows_are_added_in_place() -> None:
    y = torch.zeros(5, N)
    for rows, added in ((None, [Added(BIAS, 1.0, None), Added(OF_A, 2.0, 0)]), (ROWS, [Added(BIAS, 1.0, None)])):
        found = composed.add_biases(y.zero_(), plan_of(added=added), rows)
        assert found is y and torch.equal(found, (BIAS + 2 * OF_A * (rows is None)).expand(5, -1))


def test_biases_of_rows_are_their_own_adapters() -> None:
    added = [Added(BIAS, 1.0, None), Added(OF_A, 2.0, 0), Added(OF_B, 1.0, 1)]
    found = composed.add_biases(torch.zeros(5, N), plan_of(added=added), ROWS)
    of = {0: 2 * OF_A, 1: OF_B}
    assert torch.equal(found, torch.stack([BIAS + of.get(int(i), torch.zeros(N)) for i in INDEX]))


@pytest.mark.parametrize("bias", [None, BIAS])
def test_rows_are_scaled_by_their_own_factors(bias: Tensor | None) -> None:
    u, factors = torch.ones(5, N), {0: torch.full((N,), 2.0), 1: torch.full((N,), 3.0)}
    expected = torch.tensor([3.0, 1, 2, 3, 1])[:, None].expand(-1, N) + (0 if bias is None else bias)
    assert torch.equal(composed.scale_rows(u, factors, ROWS, bias), expected)


@pytest.mark.parametrize("bias", [None, BIAS])
def test_a_mixed_batch_of_doras_and_others(bias: Tensor | None, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, factored = plan_of(doras=(0, 1, 3), bias=bias), []
    factor = composed._factor
    monkeypatch.setattr(composed, "_factor", lambda one, place: factored.append(place) or factor(one, place))
    (y,) = composed.compute_dora([plan], X, None, ROWS)
    expected = torch.stack([by_row(plan, X, row) for row in range(5)]) + (0 if bias is None else bias)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-4)
    assert sorted(factored) == [0, 1]  # not of an adapter without a row


def test_a_plain_adapters_dropout_is_the_operators_and_a_doras_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, given = plan_of(doras=(0, 1), dropout=(0.1, 0.2, 0.3, 0.4)), []
    monkeypatch.setattr(lora_linear, "compute", lambda *args: given.append(args[6]) or [X[:, :N]])
    composed._updated([plan], X, None, ROWS)
    assert given == [[0.0, 0.0, 0.3, 0.4]]


def test_dropout_of_a_dora_is_of_its_own_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """y = W (x - d(x)) + c (W + s B A) d(x), where d is here a factor."""
    monkeypatch.setattr(composed.F, "dropout", lambda x, p: x * (1 - p))
    monkeypatch.setattr(lora_linear, "compute", without_dropout(lora_linear.compute))
    plan = plan_of(doras=(0, 1), dropout=(0.5, 0.25, 0.75, 0.0), bias=BIAS)
    kept = X * torch.tensor([0.75, 1, 0.5, 0.75, 1])[:, None]
    found = composed._with_dropout(plan, X, None, ROWS)
    expected = (X - kept) @ plan.weight.T + BIAS + torch.stack([by_row(plan, kept, row) for row in range(5)])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    one = plan_of(doras=(0,), dropout=(0.5,))
    found = composed._with_dropout(one, X, None, None)
    weight = one.weight + 0.5 * one.lora_b[0] @ one.lora_a[0]
    expected = X / 2 @ one.weight.T + 2.0 / weight.norm(dim=1) * (X / 2 @ weight.T)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def without_dropout(compute: Any) -> Any:
    return lambda *args: compute(*args[:6], [0.0] * len(args[6]), *args[7:])


@pytest.mark.parametrize("dropout", [(0.0,), (0.5,), (0.0, 0.0)], ids=str)
def test_a_heads_loss(dropout: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    dropped: list[float] = []
    monkeypatch.setattr(composed.F, "dropout", lambda x, p: dropped.append(p) or x * (1 - p))
    plan, labels = plan_of(dropout=dropout, bias=BIAS), torch.tensor([0, 2, 1, 1, 0])
    weight = plan.weight + sum(0.5 * (1 - p) * b @ a for p, a, b in zip(dropout, plan.lora_a, plan.lora_b, strict=True))
    expected = torch.nn.functional.cross_entropy(X @ weight.T + BIAS, labels, reduction="sum")
    torch.testing.assert_close(composed.cross_entropy(plan, X, labels), expected, rtol=1e-5, atol=1e-4)
    assert dropped == ([0.5] if 0.5 in dropout else [])
