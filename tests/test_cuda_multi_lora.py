"""csrc/cuda/multi_lora.cu on an emulated card (emulated.py): forward and backward against the float64 reference, adapter by adapter.

Every test runs with the threads and blocks in ascending and in descending order. The emulated card has 16 multiprocessors for few rows, where small
N splits K, and 2 for many.
"""

import ctypes
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import emulated
import pytest
import torch
from bounds import assert_within_bound, double, flip_unread, gapped, make_layer, next_seed, transposed
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


@pytest.fixture(params=[80, 90], ids=["sm_80", "sm_90"])
def capability(request: pytest.FixtureRequest, card: ctypes.CDLL) -> Iterator[None]:
    card.emulated_capability(request.param)
    yield
    card.emulated_capability(80)


class Arguments(NamedTuple):
    """What the forward takes of one layer, in its order."""

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


def of_layer(function: Callable[..., Any], given: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """y [M, N], xa [M, R], keep [M, bytes] or no elements."""
    x, weight, bias, *adapters, seed, order, offsets = given
    seeds = None if seed is None else seed.flatten()
    [y], xa, keep = function(x, [weight], [bias], *adapters, seeds, order, offsets)
    assert xa.shape[0] == 1
    return y, xa[0], keep[0] if keep.numel() else keep


def run(given: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    return of_layer(emulated.operators()["multi_lora", "cuda"], given)


def by_reference(given: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    return of_layer(reference.lora_linear, given)


def exact(given: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, bias = map(double, given[:3])
    lists = ([double(tensor) for tensor in tensors] for tensors in given[3:5])
    return by_reference(Arguments(x, weight, bias, *lists, *given[5:]))


class Backward(NamedTuple):
    """What the backward takes of one layer, in its order."""

    dy: Tensor
    x: Tensor
    weight: Tensor
    lora_a: list[Tensor]
    lora_b: list[Tensor]
    xa: Tensor
    keep: Tensor
    scale: list[float]
    dropout_p: list[float]
    order: Tensor
    offsets: Tensor
    need_dx: bool = True
    need_da: bool = True
    need_db: bool = True


def make_backward(given: Arguments) -> Backward:
    """With what the reference's forward leaves, and bits of dropout that nobody reads flipped."""
    x, weight, _, lora_a, lora_b, scale, dropout_p, _, order, offsets = given
    y, xa, keep = by_reference(given)
    if keep.numel():
        keep = flip_unread(keep, rows_that_drop(given)[:, None].expand(x.shape))
    return Backward(torch.randn_like(y), x, weight, lora_a, lora_b, xa, keep, scale, dropout_p, order, offsets)


def backward_of_layer(function: Callable[..., Any], *given: Any) -> tuple[Tensor, Tensor, Tensor]:
    dy, x, weight, lora_a, lora_b, xa, keep, *rest = given
    return function([dy], x, [weight], lora_a, lora_b, xa[None], keep[None] if keep.numel() else keep, *rest)


def run_backward(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    return backward_of_layer(emulated.operators()["multi_lora_backward", "cuda"], *given)


def backward_by_reference(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    return backward_of_layer(reference.lora_linear_backward, *given)


def check_backward(given: Backward, expected: Backward | None = None, run: Callable[..., Any] = run_backward) -> None:
    """`expected`: the same numbers in another layout, for the reference."""
    expected = expected or given
    eager = backward_by_reference(*expected)
    lists = {name: [double(tensor) for tensor in getattr(expected, name)] for name in ("lora_a", "lora_b")}
    tensors = {name: double(getattr(expected, name)) for name in ("dy", "x", "weight", "xa")}
    right = backward_by_reference(*expected._replace(**lists, **tensors))
    dx, da, db = run(*given)
    valid = ~right[0].isnan().all(1)
    assert dx[~valid].isnan().all()
    assert_within_bound("dx", dx[valid], eager[0][valid], right[0][valid])
    for name, grad, near, far, likes in (
        ("da", da, eager[1], right[1], given.lora_a),
        ("db", db, eager[2], right[2], given.lora_b),
    ):
        sizes = [like.numel() for like in likes]
        each = zip(grad.split(sizes), near.split(sizes), far.split(sizes), strict=True)
        for i, parts in enumerate(each):
            assert_within_bound(f"{name}[{i}]", *parts)


def rows_that_drop(given: Arguments) -> Tensor:
    rows = torch.zeros(len(given.x), dtype=torch.bool)
    for i, p in enumerate(given.dropout_p):
        if p:
            rows[given.order[given.offsets[i + 1] : given.offsets[i + 2]]] = True
    return rows


def check(given: Arguments, expected: Arguments | None = None) -> None:
    """`expected`: the same numbers in another layout, for the reference."""
    expected = expected or given
    y, xa, keep = run(given)
    eager_y, eager_xa, eager_keep = by_reference(expected)
    exact_y, exact_xa, _ = exact(expected)
    valid = ~exact_y.isnan().all(1)
    assert y[~valid].isnan().all()
    assert_within_bound("y", y[valid], eager_y[valid], exact_y[valid])
    assert_within_bound("xa", xa, eager_xa, exact_xa)
    assert keep.dtype == torch.uint8 and keep.shape == eager_keep.shape
    if keep.numel():
        K, read = given.x.shape[1], rows_that_drop(given)
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
    "5 rows, one column out of an odd width": {"index": mixed(5), "K": 33, "N": 1},
    "70 rows, a rank that tiles for many rows do not take": {
        "index": mixed(70),
        "ranks": (1, 513, 2, 9),
        "K": 40,
        "N": 24,
    },
    "no width": {"index": mixed(5), "K": 0},
    "nothing out": {"index": mixed(5), "N": 0},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_bound(case: dict[str, Any]) -> None:
    check(make(**case))


def sequences(*lengths: tuple[int, int]) -> list[int]:
    """The numbers of rows that follow one another: (adapter, rows), ..."""
    return [adapter for adapter, rows in lengths for _ in range(rows)]


# Rows of one adapter fill a tile, or share it; adapter 2 has no row, -1 is the base alone, 5 and more do not exist.
LONG = sequences((3, 130), (0, 20), (-1, 30), (4, 60), (7, 5), (1, 40))
MANY: dict[str, dict[str, Any]] = {
    "65 rows of one": {"index": [1] * 65},
    "100 rows": {"index": mixed(100), "K": 72, "dropout": True},
    "sequences": {"index": LONG, "ranks": (1, 8, 16, 40, 100), "K": 136, "N": 264},
    "sequences, dropout": {"index": LONG, "ranks": (1, 8, 16, 40, 100), "K": 264, "N": 136, "dropout": True},
    "ranks up to 16": {"index": LONG, "ranks": (1, 8, 16, 5, 16), "dropout": True, "dtype": F16},
    "mixed": {"index": mixed(150), "K": 136, "N": 264, "dropout": True},
    "mixed, float32 adapters": {"index": mixed(150), "adapter_dtype": F32, "dtype": F16, "bias": False},
    "odd sizes": {"index": LONG, "ranks": (1, 8, 16, 40, 100), "K": 33, "N": 45, "dropout": True},
    "the base alone": {"index": [-1] * 70, "dropout": True},
    "no such adapters": {"index": [9] * 70},
    "more adapters than go with a launch": {
        "index": [i * 7 % 41 - 1 for i in range(140)],
        "ranks": tuple(1 + i % 19 for i in range(40)),
        "dropout": True,
    },
    "two parts": {"index": sequences((1, 1030), (0, 1100)), "ranks": (3, 4), "K": 72, "N": 40, "dropout": True},
    "ranks up to 64": {"index": LONG, "ranks": (33, 8, 16, 64, 48), "K": 200, "N": 104, "dropout": True},
}


@pytest.mark.parametrize("case", MANY.values(), ids=MANY)
def test_many_rows(capability: None, case: dict[str, Any]) -> None:
    check(make(**case))


FORWARD_ONLY = ("70 rows, a rank that tiles for many rows do not take", "no width", "nothing out")
GRADIENTS = MANY | {name: case for name, case in CASES.items() if name not in FORWARD_ONLY}


@pytest.mark.parametrize("case", GRADIENTS.values(), ids=GRADIENTS)
def test_gradients(capability: None, case: dict[str, Any]) -> None:
    check_backward(make_backward(make(**case)))


@pytest.mark.parametrize("layout", [gapped, transposed], ids=["gaps", "transposed"])
def test_layouts_of_many_rows(capability: None, layout: Callable[[Tensor], Tensor]) -> None:
    given = make(mixed(70), K=33, N=30, dropout=True)
    lists = {name: [layout(tensor) for tensor in getattr(given, name)] for name in ("lora_a", "lora_b")}
    laid = {name: layout(getattr(given, name)) for name in ("x", "weight")}
    check(given._replace(**laid, **lists, bias=given.bias.repeat_interleave(2)[::2]), given)
    backward = make_backward(given)
    saved = {name: layout(getattr(backward, name)) for name in ("dy", "xa")}
    apart = torch.full((70, 32), 0xAA, dtype=torch.uint8)[:, 3 : 3 + backward.keep.shape[1]].copy_(backward.keep)
    check_backward(backward._replace(**laid, **lists, **saved, keep=apart), backward)


NEEDS = [(1, 1, 1), (1, 1, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)]


ANY_ORDER: dict[str, dict[str, Any]] = {
    "several tiles": {"index": LONG, "ranks": (1, 8, 16, 20, 9), "K": 136, "N": 530},
    # Three tiles are shrunk: of two blocks one is at the last of them while the other begins with what needs it.
    "few tiles": {"index": [0] * 72, "ranks": (20, 7), "K": 136, "N": 704},
}


@pytest.mark.parametrize("order", ["ascending"], indirect=True)  # to begin with
@pytest.mark.parametrize("case", ANY_ORDER.values(), ids=ANY_ORDER)
def test_many_rows_in_any_order(card: ctypes.CDLL, capability: None, case: dict[str, Any]) -> None:
    """Bitwise: a wait that is missing would show, as would a sum whose order depends on who comes first."""
    given = make(**case, adapter_dtype=F32, dropout=True)
    backward = make_backward(given)
    forwards, backwards = run(given)[:2], run_backward(*backward)
    for descending, together in ((False, 2), (True, 1)):
        card.emulated_descending(descending)
        card.emulated_together(together)
        try:
            for first, second in zip(forwards, run(given)[:2], strict=True):
                assert torch.equal(first.nan_to_num(), second.nan_to_num())
            for needs in NEEDS:
                got = run_backward(*backward[:-3], *map(bool, needs))
                for first, second, need in zip(backwards, got, needs, strict=True):
                    assert torch.equal(first.nan_to_num(), second.nan_to_num()) if need else second.numel() == 0
        finally:
            card.emulated_together(1)


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


@pytest.mark.parametrize("order", ["ascending"], indirect=True)  # to begin with
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


def test_an_adapter_of_infinities_keeps_to_its_rows(capability: None) -> None:
    """Among the rows of a tile, forward and backward; and to its own gradients."""
    index = [0, 1, 0, 1, -1] * 20 + [1] * 60
    given = make(index, (4, 3), K=40, N=72, dropout=True)
    for tensor in (given.lora_a[0], given.lora_b[0]):
        tensor.fill_(torch.inf)
    infinite = torch.tensor(index) == 0
    y, xa, _ = run(given)
    assert not y[infinite].isfinite().any() and y[~infinite].isfinite().all() and xa[~infinite].isfinite().all()
    backward = make_backward(given)
    dx, da, db = run_backward(*backward)
    assert not dx[infinite].isfinite().any() and dx[~infinite].isfinite().all()
    assert da[4 * 40 :].isfinite().all() and db[4 * 72 :].isfinite().all()


def test_many_rows_by_numbers_that_cannot_be(capability: None) -> None:
    """Nothing that is not there is touched, and nothing is waited for that never comes: places of no row, rows of no place, and of several."""
    given = make(sequences((0, 40), (1, 50)))
    places = torch.arange(90)
    backward = make_backward(given)
    for order in (places, places.flip(0), places // 2, places - 45, places * 2**40, torch.zeros_like(places)):
        for offsets in (
            given.offsets,
            torch.tensor([0, -5, 2**40, 3, 1, -1, 9]),
            torch.tensor([90, 60, 50, 40, 30, 20, 10]),
        ):
            assert run(given._replace(order=order, offsets=offsets))[0].shape == (90, 72)
            assert run_backward(*backward._replace(order=order, offsets=offsets))[0].shape == (90, 200)


def test_gradients_of_no_rows(capability: None) -> None:
    given = make([], (2, 3), K=24, N=40)
    dx, da, db = run_backward(*make_backward(given))
    assert dx.shape == (0, 24) and torch.equal(da, da.new_zeros(5 * 24)) and torch.equal(db, db.new_zeros(5 * 40))


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


WRONG_BACKWARD: dict[str, tuple[str, dict[str, Any]]] = {
    **{case: wrong for case, wrong in WRONG.items() if not wrong[1].keys() & {"bias", "seed"}},
    "dy: another N": ("dy", {"dy": torch.ones(6, 11, dtype=BF16)}),
    "dy: dtype": ("dy", {"dy": torch.ones(6, 12)}),
    "xa: another rank": ("xa", {"xa": torch.ones(6, 2)}),
    "xa: dtype": ("xa", {"xa": torch.ones(6, 4).double()}),
    "keep: dtype": ("keep", {"keep": torch.ones(6, 8)}),
    "keep: fewer rows": ("keep", {"keep": torch.ones(5, 8, dtype=torch.uint8)}),
    "weight: no columns": (
        "weight",
        {name: torch.ones(rows, 0, dtype=BF16) for name, rows in (("x", 6), ("weight", 12))}
        | {"lora_a": [torch.ones(4, 0).bfloat16(), torch.ones(2, 0).bfloat16()]},
    ),
    "lora_a: rank 513": (
        "lora_a",
        {
            "lora_a": [torch.ones(513, 16).bfloat16(), torch.ones(2, 16).bfloat16()],
            "lora_b": [torch.ones(12, 513).bfloat16(), torch.ones(12, 2).bfloat16()],
            "xa": torch.ones(6, 513),
        },
    ),
}


@pytest.mark.parametrize(("name", "changes"), WRONG_BACKWARD.values(), ids=WRONG_BACKWARD)
def test_wrong_arguments_of_the_backward(name: str, changes: dict[str, Any]) -> None:
    given = make_backward(make([0, 1, -1, 1, 0, 0], (4, 2), K=16, N=12))
    with pytest.raises(RuntimeError, match=rf"(^|\s){re.escape(name)}: got .*expected"):
        run_backward(*given._replace(**changes))
