"""linear_cross_entropy: the loss of labels under a head, by both implementations, against eager PyTorch and autograd in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bounds import Compared, assert_within_bound_over_inputs, dense, double, gapped, gradients
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastlora import ops, reference
from fastlora.functional import linear_cross_entropy
from fastlora.operators import linear_cross_entropy as operator

OPERATOR = "linear_cross_entropy"


@pytest.fixture(params=["reference", "blocks"])
def chosen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Blocks are no implementation that can be forced for all operators: they run where plain PyTorch is not."""
    monkeypatch.setattr(ops, "forced", "reference" if request.param == "reference" else None)
    return request.param


@pytest.fixture(params=[False, True], ids=["whole", "blocks"])
def in_blocks(request, monkeypatch) -> None:
    """Run as it is, and cut into blocks that fit nothing: 3 rows, 5 words of the vocabulary."""
    if request.param:
        monkeypatch.setattr(operator, "ROWS_AT_ONCE", 3)
        monkeypatch.setattr(operator, "LOGITS_AT_ONCE", {"cpu": 15, "cuda": 15})


def eager(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    logits = F.linear(hidden, weight, bias)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="sum")


def head(n: int, D: int, V: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden, weight, bias = torch.randn(n, D), torch.randn(V, D) * 3 / D**0.5, torch.randn(V)
    return *(value.to(dtype).requires_grad_() for value in (hidden, weight, bias)), torch.randint(V, (n,))


def raw(n: int, D: int, V: int, dtype: torch.dtype, with_bias: bool = True) -> tuple[Any, ...]:
    """What the operator takes but whether dhidden is needed, without gradients."""
    hidden, weight, bias, labels = head(n, D, V, dtype)
    return hidden.detach(), weight.detach(), bias.detach() if with_bias else None, labels


@pytest.mark.usefixtures("in_blocks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "D", "V"), [(7, 33, 101), (19, 33, 101), (1, 16, 5), (0, 8, 11)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_bound(chosen, n, D, V, dtype, with_bias):
    def draw():
        hidden, weight, bias, labels = head(n, D, V, dtype)
        return gapped(hidden), gapped(weight), gapped(bias) if with_bias else None, labels

    assert_as_near_as_eager(draw)


def loss_and_gradients(
    function: Callable[..., Tensor], given: tuple[Tensor | None, ...], labels: Tensor
) -> dict[str, Tensor]:
    """The loss and what it gives to hidden, weight and bias, by name."""
    loss = function(*given, labels)
    assert loss.shape == ()
    trained = {f"d{name}": value for name, value in zip("hwb", given, strict=True) if value is not None}
    found = gradients(loss, list(trained.values()), torch.tensor(0.37).to(loss.dtype))
    return {"loss": loss.detach(), **dict(zip(trained, found, strict=True))}


def assert_as_near_as_eager(draw: Callable[[], tuple[Tensor | None, ...]], autocast: bool = False) -> None:
    """Over the inputs that are drawn: hidden, weight, bias or None, labels."""

    def compute() -> dict[str, Compared]:
        *given, labels = draw()
        copies, wide = ([copied(value) for value in given] for copied in (dense, double))
        wide = [None if value is None else value.requires_grad_() for value in wide]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            near = [loss_and_gradients(linear_cross_entropy, given, labels), loss_and_gradients(eager, copies, labels)]
        runs = [*near, loss_and_gradients(eager, wide, labels)]
        return {name: tuple(results[name] for results in runs) for name in runs[0]}

    assert_within_bound_over_inputs(compute)


@pytest.mark.usefixtures("in_blocks")
def test_gradcheck(chosen):
    hidden, weight, bias, labels = head(5, 6, 13, torch.float64)
    assert torch.autograd.gradcheck(lambda *inputs: linear_cross_entropy(*inputs, labels), (hidden, weight, bias))


def test_words_that_never_come_cost_nothing(chosen, monkeypatch):
    monkeypatch.setattr(operator, "LOGITS_AT_ONCE", {"cpu": 20, "cuda": 20})
    hidden, weight, bias, labels = head(4, 6, 20, torch.float32)
    bias.data[:15] = -torch.inf  # whole blocks of them
    loss = linear_cross_entropy(hidden, weight, bias, labels % 5 + 15)
    assert torch.allclose(loss, eager(hidden, weight, bias, labels % 5 + 15))
    assert all(gradient.isfinite().all() for gradient in gradients(loss, [hidden, weight], torch.tensor(1.0)))


class LargestResult(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor) and value._base is None:
                self.elements = max(self.elements, value.numel())
        return result


def test_no_tensor_has_a_row_for_each_token_and_a_column_for_each_word(monkeypatch):
    """Also inside the implementation, where a mode around the operator sees nothing; plain PyTorch has one."""
    monkeypatch.setattr(operator, "LOGITS_AT_ONCE", {"cpu": 256, "cuda": 256})
    hidden, weight, _, labels = raw(64, 8, 1000, torch.bfloat16)
    largest = {}
    for name in ("blocks", "reference"):
        with LargestResult() as seen:
            ops.implementations[OPERATOR, name](hidden, weight, None, labels, True)
        largest[name] = seen.elements
    assert 256 <= largest["blocks"] <= 64 * 8 and largest["reference"] == 64 * 1000
    with LargestResult() as seen:
        linear_cross_entropy(hidden.requires_grad_(), weight, None, labels).backward()
    assert seen.elements == 64 * 8


@pytest.mark.usefixtures("in_blocks")
def test_autocast_casts_as_the_head_would(chosen):
    assert_as_near_as_eager(lambda: head(9, 16, 31, torch.float32), autocast=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_is_the_same_as_casting_by_hand(chosen, dtype):
    """Whatever dtype hidden has: under autocast it comes in autocast's, and the head does not."""
    hidden, weight, bias, labels = raw(9, 16, 31, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_cross_entropy(hidden.to(dtype), weight, bias, labels)
    assert torch.equal(found, linear_cross_entropy(*(one.bfloat16() for one in (hidden, weight, bias)), labels))


@pytest.mark.usefixtures("in_blocks")
def test_narrow_logits_are_summed_in_float32(chosen):
    """What stands out where bfloat16 has the logits exactly: whole numbers."""

    def draw():
        values = torch.randint(-1, 2, (19, 4)), torch.randint(-1, 2, (101, 4)), torch.randint(-1, 2, (101,))
        return *(one.bfloat16().requires_grad_() for one in values), torch.randint(101, (19,))

    assert_as_near_as_eager(draw)


def test_a_block_has_as_many_columns_as_fit(monkeypatch):
    """At least one, and where there are no rows, as for one."""
    monkeypatch.setattr(operator, "LOGITS_AT_ONCE", {"cpu": 15, "cuda": 20})
    weight = torch.empty(31, 4)
    for rows, columns in ((0, 15), (1, 15), (2, 7), (15, 1), (16, 1)):
        blocks = list(operator._vocabulary_blocks(rows, weight))
        assert [block.start for block in blocks] == list(range(0, 31, columns)) and blocks[-1].stop == 31
    assert next(operator._vocabulary_blocks(2, weight.to("meta"))).stop == 10


@pytest.mark.usefixtures("in_blocks")
def test_the_gradients_are_the_same_bits_each_time(chosen):
    hidden, weight, bias, labels = head(11, 16, 31, torch.bfloat16)
    first, second = (
        gradients(linear_cross_entropy(hidden, weight, bias, labels), [hidden, weight, bias], torch.tensor(1.0))
        for _ in range(2)
    )
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.ones(2, 3, 4)}, ValueError, "hidden: .*expected shape"),
        ({"hidden": torch.ones(2, 4, dtype=torch.int64)}, ValueError, "hidden: "),
        ({"weight": torch.ones(5, 3)}, ValueError, r"weight: .*expected shape \[V, 4\]"),
        ({"weight": torch.ones(5, 4).bfloat16()}, ValueError, "weight: .*expected .*float32"),
        ({"weight": torch.ones(5, 4, 1)}, ValueError, "weight: .*expected 2 dimensions"),
        ({"weight": torch.ones(5, 4, device="meta")}, ValueError, "weight: .*device cpu"),
        ({"weight": [1.0]}, TypeError, "weight: "),
        ({"bias": torch.ones(5, 1)}, ValueError, "bias: .*expected 1 dimensions"),
        ({"bias": torch.ones(5).double()}, ValueError, "bias: .*dtype torch.float32"),
        ({"bias": torch.ones(4)}, ValueError, r"bias: .*expected shape \[5\]"),
        ({"labels": torch.ones(3, dtype=torch.int64)}, ValueError, "labels: "),
        ({"labels": torch.ones(2)}, ValueError, "labels: "),
        ({"labels": torch.tensor([0, 5])}, IndexError, "labels: expected numbers from 0 to 4"),
        ({"labels": torch.tensor([0, -100])}, IndexError, "labels: "),
    ],
)
def test_a_wrong_argument_is_named(change, error, message):
    right = {"hidden": torch.ones(2, 4), "weight": torch.ones(5, 4), "bias": None, "labels": torch.tensor([0, 4])}
    with pytest.raises(error, match=message):
        linear_cross_entropy(**{**right, **change})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_opcheck(chosen, dtype, with_bias):
    given = raw(7, 12, 31, dtype, with_bias)
    for need in (True, False):
        torch.library.opcheck(torch.ops.fastlora.linear_cross_entropy.default, (*given, need))
    _, highest, total, _ = torch.ops.fastlora.linear_cross_entropy(*given, False)
    arguments = (torch.tensor(0.37), *given, highest, total)
    torch.library.opcheck(torch.ops.fastlora.linear_cross_entropy_backward.default, arguments)


