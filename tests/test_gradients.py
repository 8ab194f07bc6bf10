"""Past the dispatcher only where nobody traces (fastlora/gradients.py): whoever looks at operators finds fastlora's, and never a part of one."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from bounds import make_layer
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_map_only

from fastlora import functional
from fastlora.functional import RowGroups
from fastlora.gradients import is_eager

M, K, N, R = 9, 12, 7, 3
layer = make_layer(M, K, N, R)
index = torch.arange(M) % 3 - 1
STARTS = torch.tensor([0, 4, M])


def _lora_linear(x: Tensor, a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    return functional.lora_linear(x, weight, layer.bias, a, b, 0.5)


def _shared(x: Tensor, a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    one, other = functional.lora_linear_shared(x, [weight, -weight], [None] * 2, [a, -a], [b, -b], [0.5, 1.0])
    return one + other


def _multi_lora(x: Tensor, a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    return functional.multi_lora(x, weight, None, [a, -a], [b, -b], [0.5, 1.0], RowGroups(index, 2))


def _multi_lora_shared(x: Tensor, a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    adapters = [[a, -a], [2 * a, 3 * a]], [[b, -b], [2 * b, 3 * b]], [[0.5, 1.0]] * 2
    one, other = functional.multi_lora_shared(x, [weight, -weight], [None] * 2, *adapters, RowGroups(index, 2))
    return one + other


def _frozen_linear(x: Tensor, a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    return functional.frozen_linear(x, weight, layer.bias)


def _rms_norm(x: Tensor, a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    return functional.rms_norm(x, weight[0], 1e-6)


def _scale_columns(x: Tensor, a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    return functional.scale_columns(x, weight[0], weight[1])


def _swiglu(x: Tensor, a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    return functional.swiglu(x, weight[0].expand_as(x))


def _rotary(x: Tensor, a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    cos, sin = (one.expand(1, M, K) for one in weight[:2])
    one, other = functional.rotary(x[None, None], -x[None, None], cos, sin)
    return (one + 2 * other)[0, 0]


def _attention(x: Tensor, a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    return functional.attention(x[:, None], x[:, None], weight[:1].expand(M, 1, K), STARTS)[:, 0]


FUNCTIONS = {
    _lora_linear: "lora_linear",
    _shared: "lora_linear",
    _multi_lora: "lora_linear",
    _multi_lora_shared: "lora_linear",
    _frozen_linear: "frozen_linear",
    _rms_norm: "rms_norm",
    _scale_columns: "scale_columns",
    _swiglu: "swiglu",
    _rotary: "rotary",
    _attention: "attention",
}
WITHOUT_ADAPTER = [_frozen_linear, _rms_norm, _scale_columns, _swiglu, _rotary, _attention]
Function = Callable[..., Tensor]
EVERY = pytest.mark.parametrize("function", FUNCTIONS)
MODES = pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])


def inputs(trained: bool = True) -> list[Tensor]:
    """x, A, B and the weight."""
    leaves = [one.detach().requires_grad_(trained) for one in (layer.x, layer.lora_a, layer.lora_b)]
    return [*leaves, layer.weight]


def named(functions: Iterator[Any] | list[Any]) -> set[str]:
    """The names of fastlora's operators among them."""
    names = (str(function) for function in functions)
    return {name.removeprefix("fastlora.").removesuffix(".default") for name in names if name.startswith("fastlora.")}


class Seen(TorchDispatchMode):
    """Which operators come by."""

    def __init__(self) -> None:
        super().__init__()
        self.functions: list[Any] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.functions.append(function)
        return function(*args, **(kwargs or {}))


class Wrapped(Tensor):
    """A tensor that is another one inside, like a DTensor or a quantised weight; it sees every operator that is called on it."""

    seen: list[Any]
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor, seen: list[Any]) -> "Wrapped":
        made = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, strides=inner.stride())
        made.inner, made.seen = inner, seen
        return made.requires_grad_(inner.requires_grad)

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        wrapped: list[Wrapped] = []
        tree_map_only(Wrapped, wrapped.append, (args, kwargs))
        seen = wrapped[0].seen
        seen.append(function)
        args, kwargs = tree_map_only(Wrapped, lambda one: one.inner, (args, kwargs or {}))
        out = tree_map_only(Tensor, lambda one: Wrapped(one.detach(), seen), function(*args, **kwargs))
        return return_and_correct_aliasing(function, args, kwargs, out)


@MODES
def test_plain_tensors_are_eager(mode: Any) -> None:
    with mode():
        assert is_eager(layer.x, torch.nn.Parameter(layer.weight), None)
    with torch.autocast("cpu", torch.bfloat16):
        assert is_eager(layer.x)


@EVERY
def test_inside_backward_and_checkpointing_plain_tensors_are_eager(function: Function, monkeypatch: Any) -> None:
    """What the rule is for: neither forward nor backward of a plain call passes the dispatcher."""
    called = []
    for name in (FUNCTIONS[function], f"{FUNCTIONS[function]}_backward"):
        packet = getattr(torch.ops.fastlora, name)
        monkeypatch.setattr(
            torch.ops.fastlora, name, lambda *args, packet=packet: called.append(packet) or packet(*args)
        )
    given = inputs()
    torch.utils.checkpoint.checkpoint(function, *given, use_reentrant=False).sum().backward()
    assert not called


