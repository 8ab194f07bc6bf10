"""A frozen weight [N, K] that lies column by column, as GPT-2's Conv1D keeps it, in CUDA C++ on an emulated card (emulated.py): read in place.

The kernels of either card, for few rows and for many, forward and backward; what is around the weight is NaN.
"""

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import emulated
import pytest
import test_cuda_multi_lora
import torch
from bounds import Layer, assert_within_bound, double, make_layer, next_seed
from test_cuda_lora_linear import CUDA, NUMBERS, REFERENCE, SCALE, Case, run_layer, spaced
from test_cuda_multi_lora import LONG, make, make_backward, mixed
from torch import Tensor

from fastlora import LoRAConv1D, operators, ops

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32

pytestmark = pytest.mark.skipif(not emulated.available(), reason="needs a C++20 compiler")


@pytest.fixture(scope="module")
def card() -> ctypes.CDLL:
    return emulated.load()


@pytest.fixture(params=[80, 90], ids=["sm_80", "sm_90"])
def capability(request: pytest.FixtureRequest, card: ctypes.CDLL) -> Iterator[None]:
    card.emulated_capability(request.param)
    yield
    card.emulated_capability(80)


def by_column(weight: Tensor) -> Tensor:
    """The same values, rows side by side and columns apart, at multiples of 16 bytes."""
    return spaced(weight.T).T


