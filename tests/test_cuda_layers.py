"""torch.ops.fastlora.lora_linear_cuda on an emulated card (emulated.py): layers that share x, in layouts that are copied, and wrong arguments.

Every test runs with the threads of a block, and the blocks, in ascending and in descending order. What is told of `test_cuda_prefix_concat.py`
under `make sanitize` is true here, too.
"""

import ctypes
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import emulated
import pytest
import torch
from bounds import Layer, assert_within_bound, dense, double, gapped, make_layer, next_seed, print_accepted, transposed
from test_cuda_lora_linear import CUDA, NUMBERS, REFERENCE, run_layer

from fastlora import functional, ops, reference

pytestmark = pytest.mark.skipif(not emulated.available(), reason="needs a C++20 compiler")


@pytest.fixture(scope="module")
def card() -> ctypes.CDLL:
    return emulated.load()


@pytest.fixture(autouse=True, params=["ascending", "descending"])
def order(request: pytest.FixtureRequest, card: ctypes.CDLL) -> Iterator[None]:
    card.emulated_descending(request.param == "descending")
    yield
    card.emulated_descending(0)


def test_lora_linear_takes_any_dy() -> None:
    """One row of dy for all rows of x, as a mean's gradient is; and one whose rows lie across."""
    layer = make_layer(24, 40, 32, 4, torch.bfloat16)
    x, weight, _, lora_a, lora_b, dy = (tensor.detach() for tensor in layer)
    xa, keep = torch.zeros(1, 24, 4), torch.empty(0, dtype=torch.uint8)
    _, backward = CUDA
    for odd in (dy[:1].expand(24, 32), transposed(dy)):
        arguments = x, [weight], [lora_a], [lora_b], xa, keep, [1.5], [0.0], None, None, True, True, True
        for got, right in zip(backward([odd], *arguments), backward([odd.clone()], *arguments), strict=True):
            assert torch.equal(got, right)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_lora_linear_with_any_strides(dropout_p: float) -> None:
    """Rows that cannot be read 16 bytes at a time: an odd K, gaps, a weight that lies by column, rows of dy that are one."""
    x, weight, bias, lora_a, lora_b, dy = make_layer(19, 37, 29, 5, torch.bfloat16, torch.float32)
    odd = gapped(x), transposed(weight), bias, gapped(lora_a), transposed(lora_b), dy[:1].expand_as(dy)
    layer = Layer(*(tensor.detach() for tensor in odd))
    seed = next_seed("cpu", 1) if dropout_p else None

    def at_an_odd_address(keep: torch.Tensor) -> torch.Tensor:
        return torch.cat((keep.new_zeros(1), keep.flatten()))[1:].view_as(keep)

    found = run_layer(CUDA, layer, dropout_p, seed, at_an_odd_address)
    eager = run_layer(REFERENCE, Layer(*map(dense, layer)), dropout_p, seed)
    exact = run_layer(REFERENCE, Layer(*map(double, layer)), dropout_p, seed)
    for name in NUMBERS:
        assert_within_bound(name, found[name], eager[name], exact[name])


def test_wrong_arguments_to_lora_linear(capsys: pytest.CaptureFixture[str]) -> None:
    x, weight, bias, lora_a, lora_b, dy = (
        None if t is None else t.detach() for t in make_layer(4, 16, 8, 2, torch.bfloat16)
    )
    right = {
        "x": x, "weight": [weight], "bias": [bias], "lora_a": [lora_a], "lora_b": [lora_b], "scale": [1.0], "dropout_p": [0.5],
        "seed": torch.tensor([3]), "order": None, "offsets": None,
    }  # fmt: skip
    print_accepted("lora_linear_cuda", right, {
        "float32": ("x", {"x": x.float(), "weight": [weight.float()], "bias": [bias.float()]}),
        "a row": ("x", {"x": x[0]}),
        "weight of another K": ("weight", {"weight": [weight[:, :8]]}),
        "weight of another dtype": ("weight", {"weight": [weight.half()]}),
        "bias of another N": ("bias", {"bias": [bias[:3]]}),
        "A of another K": ("lora_a", {"lora_a": [lora_a[:, :8]]}),
        "no rank": ("lora_a", {"lora_a": [lora_a[:0]], "lora_b": [lora_b[:, :0]]}),
        "a rank of more than 512": ("lora_a", {"lora_a": [x.new_zeros(513, 16)], "lora_b": [x.new_zeros(8, 513)]}),
        "B of another rank": ("lora_b", {"lora_b": [lora_b[:, :1]]}),
        "A and B of two dtypes": ("lora_b", {"lora_b": [lora_b.float()]}),
        "a probability above 1": ("dropout_p", {"dropout_p": [1.5]}),
        "two seeds": ("seed", {"seed": torch.tensor([1, 2])}),
        "a seed of another dtype": ("seed", {"seed": torch.tensor([3], dtype=torch.int32)}),
    })  # fmt: skip
    _, xa, keep = torch.ops.fastlora.lora_linear_cuda(*right.values())
    backward = {
        "dy": [dy], "x": x, "weight": [weight], "lora_a": [lora_a], "lora_b": [lora_b], "xa": xa, "keep": keep, "scale": [1.0],
        "dropout_p": [0.5], "order": None, "offsets": None, "need_dx": True, "need_da": True, "need_db": True,
    }  # fmt: skip
    print_accepted("lora_linear_backward_cuda", backward, {
        "dy of another N": ("dy", {"dy": [dy[:, :3]]}),
        "dy of another dtype": ("dy", {"dy": [dy.float()]}),
        "xa of another rank": ("xa", {"xa": xa[:, :, :1]}),
        "xa of another dtype": ("xa", {"xa": xa.double()}),
        "keep of another dtype": ("keep", {"keep": keep.float()}),
        "keep of fewer rows": ("keep", {"keep": keep[:, :2]}),
    })  # fmt: skip
    assert capsys.readouterr().out == ""


