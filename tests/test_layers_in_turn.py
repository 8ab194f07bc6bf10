"""operators/lora_linear.py where layers that share x run one after the other: results, ranks, masks and gradients are those of all together."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fastlora import reference
from fastlora.operators import lora_linear

M, K, N = 5, 16, (6, 4, 3)
RANKS = (2, 5, 3)


class Ran(NamedTuple):
    """The number of layers of each call that ran them apart; and what every choice was asked for: dropout, mixed."""

    layers: list[int]
    asked: list[tuple[bool, bool]]


@pytest.fixture(params=["forward", "backward"])
def in_turn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Ran:
    """One of the two runs its layers one by one, the other all together."""
    ran = Ran([], [])

    def chosen(x: Tensor, weight: Any, dropout: bool, mixed: bool, backward: bool) -> tuple[Any, bool]:
        function = reference.lora_linear_backward if backward else reference.lora_linear
        ran.asked.append((dropout, mixed))
        apart = backward is (request.param == "backward")

        def counting(*arguments: Any) -> Any:
            if apart:
                ran.layers.append(len(arguments[2 if backward else 1]))
            return function(*arguments)

        return counting, not apart

    monkeypatch.setattr(lora_linear, "_chosen", chosen)
    return ran


def all_together(x: Tensor, weight: Any, dropout: bool, mixed: bool, backward: bool) -> tuple[Any, bool]:
    return reference.lora_linear_backward if backward else reference.lora_linear, True


def arguments(S: int = 1) -> tuple[Any, ...]:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(M, K, generator=draw, requires_grad=True)
    weight = [torch.randn(n, K, generator=draw) for n in N]
    bias = [torch.randn(N[0], generator=draw), None, torch.randn(N[2], generator=draw)]
    a = [torch.randn(r + i, K, generator=draw).requires_grad_() for r in RANKS for i in range(S)]
    b = [
        torch.randn(n, r + i, generator=draw).requires_grad_() for n, r in zip(N, RANKS, strict=True) for i in range(S)
    ]
    return x, weight, bias, a, b, [0.5 + i for i in range(len(a))]


def results(p: list[float], S: int = 1, rows: Any = None) -> list[Tensor]:
    x, weight, bias, a, b, scale = arguments(S)
    torch.manual_seed(3)
    ys = lora_linear.compute(x, weight, bias, a, b, scale, p, rows)
    return [*ys, *torch.autograd.grad(sum(y.square().sum() for y in ys), [x, *a, *b])]


@pytest.mark.parametrize("p", [[0.0] * 3, [0.5] * 3, [0.0, 0.5, 0.0]], ids=["none", "every", "one"])
def test_equal_to_all_together(p: list[float], in_turn: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    found = results(p)
    assert in_turn.layers == [1, 1, 1] and in_turn.asked == [(any(p), False)] * 2
    monkeypatch.undo()
    monkeypatch.setattr(lora_linear, "_chosen", all_together)
    for one, other in zip(found, results(p), strict=True):
        torch.testing.assert_close(one, other)


def test_rows_of_their_own_adapters(in_turn: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = lora_linear.group_rows(torch.tensor([1, -1, 0, 1, 0]), 2)
    p = [0.0, 0.5] * 3
    found = results(p, 2, rows)
    assert in_turn.layers == [1, 1, 1] and in_turn.asked == [(True, True)] * 2
    monkeypatch.undo()
    monkeypatch.setattr(lora_linear, "_chosen", all_together)
    for one, other in zip(found, results(p, 2, rows), strict=True):
        torch.testing.assert_close(one, other)


def test_what_is_left_for_a_backward_that_runs_them_together() -> None:
    """xa as wide as the largest rank, zero beyond a layer's own, and bits for every layer where one of them drops."""
    x, weight, bias, a, b, scale = arguments()
    seed = torch.tensor([5, 6, 7])
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(lora_linear, "_chosen", lambda *_: (reference.lora_linear, False))
        for p in ([0.0, 0.5, 0.0], [0.5] * 3):
            _, xa, keep = lora_linear.run(x, weight, bias, a, b, scale, p, seed, None, None)
            _, together, bits = reference.lora_linear(x, weight, bias, a, b, scale, p, seed, None, None)
            assert xa.shape == together.shape == (3, M, 5) and keep.shape == bits.shape
            for g, r in enumerate(RANKS):
                torch.testing.assert_close(xa[g, :, :r], together[g, :, :r])
                assert not xa[g, :, r:].any()
                assert not p[g] or torch.equal(keep[g], bits[g])
        _, _, keep = lora_linear.run(x, weight, bias, a, b, scale, [0.0] * 3, None, None, None)
        assert keep.numel() == 0


def test_a_cast_leaves_out_the_bias_that_is_not_there(in_turn: Ran) -> None:
    x, weight, bias, a, b, scale = arguments()
    ys = lora_linear.compute(x, weight, bias, a, b, scale, [0.0] * 3, cast=torch.bfloat16)
    for y, w, c in zip(ys, weight, bias, strict=True):
        assert y.dtype is torch.bfloat16 and y.shape == (M, len(w)) and (c is None or c.dtype is torch.float32)


def test_arguments_without_a_gradient_get_none(in_turn: Ran) -> None:
    x, weight, bias, a, b, scale = arguments()
    x = x.detach()
    a[0], b[2] = a[0].detach(), b[2].detach()
    ys = lora_linear.compute(x, weight, bias, a, b, scale, [0.0] * 3)
    ys[1].sum().backward()
    assert a[1].grad is not None and b[1].grad is not None
    assert all(one.grad is None for one in (x, a[0], a[2], b[0], b[2]))


def test_sorted_rows_are_kept_for_four_numbers_of_rows() -> None:
    rows = lora_linear.group_rows(torch.tensor([1, -1]), 2)
    first = rows.for_rows(2)
    assert rows.for_rows(2) is first
    order, offsets = first
    assert order.tolist() == [1, 0] and offsets.tolist() == [0, 1, 1, 2, 2]
    for count in (4, 6, 8):
        rows.for_rows(count)
    assert rows.for_rows(2) is first
    assert rows.for_rows(10)[0].tolist() == [5, 6, 7, 8, 9, 0, 1, 2, 3, 4]
    assert rows.for_rows(2) is not first
