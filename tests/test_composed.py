"""frozen/composed.py: the adapter's part of lora_linear by products of their own, within the bound in each way, and the choice between the ways."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from bounds import (
    Layer,
    assert_within_bound,
    double,
    gapped,
    make_layer,
    print_accepted,
    run_apart,
    transposed,
)
from lora_arguments import Arguments
from measurements import a_machine, half_times, hold, needs_native  # noqa: F401  (fixtures)
from test_native import assert_near_reference_over_inputs, run
from torch import Tensor, nn

import fastlora
from fastlora import ops, reference
from fastlora.choice import table, trial
from fastlora.choice.table import Measurement
from fastlora.frozen import composed, packed
from fastlora.operators.lora_linear import group_rows

pytestmark = needs_native
WAYS = ("composed", "blocked")
SEED = torch.tensor([20_000_000_000])
NUMBERS = [
    (way, dtype, adapter)
    for way in WAYS
    for dtype, adapter in (
        (torch.float32, None),
        (torch.bfloat16, None),
        (torch.bfloat16, torch.float32),
        (torch.float16, None),
        (torch.float16, torch.float32),
    )
    if way == "composed" or dtype is torch.float32
]
EACH = pytest.mark.parametrize(("way", "dtype", "adapter"), NUMBERS)
SHAPES = ((9, 330, 170, 1), (37, 100, 75, 5), (64, 48, 130, 40), (130, 64, 65, 256))  # M, K, N, R


@pytest.fixture(autouse=True)
def libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where torch multiplies in 16 bits by a library."""
    monkeypatch.setattr(packed, "has_library", lambda dtype: True)


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which ways have been gone, forward and backward."""
    gone: list[str] = []
    for name in ("update", "update_backward"):
        function = getattr(composed, name)

        def watch(way: str, *rest: Any, function: Any = function) -> Any:
            gone.append(way)
            return function(way, *rest)

        monkeypatch.setattr(composed, name, watch)
    return gone


def measured(way: str, rank: int = 16, suffix: str = "", dtype: str = "float32", rows: int = 64) -> Measurement:
    case = table.rank_case(rank) + suffix
    return Measurement(case, dtype, rows, "small", False, "cpu", True, 0.5, "measured by a test", way)


@EACH
@pytest.mark.parametrize("p", [0.0, 0.1, 1.0])
def test_bound(
    way: str,
    dtype: torch.dtype,
    adapter: torch.dtype | None,
    p: float,
    ways: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(table, "forced_way", way)
    for M, K, N, R in SHAPES:
        assert_near_reference_over_inputs(partial(make_layer, M, K, N, R, dtype, adapter), p, SEED)
    assert set(ways) == {way}


@EACH
def test_the_same_call_gives_the_same_bits(
    way: str, dtype: torch.dtype, adapter: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "forced_way", way)
    layer = make_layer(100, 130, 70, 64, dtype, adapter)
    first, second = (run(layer, 1.5, 0.1, SEED) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("seed", [None, torch.tensor([3, -5])], ids=["no seed", "dropout"])
@pytest.mark.parametrize("p", [(0.2, 0.1), (0.0, 0.1)])
def test_layers_that_share_x(
    way: str, seed: Tensor | None, p: tuple[float, float], ways: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of different ranks and widths, of which the first may drop nothing."""
    monkeypatch.setattr(table, "forced_way", way)
    x, first, second = torch.randn(21, 40), make_layer(21, 40, 24, 3), make_layer(21, 40, 17, 8)
    columns = zip(*([one.detach() for one in layer[1:5]] for layer in (first, second)), strict=True)
    given = Arguments(x, *map(list, columns), [1.5, 0.7], list(p), seed)
    dy = [torch.randn(21, 24), torch.randn(21, 17)]
    exact = given.mapped(double)
    right = exact.both("reference", [one.double() for one in dy])
    for got, eager, best in zip(given.both("cpu", dy), given.both("reference", dy), right, strict=True):
        assert_within_bound("a result", got, eager, best)
    (_, _, keep), (_, _, other) = given.forward("cpu"), given.forward("reference")
    assert keep.shape == other.shape
    if seed is not None:
        assert torch.equal(*(reference.read_keep(one[1], 40) for one in (keep, other)))
    assert set(ways) == {way}