@EVERY
@MODES
def test_a_dispatch_mode_sees_the_operator(function: Function, mode: Any) -> None:
    given = inputs()
    with mode(), Seen() as seen:
        y = function(*given)
    assert named(seen.functions) == {FUNCTIONS[function]}
    if mode is torch.enable_grad:
        with Seen() as seen:
            y.sum().backward()
        assert named(seen.functions) == {f"{FUNCTIONS[function]}_backward"}


@EVERY
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_fake_tensors_have_shapes_and_gradients(function: Function, mode: Any) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, mode():
        given = [fake.from_tensor(one) for one in inputs()]
        y = function(*given)
        assert type(y) is not Tensor and y.shape == function(*inputs()).shape
        if mode is torch.enable_grad:
            y.sum().backward()
            assert type(given[0].grad) is not Tensor and given[0].grad.shape == (M, K)


@EVERY
@pytest.mark.parametrize("pre_dispatch", [False, True])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_make_fx_finds_the_operator(function: Function, pre_dispatch: bool, mode: Any) -> None:
    given = inputs(trained=False)
    with mode():
        graph = make_fx(function, pre_dispatch=pre_dispatch)(*given)
    assert named([node.target for node in graph.graph.nodes]) == {FUNCTIONS[function]}
    assert torch.equal(graph(*given), function(*given))


@EVERY
def test_make_fx_finds_both_directions(function: Function) -> None:
    def gradient(*given: Tensor) -> Tensor:
        return torch.autograd.grad(function(*given).square().sum(), given[0])[0]

    graph = make_fx(gradient)(*inputs())
    assert named([node.target for node in graph.graph.nodes]) == {
        FUNCTIONS[function],
        f"{FUNCTIONS[function]}_backward",
    }


class Called(torch.nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
        return self.function(x, a, b, weight)


@EVERY
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_export_finds_the_operator(function: Function, strict: bool, mode: Any) -> None:
    given = tuple(inputs(trained=False))
    with mode():
        exported = torch.export.export(Called(function), given, strict=strict)
    assert named([node.target for node in exported.graph.nodes]) == {FUNCTIONS[function]}
    assert torch.equal(exported.module()(*given), function(*given))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("function", [_lora_linear, _frozen_linear])
def test_jit_trace_finds_the_operator(function: Function) -> None:
    """And what it has traced runs with another number of rows."""
    given = inputs(trained=False)
    with torch.no_grad():
        traced = torch.jit.trace(function, given)
    kinds = {node.kind() for node in traced.graph.nodes()}
    assert {kind for kind in kinds if kind.startswith("fastlora::")} == {f"fastlora::{FUNCTIONS[function]}"}
    few = [given[0][:4], *given[1:]]
    torch.testing.assert_close(traced(*few), function(*few))


@EVERY
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_the_compiler_finds_the_operator(function: Function, trained: bool, mode: Any) -> None:
    """One graph, also where nothing requires a gradient."""
    torch.compiler.reset()
    graphs: list[set[str]] = []

    def backend(graph: torch.fx.GraphModule, given: Any) -> Any:
        graphs.append(named([node.target for one in graph.modules() for node in getattr(one, "graph", _EMPTY).nodes]))
        return graph

    given = inputs(trained)
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    with mode():
        assert torch.equal(compiled(*given), function(*given))
    assert (
        len(graphs) == 1
        and graphs[0] >= {FUNCTIONS[function]}
        and graphs[0]
        <= {
            FUNCTIONS[function],
            f"{FUNCTIONS[function]}_backward",
        }
    )


_EMPTY = torch.fx.Graph()


@EVERY
@pytest.mark.parametrize("wrapped", ["x", "a", "weight"])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_a_subclass_sees_the_operator(function: Function, wrapped: str, mode: Any) -> None:
    """Whichever argument it is; the others may be plain."""
    if function in WITHOUT_ADAPTER and wrapped == "a":
        pytest.skip("it has no A")
    seen: list[Any] = []
    x, a, b, weight = inputs()
    given = {"x": x, "a": a, "b": b, "weight": weight}
    given[wrapped] = Wrapped(given[wrapped], seen)
    with mode():
        y = function(*given.values())
    assert type(y) is Wrapped
    torch.testing.assert_close(y.inner, function(x, a, b, weight).detach())
    if mode is torch.enable_grad:
        y.sum().backward()
        assert named(seen) == {FUNCTIONS[function], f"{FUNCTIONS[function]}_backward"}
        assert given["x"].grad is not None
    else:
        assert named(seen) == {FUNCTIONS[function]}


@EVERY
def test_a_backward_under_vmap_is_batched(function: Function) -> None:
    """The batch of gradients looks like a plain tensor; an operator without a rule is called row by row."""
    x, a, b, weight = inputs()
    jacobian = torch.autograd.functional.jacobian

    def of_x(x: Tensor) -> Tensor:
        return function(x, a, b, weight)[:2]

    torch.testing.assert_close(jacobian(of_x, x, vectorize=True), jacobian(of_x, x))


def test_meta_tensors_are_not_eager() -> None:
    """They have shapes alone: the implementations would look for values."""
    assert not is_eager(layer.x.to("meta"))
