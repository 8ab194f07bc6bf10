"""rotary: queries and keys turned by the angles of their positions, every implementation by its name."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from bounds import gapped
from row_operators import (
    check_bound,
    check_choice,
    check_compiles,
    check_each_alone,
    check_on_meta,
    check_repeats,
    check_without_gradients,
)
from torch import Tensor

from fastlora.functional import rotary

OPERATOR = "rotary"


class Case(NamedTuple):
    B: int = 2
    heads: int = 3
    key_heads: int = 1
    T: int = 5
    D: int = 64
    one_angle: bool = True  # for all rows of the batch


CASES = {
    "no tokens": Case(T=0),
    "two columns": Case(1, 1, 1, 1, 2),
    "odd half": Case(D=34, one_angle=False),
    "a row each": Case(3, 9, 3, 37, 64, one_angle=False),
    "wide heads": Case(1, 2, 2, 7, 128),
}


def eager(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """As transformers' apply_rotary_pos_emb computes it."""

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]

    return turned(q), turned(k)


def draw(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu", by_token: bool = True) -> list[Tensor]:
    """Cosines and sines that are no one angle's, and whose halves differ: nothing of that is relied on."""
    B, heads, key_heads, T, D, one_angle = case

    def of(count: int) -> Tensor:
        return torch.randn(B, T, count, D).transpose(1, 2) if by_token else torch.randn(B, count, T, D)

    angles = (torch.randn(1 if one_angle else B, T, D) for _ in range(2))
    return [one.to(device, dtype) for one in (of(heads), of(key_heads), *angles)]


@pytest.mark.parametrize("layout", [lambda one: one, gapped], ids=["dense", "gaps"])
@pytest.mark.parametrize("by_token", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_bound(
    device: str,
    implementation: str,
    case: Case,
    dtype: torch.dtype,
    by_token: bool,
    layout: Callable[[Tensor], Tensor],
) -> None:
    check_bound(rotary, eager, partial(draw, case, dtype, device, by_token), [0, 1], layout)


def test_heads_of_a_token_lie_together(device: str, implementation: str) -> None:
    for by_token in (True, False):
        for one in rotary(*draw(Case(), device=device, by_token=by_token)):
            assert one.transpose(1, 2).is_contiguous()


def test_gradcheck(device: str) -> None:
    q, k, cos, sin = draw(Case(D=6), torch.float64, device)
    assert torch.autograd.gradcheck(lambda q, k: rotary(q, k, cos, sin), [q.requires_grad_(), k.requires_grad_()])


def test_nothing_depends_on_who_watches(device: str, implementation: str) -> None:
    values = partial(draw, Case(), torch.bfloat16, device)
    check_repeats(rotary, values, [0, 1])
    check_compiles(rotary, values, [0, 1])
    check_on_meta(rotary, values, [0, 1])


def test_each_alone(device: str, implementation: str) -> None:
    check_each_alone(rotary, partial(draw, Case(), device=device), [0, 1])


def test_without_gradients(device: str, implementation: str) -> None:
    check_without_gradients(rotary, partial(draw, Case(), device=device))


def test_tokens_and_elements_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the queries."""
    check_choice("rotary", rotary, draw(Case(B=2, heads=3, T=5, D=64)), 10, 1920, monkeypatch)


def test_opcheck() -> None:
    for operator in (torch.ops.fastlora.rotary, torch.ops.fastlora.rotary_backward):
        torch.library.opcheck(operator.default, draw(Case()))


Q, K, COS = torch.ones(2, 4, 3, 8), torch.ones(2, 2, 3, 8), torch.ones(1, 3, 8)


@pytest.mark.parametrize(
    ("name", "error", "arguments"),
    [
        ("q", TypeError, ([1.0], K, COS, COS)),
        ("q", ValueError, (Q[0], K, COS, COS)),
        ("q", ValueError, (Q[..., :7], K[..., :7], COS[..., :7], COS[..., :7])),
        ("k", ValueError, (Q, K.half(), COS, COS)),
        ("k", ValueError, (Q, K[..., :2, :], COS, COS)),
        ("k", ValueError, (Q, K[:1], COS, COS)),
        ("k", ValueError, (Q, K[:, 0], COS, COS)),
        ("k", ValueError, (Q, torch.tensor(1.0), COS, COS)),
        ("cos", ValueError, (Q, K, COS[0], COS)),
        ("cos", ValueError, (Q, K, COS.expand(3, 3, 8), COS)),
        ("cos", ValueError, (Q, K, torch.ones(1, 3, 8, requires_grad=True), COS)),
        ("sin", ValueError, (Q, K, COS, COS.expand(2, 3, 8))),
        ("sin", ValueError, (Q, K, COS, COS.to("meta"))),
    ],
)
def test_wrong_arguments(name: str, error: type[Exception], arguments: tuple) -> None:
    with pytest.raises(error, match=rf"^{name}: .*expected"):
        rotary(*arguments)


def test_wrong_arguments_to_the_native_operator() -> None:
    native = pytest.importorskip("fastlora._C") and torch.ops.fastlora.rotary_cpu
    for arguments in (
        (Q, K, COS[0], COS),
        (Q, K[..., :4], COS, COS),
        (Q[..., :7], K[..., :7], COS, COS),
    ):
        with pytest.raises(RuntimeError, match="expected"):
            native(*arguments)