LAYOUTS = {
    "gaps": gapped,
    "transposed": transposed,
    "every other": lambda tensor: tensor.repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, ::2],
    "expanded": lambda tensor: tensor[:1, :1].expand_as(tensor),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(way: str, layout: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "forced_way", way)

    def draw() -> Layer:
        with torch.no_grad():
            x, weight, bias, a, b, dy = make_layer(11, 18, 14, 6)
            return Layer(layout(x), weight, bias, layout(a), layout(b), layout(dy))

    for p in (0.0, 0.3):
        assert_near_reference_over_inputs(draw, p, SEED)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_not_needed_has_no_elements(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "forced_way", way)
    x, weight, _, a, b, dy = (None if one is None else one.detach() for one in make_layer(12, 16, 20, 4))
    given = Arguments(x, [weight], [None], [a], [b], [2.0], [0.1], SEED)
    _, xa, keep = given.forward("cpu")
    whole = given.backward("cpu", [dy], xa, keep)
    for need in ((True, False, False), (False, True, False), (False, False, True), (False, False, False)):
        for found, one, is_needed in zip(given.backward("cpu", [dy], xa, keep, *need), whole, need, strict=True):
            assert torch.equal(found, one) if is_needed else found.numel() == 0


@pytest.mark.parametrize("way", WAYS)
def test_each_product_is_what_it_says(way: str) -> None:
    """With gaps, too, and whatever the factor."""
    products, M, N, K = composed.PRODUCTS[way], 9, 7, 6
    for layout in (lambda matrix: matrix, *LAYOUTS.values()):
        x, w, c = torch.randn(M, K), layout(torch.randn(N, K)), torch.randn(M, 3)
        torch.testing.assert_close(products.multiply(x, w), x @ w.T)
        v = layout(torch.randn(M, K))
        torch.testing.assert_close(products.sums(c, v), c.T @ v)
        torch.testing.assert_close(products.sums_by_column(c, v), v.T @ c)
        for factor in (1.0, 2.0, 0.5):
            y = torch.randn(M, N)
            expected = y + factor * (x @ w.T)
            products.add(y, x, w, factor)
            torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layers", [1, 2])
