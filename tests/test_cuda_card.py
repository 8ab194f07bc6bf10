"""The CUDA C++ kernels of lora_linear and multi_lora on a real card, in 16 bits: the cases that the emulated card is tested with, and larger ones."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_cuda_by_column
import test_cuda_layers
import test_cuda_lora_linear
import test_cuda_multi_lora
import torch
from bounds import Layer, assert_within_bound, double, make_layer
from test_cuda_lora_linear import CUDA, NUMBERS, REFERENCE, SCALE, Case, run_layer
from torch import Tensor

from fastlora import functional, operators, ops, reference
from fastlora.choice import problems, table, trial

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or ("lora_linear", "cuda") not in ops.implementations,
    reason="needs a card and CUDA C++",
)

BF16, F32 = torch.bfloat16, torch.float32
LARGE = {
    "4096": Case(1024, 4096, 4096, 16, BF16, F32, dropout_p=0.1),
    "wide": Case(257, 4096, 14336, 64, BF16, F32, dropout_p=0.05),
    "narrow": Case(8192, 1024, 520, 8, torch.float16),
}


def to_card(value: Any) -> Any:
    """The tensors, and those in lists, with their strides."""
    if isinstance(value, Tensor):
        value = value.detach()
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda").copy_(value)
    return [to_card(one) for one in value] if isinstance(value, list) else value


def on_card(case: Case) -> tuple[Layer, float, Tensor | None]:
    *sizes, dropout_p = case
    seed = torch.tensor(7, device="cuda") if dropout_p else None
    return Layer(*map(to_card, make_layer(*sizes))), dropout_p, seed


CASES = {**test_cuda_lora_linear.CASES, **LARGE}


def check_lora_linear(case: Case, lay: Callable[[Tensor], Tensor] = lambda weight: weight) -> None:
    """`lay`: how the frozen weight lies, for the kernels."""
    layer, dropout_p, seed = on_card(case)
    laid = layer._replace(weight=to_card(lay(layer.weight.cpu())))
    found, eager = run_layer(CUDA, laid, dropout_p, seed), run_layer(REFERENCE, layer, dropout_p, seed)
    exact = run_layer(REFERENCE, Layer(*map(double, layer)), dropout_p, seed)
    for name in NUMBERS:
        assert_within_bound(name, found[name], eager[name], exact[name])
    kept, K = [results["keep"] for results in (found, eager)], layer.x.shape[1]
    assert kept[0].shape == kept[1].shape
    if kept[0].numel():
        assert torch.equal(*(reference.read_keep(keep, K) for keep in kept))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_lora_linear(case: Case) -> None:
    check_lora_linear(case)


BY_COLUMN = {**test_cuda_by_column.CASES, "4096": LARGE["4096"], "wide": LARGE["wide"]}


@pytest.mark.parametrize("case", BY_COLUMN.values(), ids=BY_COLUMN)
def test_a_weight_that_lies_by_column(case: Case) -> None:
    check_lora_linear(case, test_cuda_by_column.by_column)


def test_odd_sizes_with_gaps() -> None:
    layer = Layer(*map(to_card, test_cuda_lora_linear.odd_layer()))
    found, eager = run_layer(CUDA, layer), run_layer(REFERENCE, layer)
    exact = run_layer(REFERENCE, Layer(*map(double, layer)))
    for name in NUMBERS:
        assert_within_bound(name, found[name], eager[name], exact[name])


def test_two_runs_and_a_graph_are_equal() -> None:
    """Bitwise: sums have one order, whoever comes first."""
    problem = on_card(LARGE["4096"])
    once = run_layer(CUDA, *problem)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run_layer(CUDA, *problem)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run_layer(CUDA, *problem)
    for _ in range(2):
        graph.replay()
        for name, first in once.items():
            assert torch.equal(first, captured[name]), name


QUERY_KEY_VALUE = test_cuda_layers.Shared(
    1024, 4096, ((4096, 16), (1024, 16), (1024, 16)), BF16, F32, dropout_p=(0.1, 0.0, 0.1)
)
SHARED = {**test_cuda_layers.SHARED, "query, key, value": QUERY_KEY_VALUE}


@pytest.mark.parametrize("case", SHARED.values(), ids=SHARED)
def test_layers_that_share_x(case: test_cuda_layers.Shared) -> None:
    test_cuda_layers.check_shared(case, to_card)


LONG = test_cuda_multi_lora.sequences((3, 700), (0, 1500), (-1, 300), (1, 1000), (7, 96), (2, 500))
LARGE_MULTI_LORA = {
    "4096": {"index": LONG, "ranks": (16, 16, 16, 16), "K": 4096, "N": 4096, "dropout": True},
    "4096, mixed": {
        "index": test_cuda_multi_lora.mixed(4096),
        "ranks": (4, 64, 16, 100),
        "K": 4096,
        "N": 4096,
        "adapter_dtype": F32,
    },
}


def multi_lora_backward(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    return test_cuda_multi_lora.backward_of_layer(CUDA[1], *given)


MULTI_LORA_CASES = {**test_cuda_multi_lora.CASES, **test_cuda_multi_lora.MANY, **LARGE_MULTI_LORA}
MULTI_LORA_GRADIENTS = {**test_cuda_multi_lora.GRADIENTS, **LARGE_MULTI_LORA}


def check_multi_lora(case: dict[str, Any], lay: Callable[[Tensor], Tensor] = lambda weight: weight) -> None:
    made = test_cuda_multi_lora.make(**case)
    given = test_cuda_multi_lora.Arguments(*map(to_card, made))
    y, xa, _ = test_cuda_multi_lora.of_layer(CUDA[0], given._replace(weight=to_card(lay(made.weight))))
    eager_y, eager_xa, _ = test_cuda_multi_lora.by_reference(given)
    exact_y, exact_xa, _ = test_cuda_multi_lora.exact(given)
    valid = ~exact_y.isnan().all(1)
    assert y[~valid].isnan().all()
    assert_within_bound("y", y[valid], eager_y[valid], exact_y[valid])
    assert_within_bound("xa", xa, eager_xa, exact_xa)


@pytest.mark.parametrize("case", MULTI_LORA_CASES.values(), ids=MULTI_LORA_CASES)
def test_multi_lora(case: dict[str, Any]) -> None:
    check_multi_lora(case)


MULTI_LORA_BY_COLUMN = {
    **test_cuda_by_column.FEW,
    "decode": {"index": test_cuda_multi_lora.mixed(32), "K": 4096, "N": 4096},
    "100 rows": {"index": test_cuda_multi_lora.mixed(100), "K": 139, "N": 264, "dropout": True},
}


@pytest.mark.parametrize("case", MULTI_LORA_BY_COLUMN.values(), ids=MULTI_LORA_BY_COLUMN)
def test_multi_lora_by_column(case: dict[str, Any]) -> None:
    check_multi_lora(case, test_cuda_by_column.by_column)
    given = on_card_backward(case)
    laid = given._replace(weight=to_card(test_cuda_by_column.by_column(given.weight.cpu())))
    test_cuda_multi_lora.check_backward(laid, given, run=multi_lora_backward)


def on_card_backward(case: dict[str, Any]) -> test_cuda_multi_lora.Backward:
    made = test_cuda_multi_lora.make_backward(test_cuda_multi_lora.make(**case))
    return test_cuda_multi_lora.Backward(*map(to_card, made))


@pytest.mark.parametrize("case", MULTI_LORA_GRADIENTS.values(), ids=MULTI_LORA_GRADIENTS)
def test_multi_lora_backward(case: dict[str, Any]) -> None:
    test_cuda_multi_lora.check_backward(on_card_backward(case), run=multi_lora_backward)


def test_two_runs_of_multi_lora_backward_are_equal() -> None:
    given = on_card_backward(LARGE_MULTI_LORA["4096"])
    once, again = (multi_lora_backward(*given) for _ in range(2))
    for first, second in zip(once, again, strict=True):
        assert torch.equal(first.nan_to_num(), second.nan_to_num())


def test_gradients_by_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way from functional.lora_linear, in three dimensions."""
    layer = Layer(*map(to_card, make_layer(48, 64, 40, 8, BF16, F32)))
    x, weight, bias, lora_a, lora_b, dy = layer

    def gradients() -> list[Tensor]:
        inputs = [tensor.requires_grad_() for tensor in (x.view(4, 12, 64).detach(), lora_a.detach(), lora_b.detach())]
        torch.manual_seed(0)
        y = functional.lora_linear(inputs[0], weight, bias, inputs[1], inputs[2], SCALE, dropout_p=0.1)
        return [y.detach(), *torch.autograd.grad(y, inputs, dy.view(4, 12, 40))]

    torch.manual_seed(0)
    seed = torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device="cuda")
    right = run_layer(REFERENCE, Layer(*map(double, layer)), 0.1, seed)
    monkeypatch.setattr(ops, "forced", "reference")
    eager = gradients()
    monkeypatch.setattr(ops, "forced", "cuda")
    for name, value, near in zip(("y", "dx", "da", "db"), gradients(), eager, strict=True):
        assert_within_bound(name, value, near, right[name].view(value.shape))