# Several tiles of either card in both directions, and depths that end within a step.
CASES = {
    "tiles": Case(140, 200, 264, 8, dropout_p=0.1),
    "odd sizes": Case(37, 75, 301, 3, F16, F32, dropout_p=0.3),
    "ranks beyond a pass": Case(20, 264, 72, 70, BF16, F32, bias=False),
    "a column": Case(9, 8, 1, 2),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_lora_linear(capability: None, case: Case) -> None:
    *sizes, dropout_p = case
    layer = Layer(*(None if tensor is None else tensor.detach() for tensor in make_layer(*sizes)))
    seed = next_seed("cpu", 1) if dropout_p else None

    found = run_layer(CUDA, layer._replace(weight=by_column(layer.weight)), dropout_p, seed)
    eager = run_layer(REFERENCE, layer, dropout_p, seed)
    exact = run_layer(REFERENCE, Layer(*map(double, layer)), dropout_p, seed)
    for name in NUMBERS:
        assert_within_bound(name, found[name], eager[name], exact[name])


def check_multi_lora(given: test_cuda_multi_lora.Arguments) -> None:
    test_cuda_multi_lora.check(given._replace(weight=by_column(given.weight)), given)


# A tile of each shape, alone, more of them, and sums of several blocks.
FEW: dict[str, dict[str, Any]] = {
    "5 rows": {"index": mixed(5), "dtype": F16, "N": 33},
    "13 rows": {"index": mixed(13), "K": 75, "N": 65, "dropout": True},
    "29 rows": {"index": mixed(29), "N": 100},
    "37 rows, K split": {"index": mixed(37), "K": 2128, "N": 130},
}


@pytest.mark.parametrize("descending", [0, 1], ids=["ascending", "descending"])
@pytest.mark.parametrize("case", FEW.values(), ids=FEW)
def test_multi_lora_of_few_rows(card: ctypes.CDLL, case: dict[str, Any], descending: int) -> None:
    card.emulated_descending(descending)
    try:
        check_multi_lora(make(**case))
    finally:
        card.emulated_descending(0)


@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
def test_multi_lora_of_many_rows(capability: None, dropout: bool) -> None:
    given = make(LONG, ranks=(1, 8, 16, 40, 20), K=139, N=264, dropout=dropout)
    check_multi_lora(given)
    backward = make_backward(given)
    test_cuda_multi_lora.check_backward(backward._replace(weight=by_column(backward.weight)), backward)


def copies(function: Callable[[], object]) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        function()
    return sum(event.name == "aten::copy_" for event in found.events())


@pytest.mark.parametrize("rows", [6, 70])
@pytest.mark.parametrize(
    ("layout", "K", "N", "expected"),
    [
        (torch.Tensor.contiguous, 64, 45, 0),
        (torch.Tensor.contiguous, 65, 48, 2),  # one in the forward, one in the backward
        (by_column, 65, 45, 0),
        (lambda weight: weight.T.contiguous().T, 65, 48, 0),
        (lambda weight: weight.T.contiguous().T, 64, 45, 2),
    ],
    ids=["Linear", "Linear, odd K", "columns apart", "Conv1D", "Conv1D, odd N"],
)
def test_no_copy_of_a_weight_that_can_be_read(
    card: ctypes.CDLL, rows: int, layout: Callable[[Tensor], Tensor], K: int, N: int, expected: int
) -> None:
    x, weight, _, lora_a, lora_b, dy = (tensor.detach() for tensor in make_layer(rows, K, N, 4, BF16))
    layer = Layer(spaced(x), layout(weight), None, lora_a, lora_b, spaced(dy))
    sorting = torch.arange(rows), torch.tensor([0, 0, rows, rows])

    def lora_linear() -> None:
        run_layer(CUDA, layer)

    def multi_lora() -> None:
        x, weight, bias, lora_a, lora_b, dy = layer
        given = test_cuda_multi_lora.Arguments(x, weight, bias, [lora_a], [lora_b], [SCALE], [0.0], None, *sorting)
        _, xa, keep = test_cuda_multi_lora.run(given)
        given = test_cuda_multi_lora.Backward(
            dy, x, weight, [lora_a], [lora_b], xa, keep, [SCALE], [0.0], *sorting, True, True, True
        )
        test_cuda_multi_lora.run_backward(*given)

    assert (copies(lora_linear), copies(multi_lora)) == (expected, expected)


def test_conv1d_is_read_in_place(card: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer as users have it, forward and backward."""
    monkeypatch.setenv(ops.EMULATORS["cuda"], "1")
    monkeypatch.setattr(ops, "implementations", {**ops.implementations, **emulated.operators()})
    monkeypatch.setattr(ops, "forced", "cuda")
    layer = LoRAConv1D(48, 64, r=4, lora_dropout=0.1).to(BF16)
    x = torch.randn(20, 64, dtype=BF16, requires_grad=True)
    weights = []
    monkeypatch.setattr(layer, "_weight_as_linear", lambda: weights.append(layer.weight.t()) or weights[-1])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as found:
        layer(x).sum().backward()
    assert weights and x.grad is not None
    moved = [event.input_shapes for event in found.events() if event.name in ("aten::copy_", "aten::clone")]
    assert not [shapes for shapes in moved if [48, 64] in shapes or [64, 48] in shapes]


def test_a_weight_that_would_be_copied_is_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """No figure is of it: whoever forces CUDA C++ has it, and the copy."""
    monkeypatch.setattr(ops, "forced", None)
    monkeypatch.setattr(ops, "_decide", lambda *_: ops.Choice("cuda", "measured", 0.5))
    x = torch.zeros(8, 64, dtype=BF16)
    chosen = {
        (rows, transposed): operators.lora_linear.choose(x, weight.T if transposed else weight)
        for rows in (45, 48)
        for transposed, weight in ((False, x.new_zeros(rows, 64)), (True, x.new_zeros(64, rows)))
    }
    assert {key for key, choice in chosen.items() if choice.implementation != "cuda"} == {(45, True)}
    assert chosen[45, True].reason.startswith("CUDA C++ would copy the weight [45, 64] in every call: ")
    for choose in (
        lambda *given: operators.lora_linear.choose(*given, mixed=True),
        lambda *given: operators.lora_linear.choose_shared(*given)[0],
    ):
        assert choose(x, x.new_zeros(64, 45).T).implementation == "reference"
        assert choose(x, x.new_zeros(1, 1).expand(45, 64)).implementation == "cuda"  # a size without a layout