def test_what_drops_nothing_keeps_no_bits(way: str, layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether there is a seed or not; of one layer, or of several, if none drops."""
    monkeypatch.setattr(table, "forced_way", way)
    x, weight, _, a, b, dy = (None if one is None else one.detach() for one in make_layer(12, 16, 20, 4))
    for seed in (None, torch.arange(layers)):
        given = Arguments(x, *([one] * layers for one in (weight, None, a, b)), [2.0] * layers, [0.0] * layers, seed)
        _, xa, keep = given.forward("cpu")
        assert keep.shape == (0,) and keep.dtype is torch.uint8 and xa.shape == (layers, 12, 4)


def test_what_is_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The passes always, the others from nine rows on, torch's products where a library has them, and csrc's in float32."""

    def offered(dtype: torch.dtype, rows: int) -> list[str]:
        op = table.rank_case(16)
        return [way for way in (*table.WAYS["cpu", op], "no way") if composed.offers(op, way, dtype, rows)]

    assert offered(torch.float32, 9) == ["passes", "composed", "blocked"]
    assert offered(torch.bfloat16, 9) == ["passes", "composed"]
    assert offered(torch.float32, 8) == ["passes"]
    monkeypatch.setattr(packed, "has_library", lambda dtype: dtype is torch.float32)
    assert offered(torch.bfloat16, 9) == ["passes"] and offered(torch.float32, 9) == ["passes", "composed", "blocked"]
    monkeypatch.setattr(composed, "_draw_dropout", None)
    assert offered(torch.float32, 9) == ["passes"]


def test_what_has_no_elements_goes_by_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As does everything, where csrc cannot drop."""
    x, weight = torch.zeros(64, 16), torch.zeros(20, 16)
    hold(measured("composed"))
    assert composed.choose(x, weight, 4, False, False) == "composed"
    assert composed.choose(x[:, :0], weight[:, :0], 4, False, False) == composed.PASSES
    assert composed.choose(x, weight[:0], 4, False, False) == composed.PASSES
    monkeypatch.setattr(composed, "_draw_dropout", None)
    assert composed.choose(x, weight, 4, False, False) == composed.PASSES


def test_the_measured_way_is_gone(ways: list[str]) -> None:
    """That of the nearest rank, in the forward and the backward each its own; passes where rows are few, mixed, or nothing was measured."""

    def gone(rows: int, rank: int, dtype: torch.dtype = torch.float32, mixed: bool = False) -> list[str]:
        ways.clear()
        x, weight, _, a, b, dy = (
            None if one is None else one.detach() for one in make_layer(rows, 24, 20, rank, dtype)
        )
        order = group_rows(torch.zeros(rows, dtype=torch.int64), 1).for_rows(rows) if mixed else (None, None)
        given = Arguments(x, [weight], [None], [a], [b], [2.0], [0.0], None, *order)
        given.both("cpu", [dy])
        return list(ways)

    assert gone(64, 4) == []
    hold(
        measured("composed", 16),
        measured("blocked", 16, "_backward"),
        measured("blocked", 64),
        measured("passes", 64, "_backward"),
        measured("blocked", 16, dtype="bfloat16"),  # of another build: no such product here
    )
    assert gone(64, 4) == gone(9, 31) == gone(500, 16) == ["composed", "blocked"]
    assert gone(64, 32) == gone(64, 127) == ["blocked"]
    assert gone(64, 128) == gone(8, 16) == gone(64, 16, mixed=True) == gone(64, 16, torch.bfloat16) == []


def test_calls_with_dropout_have_a_way_of_their_own(ways: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured without says nothing of them, in the forward or the backward."""
    monkeypatch.setattr(table, "way", lambda *key: "composed" if key[6] else "passes")
    x, weight, _, a, b, dy = (None if one is None else one.detach() for one in make_layer(64, 24, 20, 4))
    for p, seed, expected in ((0.0, None, []), (0.5, SEED, ["composed"] * 2)):
        ways.clear()
        Arguments(x, [weight], [None], [a], [b], [2.0], [p], seed, None, None).both("cpu", [dy])
        assert ways == expected


def test_the_way_is_told() -> None:
    x, weight = torch.zeros(64, 32), torch.zeros(48, 32)
    told = [
        ("passes", "passes", ""),
        ("composed", "composed", "the adapter by torch's products"),
        ("blocked", "passes", "the adapter by native C++ products in the forward"),
        ("passes", "composed", "the adapter by torch's products in the backward"),
        (
            "blocked",
            "composed",
            "the adapter by native C++ products in the forward, torch's products in the backward",
        ),
    ]
    assert composed.describe(x, weight, 16, False) == ""
    for forward, backward, words in told:
        hold(measured(forward), measured(backward, suffix="_backward"))
        assert composed.describe(x, weight, 16, False) == words


def test_a_model_has_its_own_ranks_measured(machine: Path, timed: list[list[str]], ways: list[str]) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))
    model = get_peft_model(base, LoraConfig(r=100, target_modules=["0"]))
    model.add_adapter("low", LoraConfig(r=2, target_modules=["2"]))
    fastlora.accelerate(model)
    measured_ops = {one.op for one in table.entries("cpu")}
    assert {table.rank_case(64), table.rank_case(16)} <= measured_ops and table.rank_case(256) not in measured_ops
    assert timed[0][0] == "reference"
    hold(*(measured("blocked", 64, suffix) for suffix in ("", "_backward")))
    ways.clear()  # the trial's
    x = torch.randn(40, 16)
    model(x).sum().backward()
    assert ways == ["blocked", "blocked"]
    [reason] = [one.reason for one in fastlora.report(model) if one.name.endswith("0")]
    assert "; the adapter by native C++ products" in reason