@pytest.mark.usefixtures("in_blocks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_state(chosen, dtype):
    """What the backward reads leaves in float32 or wider, within the bound: the backward of the other implementation may read it.

    Both backwards get the exact state, rounded once, so that the bound is of their own roundings alone.
    """
    forward, backward = (ops.implementations[op, chosen] for op in (OPERATOR, f"{OPERATOR}_backward"))
    dloss = torch.tensor(0.37)

    def compute():
        *given, labels = raw(19, 33, 101, dtype)
        wide = [one.double() for one in given]
        found, near = (run(*given, labels, True) for run in (forward, reference.linear_cross_entropy))
        exact = reference.linear_cross_entropy(*wide, labels, True)
        assert [one.shape for one in found] == [(), (19, 1), (19, 1), (19, 33)]
        assert all(one.dtype == torch.float32 for one in found)
        state = [one.float() for one in exact[1:3]]
        found += backward(dloss, *given, labels, *state)
        near += reference.linear_cross_entropy_backward(dloss, *given, labels, *state)
        exact += reference.linear_cross_entropy_backward(dloss.double(), *wide, labels, *exact[1:3])
        names = ("loss", "highest", "total", "dhidden", "dweight", "dbias")
        return dict(zip(names, zip(found, near, exact, strict=True), strict=True))

    assert_within_bound_over_inputs(compute)


@pytest.mark.usefixtures("in_blocks")
def test_what_is_not_needed_has_no_elements(chosen):
    given = raw(9, 12, 31, torch.float64, with_bias=False)
    loss, highest, total, dhidden = ops.implementations[OPERATOR, chosen](*given, False)
    assert dhidden.numel() == 0 and {loss.dtype, highest.dtype, total.dtype, dhidden.dtype} == {torch.float64}
    dweight, dbias = ops.implementations[f"{OPERATOR}_backward", chosen](loss, *given, highest, total)
    assert dweight.shape == (31, 12) and dbias.numel() == 0


def test_float32_logits_need_no_second_room():
    """What is narrower has one room for all blocks of the vocabulary."""
    for dtype, elements in ((torch.float32, 0), (torch.float64, 0), (torch.bfloat16, 7 * 31), (torch.float16, 7 * 31)):
        hidden, weight, *_ = raw(7, 12, 31, dtype)
        assert operator._scratch(hidden, weight).numel() == elements


def test_a_frozen_head_costs_no_gradient(monkeypatch):
    hidden, weight, bias, labels = raw(7, 12, 31, torch.float32)
    monkeypatch.setattr(operator, "run_backward", None)
    linear_cross_entropy(hidden.requires_grad_(), weight, bias, labels).backward()
    loss = linear_cross_entropy(hidden, weight, bias.requires_grad_(), labels)
    with pytest.raises(TypeError):
        loss.backward()  # a trained bias is a gradient to compute


class Seen(TorchDispatchMode):
    """The operators of fastlora that are called, and whether any other computes a product."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names = [*getattr(self, "names", ()), str(function)]
        return function(*args, **(kwargs or {}))


def test_whoever_looks_at_operators_sees_two():
    *leaves, labels = head(5, 12, 31, torch.float32)
    with Seen() as seen:
        linear_cross_entropy(*leaves, labels).backward()
    assert [name for name in seen.names if "fastlora" in name or "mm" in name] == [
        "fastlora.linear_cross_entropy.default",
        "fastlora.linear_cross_entropy_backward.default",
    ]


def test_plain_tensors_pass_the_dispatcher_by(monkeypatch):
    for name in (OPERATOR, f"{OPERATOR}_backward"):
        monkeypatch.setattr(torch.ops.fastlora, name, None)
    *leaves, labels = head(5, 12, 31, torch.float32)
    linear_cross_entropy(*leaves, labels).backward()


def test_the_choice():
    assert operator.choose().implementation == "blocks"


def test_plain_pytorch_where_it_is_forced(monkeypatch):
    monkeypatch.setattr(ops, "forced", "reference")
    assert operator.choose() == ops.Choice("reference", "FASTLORA_IMPL")


def test_compiles_whole():
    """As operators whose shapes the compiler knows; the check of labels needs their values and stays outside."""
    torch.compiler.reset()

    def function(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
        return operator.LinearCrossEntropyFunction.apply(hidden, weight, bias, labels)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (5, 9):
        *leaves, labels = head(n, 12, 31, torch.float32)
        loss, expected = (call(*leaves, labels) for call in (compiled, function))
        assert torch.equal(loss, expected)
        grads, wanted = (gradients(of, leaves, torch.tensor(0.37)) for of in (loss, expected))
        assert all(torch.equal(one, other) for one, other in zip(grads, wanted, strict=True))


def test_on_meta():
    hidden, weight, bias, labels = (one.to("meta") for one in head(5, 12, 31, torch.bfloat16))
    leaves = [one.detach().requires_grad_() for one in (hidden, weight, bias)]
    loss = operator.LinearCrossEntropyFunction.apply(*leaves, labels)
    assert loss.is_meta and loss.shape == () and loss.dtype == torch.float32
    for leaf, grad in zip(leaves, gradients(loss, leaves, loss.detach()), strict=True):
        assert grad.is_meta and grad.shape == leaf.shape and grad.dtype == leaf.dtype
