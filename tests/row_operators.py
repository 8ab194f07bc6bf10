"""What the tests of operators that work on plain tensors have in common: the bound, and that nothing depends on who watches."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from bounds import Compared, assert_within_bound_over_inputs, dense, double
from torch import Tensor

from fastlora import ops

Function = Callable[..., Any]
Values = Callable[[], Sequence[Tensor]]


def outputs_of(found: Any) -> list[Tensor]:
    return list(found) if isinstance(found, tuple) else [found]


def results(function: Function, inputs: Sequence[Tensor], trained: Sequence[int]) -> list[Tensor]:
    """What a function returns, and the gradients of the trained inputs for a fixed dy."""
    given = [one.detach().requires_grad_(i in trained) for i, one in enumerate(inputs)]
    outputs = outputs_of(function(*given))
    drawn = torch.Generator().manual_seed(0)
    dys = [torch.randn(one.shape, generator=drawn).to(one) for one in outputs]
    grads = torch.autograd.grad(outputs, [given[i] for i in trained], dys, materialize_grads=True)
    return [one.detach() for one in (*outputs, *grads)]


def check_bound(
    function: Function, eager: Function, draw: Values, trained: Sequence[int], layout: Function = lambda one: one
) -> None:
    """Every result and gradient is as near to float64's as twice eager's."""

    def compute() -> dict[str, Compared]:
        inputs = [layout(one) for one in draw()]
        found = results(function, inputs, trained)
        plain = results(eager, [dense(one) for one in inputs], trained)
        exact = results(eager, [double(one) for one in inputs], trained)
        return {f"result {i}": of_one for i, of_one in enumerate(zip(found, plain, exact, strict=True))}

    assert_within_bound_over_inputs(compute)


def check_repeats(function: Function, draw: Values, trained: Sequence[int]) -> None:
    """Two runs are equal, to the last bit."""
    torch.use_deterministic_algorithms(False)  # the tests' own setting must not be what makes it so
    inputs = draw()
    first, second = (results(function, inputs, trained) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def check_each_alone(function: Function, draw: Values, trained: Sequence[int]) -> None:
    """An input gets its gradient whether or not the others are trained."""
    inputs = draw()
    together = results(function, inputs, trained)
    outputs = len(together) - len(trained)
    for number, one in enumerate(trained):
        *_, found = results(function, inputs, [one])
        assert torch.equal(found, together[outputs + number])


def check_compiles(function: Function, draw: Values, trained: Sequence[int]) -> None:
    """In one graph, with the same results."""
    torch.compiler.reset()
    inputs = draw()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for found, expected in zip(results(compiled, inputs, trained), results(function, inputs, trained), strict=True):
        assert torch.equal(found, expected)
    torch.compiler.reset()


def check_on_meta(function: Function, draw: Values, trained: Sequence[int]) -> None:
    """Shapes, strides and dtypes without memory, the gradients too."""
    inputs = draw()
    expected = results(function, inputs, trained)
    found = results(function, [one.to("meta") if one.is_floating_point() else one for one in inputs], trained)
    for one, other in zip(found, expected, strict=True):
        assert one.is_meta and (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


def check_without_gradients(function: Function, draw: Values) -> None:
    """The same values where nothing is trained and where nobody asks for gradients, and no graph."""
    inputs = draw()
    trained = [inputs[0].detach().requires_grad_()]
    expected = [one.detach() for one in outputs_of(function(*trained, *inputs[1:]))]

    def check(given: Sequence[Tensor]) -> None:
        for found, wanted in zip(outputs_of(function(*given)), expected, strict=True):
            assert not found.requires_grad and torch.equal(found, wanted)

    check(inputs)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            check([*trained, *inputs[1:]])


def check_choice(
    op: str,
    function: Function,
    inputs: Sequence[Tensor],
    rows: int,
    elements: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Forward and backward are each chosen as they were measured: by their rows and elements, and never with dropout."""
    asked = []
    own = ops.choose

    def choose(op: str, like: Tensor, rows: int, elements: int, dropout: bool) -> ops.Choice:
        asked.append((op, like.dtype, rows, elements, dropout))
        return own(op, like, rows, elements, dropout)

    monkeypatch.setattr(ops, "choose", choose)
    results(function, inputs, [0])
    assert list(dict.fromkeys(asked)) == [
        (name, inputs[0].dtype, rows, elements, False) for name in (op, f"{op}_backward")
    ]