FAULTY = """
import torch
from fastlora import ops
from fastlora.choice import measure, trial
measure.SHAPES = {"small": (48, 40)}
measure.ratios = lambda functions, *_: {name: 0.5 for name in functions if name != "reference"}
ops.availability()
def faulty(x, *_):
    return x[torch.full((1,), 2**40, device=x.device)]  # an assertion on the card, told by the next one who waits for it
ops.implementations["lora_linear", "cuda"] = faulty
trial.answer()
"""


def test_a_kernel_that_faults_is_refused_and_this_process_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path))
    monkeypatch.delenv("FASTLORA_TABLE")
    monkeypatch.setattr(ops, "forced", None)
    monkeypatch.setattr(table, "SHIPPED", tmp_path)
    monkeypatch.setattr(trial, "ANSWER", FAULTY)
    monkeypatch.setitem(problems.LINEAR_ROWS, "cuda", (64,))
    table.load_state(None)
    weight = torch.ones(8, 8, device="cuda", dtype=BF16)
    with pytest.warns(UserWarning, match="cuda is refused for lora_linear: .*CUDA error"):
        trial.try_out({"lora_linear": [weight]})
    assert operators.lora_linear.choose(weight.expand(64, 8, 8)[:, 0], weight).implementation != "cuda"
    assert (
        operators.lora_linear.choose(weight.expand(64, 8, 8)[:, 0], weight, backward=True).implementation != "reference"
    )
    assert weight.sum().item() == 64
    table.load_state(None)