class Shared(NamedTuple):
    """Layers of `lora_linear` that share x; each one's N and R."""

    M: int
    K: int
    layers: tuple[tuple[int, int], ...]
    dtype: torch.dtype = torch.bfloat16
    adapter_dtype: torch.dtype | None = None
    dropout_p: tuple[float, ...] = ()  # a layer's; none: no dropout


SHARED = {
    "three layers": Shared(70, 96, ((40, 8), (24, 8), (24, 8))),
    "other ranks, one drops nothing": Shared(37, 65, ((40, 3), (17, 20), (24, 1)), torch.float16, torch.float32, (0.3, 0.0, 0.5)),
    "several tiles": Shared(150, 280, ((48, 16), (136, 5)), dropout_p=(0.1, 0.4)),
    "one layer": Shared(5, 33, ((9, 2),), dropout_p=(0.2,)),
    "no rows": Shared(0, 16, ((8, 2), (8, 2)), dropout_p=(0.1, 0.1)),
}  # fmt: skip


def make_shared(case: Shared) -> tuple[list[Any], list[Any], list[torch.Tensor]]:
    """x, weights, biases, A and B, in layouts that cannot all be read 16 bytes at a time; scales, probabilities and seeds; every dy."""
    made = [make_layer(case.M, case.K, N, R, case.dtype, case.adapter_dtype) for N, R in case.layers]
    weight, bias, a, b, dy = ([one[i].detach() for one in made] for i in range(1, 6))
    weight[-1], a[-1], bias[0] = transposed(weight[-1]), gapped(a[-1]), bias[0].new_empty(0)
    G = len(made)
    seed = torch.randint(2**62, (G,)) if case.dropout_p else None
    numbers = [[1.7 / (1 + i) for i in range(G)], list(case.dropout_p or (0.0,) * G), seed]
    return [made[0].x.detach(), weight, bias, a, b], numbers, dy


def run_shared(
    functions: tuple[Any, Any], tensors: list[Any], numbers: list[Any], dy: list[torch.Tensor], widened: Callable[[Any], Any]
) -> dict[str, Any]:  # fmt: skip
    """By name, each y, xa, keep, dx, da, db of what an operator's forward and backward give."""
    x, weight, bias, a, b = (
        widened(one) if isinstance(one, torch.Tensor) else list(map(widened, one)) for one in tensors
    )
    scale, p, seed = numbers
    forward, backward = functions
    biases = [one if one.numel() else None for one in bias]
    ys, xa, keep = forward(x, weight, biases, a, b, scale, p, seed, None, None)
    grads = backward(list(map(widened, dy)), x, weight, a, b, xa, keep, scale, p, None, None, True, True, True)
    named = dict(zip(("xa", "keep", "dx", "da", "db"), (xa, keep, *grads), strict=True))
    return {**{f"y[{i}]": y for i, y in enumerate(ys)}, **named}


def check_shared(case: Shared, move: Callable[[Any], Any] = lambda value: value) -> None:
    given = [move(part) for part in make_shared(case)]
    found, again = (run_shared(CUDA, *given, lambda one: one) for _ in range(2))
    eager, exact = (run_shared(REFERENCE, *given, widened) for widened in (dense, double))
    for name, value in found.items():
        assert torch.equal(value, again[name]) or name == "keep", name
        if name != "keep":
            assert_within_bound(name, value, eager[name], exact[name])
            continue
        assert value.shape == eager["keep"].shape
        for i, p in enumerate(case.dropout_p):
            if p:
                assert torch.equal(reference.read_keep(value[i], case.K), reference.read_keep(eager["keep"][i], case.K))


@pytest.mark.parametrize("capability", [80, 90], ids=["sm_80", "sm_90"])
@pytest.mark.parametrize("case", SHARED.values(), ids=SHARED)
def test_layers_that_share_x(card: ctypes.CDLL, case: Shared, capability: int) -> None:
    """dx is summed where it is written: each layer adds to what those before have left."""
    card.emulated_capability(capability)
    try:
        check_shared(case)
    finally:
        card.emulated_capability(80)


