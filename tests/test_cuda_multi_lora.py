"""csrc/cuda/multi_lora.cu on an emulated card (emulated.py): forward against the float64 reference, group by group.

Every test runs with the threads and blocks in ascending and in descending order. The emulated card has 16 multiprocessors: small N splits K.
"""

import ctypes
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import emulated
import pytest
import torch
from bounds import assert_within_bound, double, gapped, make_layer, next_seed, transposed
from torch import Tensor

from fastlora import reference
from fastlora.functional import RowGroups

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
RANKS = (1, 8, 16, 40)

pytestmark = pytest.mark.skipif(not emulated.available(), reason="needs a C++20 compiler")


@pytest.fixture(scope="module")
def card() -> ctypes.CDLL:
    return emulated.load()


@pytest.fixture(autouse=True, params=["ascending", "descending"])
def order(request: pytest.FixtureRequest, card: ctypes.CDLL) -> Iterator[None]:
    card.emulated_descending(request.param == "descending")
    yield
    card.emulated_descending(0)


class Arguments(NamedTuple):
    """What the operator takes, in its order."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_a: list[Tensor]
    lora_b: list[Tensor]
    scale: list[float]
    dropout_p: list[float]
    seed: Tensor | None
    order: Tensor
    offsets: Tensor


def make(
    index: list[int],
    ranks: tuple[int, ...] = RANKS,
    K: int = 200,
    N: int = 72,
    dtype: torch.dtype = BF16,
    adapter_dtype: torch.dtype | None = None,
    dropout: bool = False,
    bias: bool = True,
) -> Arguments:
    layers = [make_layer(len(index), K, N, rank, dtype, adapter_dtype, bias) for rank in ranks]
    x, weight, frozen, *_ = (None if tensor is None else tensor.detach() for tensor in layers[0])
    chances = [(0.0, 0.3, 0.5, 1.0)[i % 4] if dropout else 0.0 for i in range(len(ranks))]
    return Arguments(
        x,
        weight,
        frozen,
        [layer.lora_a.detach() for layer in layers],
        [layer.lora_b.detach() for layer in layers],
        [(-1) ** i * (0.5 + i) for i in range(len(ranks))],
        chances,
        next_seed("cpu", 1) if dropout else None,
        *RowGroups(torch.tensor(index, dtype=torch.int64), len(ranks)).for_rows(len(index)),
    )


def run(given: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    return emulated.operators()["multi_lora", "cuda"](*given)


def exact(given: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, bias = map(double, given[:3])
    lists = ([double(tensor) for tensor in tensors] for tensors in given[3:5])
    return reference.multi_lora(x, weight, bias, *lists, *given[5:])


def check(given: Arguments, expected: Arguments | None = None) -> None:
    """`expected`: the same numbers in another layout, for the reference."""
    expected = expected or given
    y, xa, keep = run(given)
    eager_y, eager_xa, eager_keep = reference.multi_lora(*expected)
    exact_y, exact_xa, _ = exact(expected)
    valid = ~exact_y.isnan().all(1)
    assert y[~valid].isnan().all()
    assert_within_bound("y", y[valid], eager_y[valid], exact_y[valid])
    assert_within_bound("xa", xa, eager_xa, exact_xa)
    assert keep.dtype == torch.uint8 and keep.shape == eager_keep.shape
    if keep.numel():
        K = given.x.shape[1]
        read = torch.zeros(len(y), dtype=torch.bool)
        for i, p in enumerate(given.dropout_p):
            if p:
                read[given.order[given.offsets[i + 1] : given.offsets[i + 2]]] = True
        assert torch.equal(reference.read_keep(keep, K)[read], reference.read_keep(eager_keep, K)[read])


def mixed(M: int) -> list[int]:
    """Adapter 2 has no row; some rows have none, and the numbers 4 and -2 are no adapters'."""
    return [(3, 0, -1, 1, 4, 3, 1, -2, 3)[i * 7 % 9] for i in range(M)]