def test_a_way_that_is_wrong_is_refused(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = composed.PRODUCTS["blocked"]._replace(multiply=lambda x, w: x @ w.T + 1)
    monkeypatch.setitem(composed.PRODUCTS, "blocked", wrong)
    with pytest.warns(UserWarning, match="cpu blocked is refused for lora_linear_rank_64"):
        trial.try_out({table.rank_case(64): [torch.ones(8, 8)]})
    found = {one.op: one for one in table.entries("cpu")}
    assert found and all(one.checked and one.way in ("passes", "composed") for one in found.values())


def call_wrongly() -> None:
    x, bits = torch.ones(6, 20), torch.ones(6, 8, dtype=torch.uint8)
    of_x = {
        "x: 1-D": ("x", {"x": torch.ones(20)}),
        "x: dtype": ("x", {"x": torch.ones(6, 20).double()}),
        "p: above 1": ("p", {"p": 1.5}),
        "p: NaN": ("p", {"p": float("nan")}),
    }
    of_keep = {
        "keep: another M": ("keep", {"keep": bits[:5]}),
        "keep: too few bytes": ("keep", {"keep": bits[:, :7]}),
        "keep: dtype": ("keep", {"keep": bits.bool()}),
    }
    of_y = {
        "y: another N": ("y", {"y": torch.ones(6, 19)}),
        "y: another M": ("y", {"y": torch.ones(5, 20)}),
        "y: dtype": ("y", {"y": torch.ones(6, 20).half()}),
        "y: gaps": ("y", {"y": torch.ones(6, 40)[:, ::2]}),
    }
    seeds = {
        "seed: two": ("seed", {"seed": torch.tensor([1, 2])}),
        "seed: dtype": ("seed", {"seed": torch.tensor([1.0])}),
    }
    print_accepted("draw_dropout_cpu", {"x": x, "p": 0.5, "seed": torch.tensor([1])}, of_x | seeds)
    print_accepted("dropout_cpu", {"x": x, "p": 0.5, "keep": bits}, of_x | of_keep)
    print_accepted("add_dropout_cpu", {"y": torch.ones(6, 20), "x": x, "p": 0.5, "keep": bits}, of_x | of_keep | of_y)
    product = {"y": torch.ones(6, 12), "x": x, "weight": torch.ones(12, 20)}
    of_product = {
        "y: another N": ("y", {"y": torch.ones(6, 11)}),
        "y: gaps": ("y", {"y": torch.ones(6, 24)[:, ::2]}),
        "x: dtype": ("x", {"x": x.bfloat16(), "weight": torch.ones(12, 20).bfloat16()}),
        "weight: gaps": ("weight", {"weight": torch.ones(24, 40)[::2, ::2]}),
        "weight: another K": ("weight", {"weight": torch.ones(12, 19)}),
    }
    print_accepted("add_product_cpu", product, of_product)


def test_wrong_arguments_are_named() -> None:
    assert run_apart("test_composed", call_wrongly) == ""


@pytest.mark.parametrize("dtype", ops.KERNEL_DTYPES)
def test_dropout_is_the_references(dtype: torch.dtype) -> None:
    for M, K, p in ((5, 200, 0.5), (3, 77, 0.1), (70, 64, 1.0), (2, 1, 0.3), (0, 9, 0.5)):
        x, y = torch.randn(M, K).to(dtype), torch.randn(M, K).to(dtype)
        kept, keep = torch.ops.fastlora.draw_dropout_cpu(x, p, SEED)
        mask = reference.keep_mask(SEED, torch.arange(M), K, p)
        assert torch.equal(reference.read_keep(keep, K), mask)
        expected = reference.dropout(x, p, keep)
        assert torch.equal(kept, expected) and torch.equal(torch.ops.fastlora.dropout_cpu(x, p, keep), expected)
        wide = torch.where(mask, x.float() * torch.tensor(reference.keep_scale(p)), 0.0)
        total = (y.float() + wide).to(dtype)
        torch.ops.fastlora.add_dropout_cpu(y, x, p, keep)
        assert torch.allclose(y.float(), total.float(), rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_opcheck() -> None:
    keep = torch.ones(5, 8, dtype=torch.uint8)
    for name, args in (
        ("add_dropout_cpu", (torch.ones(5, 16), torch.ones(5, 16), 0.5, keep)),
        ("add_product_cpu", (torch.ones(5, 12), torch.ones(5, 16), torch.ones(12, 16))),
    ):
        torch.library.opcheck(getattr(torch.ops.fastlora, name).default, args, test_utils=("test_schema",))