def test_wrong_arguments_to_layers_that_share_x(capsys: pytest.CaptureFixture[str]) -> None:
    (x, weight, bias, a, b), (scale, p, seed), dy = make_shared(Shared(4, 16, ((8, 2), (6, 3)), dropout_p=(0.5, 0.1)))
    right = {
        "x": x, "weight": weight, "bias": bias, "lora_a": a, "lora_b": b, "scale": scale, "dropout_p": p, "seed": seed,
        "order": None, "offsets": None,
    }  # fmt: skip
    print_accepted("lora_linear_cuda", right, {
        "no layer": ("weight", {name: [] for name in ("weight", "bias", "lora_a", "lora_b", "scale", "dropout_p")}),
        "a bias too few": ("bias", {"bias": bias[:1]}),
        "weight of another K": ("weight", {"weight": [weight[0], weight[1][:, :8]]}),
        "A of another K": ("lora_a", {"lora_a": [a[0], a[1][:, :8]]}),
        "B of another rank": ("lora_b", {"lora_b": [b[0], b[1][:, :1]]}),
        "adapters of two dtypes": ("lora_a", {"lora_a": [a[0], a[1].float()], "lora_b": [b[0], b[1].float()]}),
        "one seed": ("seed", {"seed": seed[:1]}),
        "a scale too few": ("scale", {"scale": scale[:1]}),
        "a probability above 1": ("dropout_p", {"dropout_p": [0.5, 1.5]}),
        "two adapters a layer": ("lora_a", {"lora_a": [*a, *a], "lora_b": [*b, *b], "scale": scale * 2, "dropout_p": p * 2}),
        "rows with adapters of their own": ("weight", {"order": torch.arange(4), "offsets": torch.tensor([0, 0, 4, 4])}),
        "an order alone": ("offsets", {"order": torch.arange(4)}),
    })  # fmt: skip
    _, xa, keep = torch.ops.fastlora.lora_linear_cuda(*right.values())
    backward = {
        "dy": dy, "x": x, "weight": weight, "lora_a": a, "lora_b": b, "xa": xa, "keep": keep, "scale": scale, "dropout_p": p,
        "order": None, "offsets": None, "need_dx": True, "need_da": True, "need_db": True,
    }  # fmt: skip
    print_accepted("lora_linear_backward_cuda", backward, {
        "a dy too few": ("dy", {"dy": dy[:1]}),
        "dy of another N": ("dy", {"dy": [dy[0], dy[1][:, :3]]}),
        "xa of one layer": ("xa", {"xa": xa[:1]}),
        "xa of another rank": ("xa", {"xa": xa[:, :, :2]}),
        "keep of one layer": ("keep", {"keep": keep[0]}),
        "keep of fewer rows": ("keep", {"keep": keep[:, :2]}),
    })  # fmt: skip
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_layers_that_share_x_give_what_is_needed(needs: tuple[bool, bool, bool]) -> None:
    (x, weight, bias, a, b), (scale, p, seed), dy = make_shared(SHARED["three layers"])
    _, xa, keep = torch.ops.fastlora.lora_linear_cuda(x, weight, bias, a, b, scale, p, seed, None, None)
    backward = torch.ops.fastlora.lora_linear_backward_cuda
    everything, some = (
        backward(dy, x, weight, a, b, xa, keep, scale, p, None, None, *wanted) for wanted in ((True,) * 3, needs)
    )
    for whole, part, need in zip(everything, some, needs, strict=True):
        assert torch.equal(part, whole) if need else part.numel() == 0


def test_layers_whose_rows_have_adapters_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """They run one after the other, what each leaves is put together, and the backward takes it apart again."""
    monkeypatch.setenv(ops.EMULATORS["cuda"], "1")
    monkeypatch.setattr(ops, "implementations", {**ops.implementations, **emulated.operators()})
    shapes = ((40, (8, 3)), (24, (2, 20)))  # N and every R of a layer
    made = [[make_layer(30, 72, N, R, torch.bfloat16) for R in ranks] for N, ranks in shapes]
    first = [layers[0] for layers in made]
    weight, bias, dy = ([layer[i].detach() for layer in first] for i in (1, 2, 5))
    index = torch.arange(30) % 3 - 1

    def run(implementation: str, widened: Callable[[Any], Any]) -> list[torch.Tensor]:
        monkeypatch.setattr(ops, "forced", implementation)
        torch.manual_seed(3)
        inputs = [first[0].x, *(layer[i] for i in (3, 4) for layers in made for layer in layers)]
        x, *adapters = inputs = [widened(tensor.detach()).requires_grad_() for tensor in inputs]
        a, b = (adapters[i : i + 2] for i in (0, 2)), (adapters[i : i + 2] for i in (4, 6))
        frozen = [list(map(widened, tensors)) for tensors in (weight, bias)]
        numbers = [[1.0, -0.5], [0.3, 2.0]]
        ys = functional.multi_lora_shared(x, *frozen, list(a), list(b), numbers, index, dropout_p=[[0.1, 0.0], 0.3])
        return [*(y.detach() for y in ys), *torch.autograd.grad(ys, inputs, list(map(widened, dy)))]

    found, eager, exact = run("cuda", dense), run("reference", dense), run("reference", double)
    for i, results in enumerate(zip(found, eager, exact, strict=True)):
        assert_within_bound(f"result {i}", *results)