CASES: dict[str, dict[str, Any]] = {
    "one row": {"index": [3]},
    "one row, base alone": {"index": [-1]},
    "one row, no such adapter": {"index": [9]},
    "no rows": {"index": []},
    "5 rows": {"index": mixed(5), "dtype": F16},
    "5 rows, dropout": {"index": mixed(5), "dropout": True},
    "13 rows, all of one": {"index": [3] * 13, "N": 65, "bias": False},
    "37 rows": {"index": mixed(37), "dropout": True},
    "37 rows, float32 adapters": {"index": mixed(37), "adapter_dtype": F32, "dtype": F16, "N": 40},
    "37 rows, K split": {"index": mixed(37), "K": 2128, "N": 130},
    "64 rows": {"index": mixed(64), "K": 264, "N": 100},
    "64 rows, an adapter each": {"index": list(range(64)), "ranks": tuple(1 + i % 9 for i in range(64)), "K": 64},
    "100 rows": {"index": mixed(100), "K": 72, "dropout": True},
    "5 rows, one column out of an odd width": {"index": mixed(5), "K": 33, "N": 1},
    "no width": {"index": mixed(5), "K": 0},
    "nothing out": {"index": mixed(5), "N": 0},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_bound(case: dict[str, Any]) -> None:
    check(make(**case))


@pytest.mark.parametrize("K", [33, 64], ids=str)
@pytest.mark.parametrize("layout", [gapped, transposed], ids=["gaps", "transposed"])
def test_layouts(layout: Callable[[Tensor], Tensor], K: int) -> None:
    """Views into NaN: what is read beyond a tensor shows."""
    given = make(mixed(19), K=K, N=30)
    laid = {name: layout(getattr(given, name)) for name in ("x", "weight")}
    lists = {name: [layout(tensor) for tensor in getattr(given, name)] for name in ("lora_a", "lora_b")}
    check(given._replace(**laid, **lists, bias=given.bias.repeat_interleave(2)[::2]), given)


def test_rows_that_lie_apart_are_not_copied() -> None:
    given = make(mixed(9), K=64)
    around = torch.full((9, 88), torch.nan, dtype=BF16)
    x = around[:, 8:72].copy_(given.x)
    check(given._replace(x=x), given)


def test_the_order_of_threads_does_not_matter(card: ctypes.CDLL) -> None:
    """Bitwise, with sums of several blocks: the last to come is another one."""
    given = make(mixed(37), K=2128, N=130, dropout=True)
    results = []
    for descending in (0, 1):
        card.emulated_descending(descending)
        results.append(run(given)[:2])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first.nan_to_num(), second.nan_to_num())


def test_an_adapter_of_nan_keeps_to_its_rows() -> None:
    given = make([0, 1, 0, 1, -1])
    for tensor in (given.lora_a[0], given.lora_b[0]):
        tensor.fill_(torch.inf)
    y, _, _ = run(given)
    assert not y[[0, 2]].isfinite().any() and y[[1, 3, 4]].isfinite().all()


def test_numbers_that_cannot_be() -> None:
    """An order and offsets out of range touch nothing that is not there; rows that are not named are not written."""
    given = make([0, 1, 0, 1, -1])
    for order, offsets in (([0, 7, -3, 2**40, 4], None), (None, [0, -5, 2**40, 3, 1, -1, 9])):
        wrong = given._replace(
            order=given.order if order is None else torch.tensor(order),
            offsets=given.offsets if offsets is None else torch.tensor(offsets),
        )
        assert run(wrong)[0].shape == (5, 72)


WRONG: dict[str, tuple[str, dict[str, Any]]] = {
    "x: float32": ("x", {"x": torch.ones(6, 16)}),
    "x: 1-D": ("x", {"x": torch.ones(16, dtype=BF16)}),
    "weight: another K": ("weight", {"weight": torch.ones(12, 15, dtype=BF16)}),
    "weight: dtype": ("weight", {"weight": torch.ones(12, 16)}),
    "bias: another N": ("bias", {"bias": torch.ones(11, dtype=BF16)}),
    "lora_a: none": ("lora_a", {"lora_a": [], "lora_b": []}),
    "lora_a: another K": ("lora_a[1]", {"lora_a": [torch.ones(4, 16).bfloat16(), torch.ones(2, 15).bfloat16()]}),
    "lora_a: dtype": ("lora_a[0]", {"lora_a": [torch.ones(4, 16).half(), torch.ones(2, 16).half()]}),
    "lora_a: rank 0": ("lora_a[0]", {"lora_a": [torch.ones(0, 16).bfloat16(), torch.ones(2, 16).bfloat16()]}),
    "lora_b: too few": ("lora_b", {"lora_b": [torch.ones(12, 4).bfloat16()]}),
    "lora_b: another rank": ("lora_b[1]", {"lora_b": [torch.ones(12, 4).bfloat16(), torch.ones(12, 4).bfloat16()]}),
    "lora_b: dtype": ("lora_b[0]", {"lora_b": [torch.ones(12, 4), torch.ones(12, 2)]}),
    "scale: too few": ("scale", {"scale": [1.0]}),
    "dropout_p: too few": ("dropout_p", {"dropout_p": [0.5]}),
    "dropout_p: above 1": ("dropout_p[1]", {"dropout_p": [0.5, 1.5]}),
    "seed: dtype": ("seed", {"seed": torch.tensor(1, dtype=torch.int32)}),
    "seed: two": ("seed", {"seed": torch.tensor([1, 2])}),
    "order: too short": ("order", {"order": torch.arange(5)}),
    "order: dtype": ("order", {"order": torch.arange(6).int()}),
    "offsets: too short": ("offsets", {"offsets": torch.arange(4)}),
}


@pytest.mark.parametrize(("name", "changes"), WRONG.values(), ids=WRONG)
def test_wrong_arguments(name: str, changes: dict[str, Any]) -> None:
    given = make([0, 1, -1, 1, 0, 0], (4, 2), K=16, N=12)
    with pytest.raises(RuntimeError, match=rf"(^|\s){re.escape(name)}: got .*expected"):
        run(given._replace(**changes))
