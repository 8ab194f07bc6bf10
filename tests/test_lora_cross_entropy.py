"""lora_cross_entropy: the loss under a head with an adapter, by both implementations, against eager PyTorch and autograd in float64."""

from typing import Any

import pytest
import torch
from bounds import assert_within_bound_over_inputs, dense, double, gapped, gradients
from torch import Tensor
from torch.nn import functional as F

from fastlora import ops
from fastlora.functional import lora_cross_entropy
from fastlora.operators import linear_cross_entropy
from fastlora.operators import lora_cross_entropy as operator

OPERATOR = "lora_cross_entropy"


@pytest.fixture(params=["reference", "blocks"])
def chosen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(ops, "forced", "reference" if request.param == "reference" else None)
    return request.param


@pytest.fixture(params=[False, True], ids=["whole", "blocks"])
def in_blocks(request, monkeypatch) -> None:
    """Run as it is, and cut into blocks that fit nothing: 3 rows, 5 words of the vocabulary."""
    if request.param:
        monkeypatch.setattr(linear_cross_entropy, "ROWS_AT_ONCE", 3)
        monkeypatch.setattr(linear_cross_entropy, "LOGITS_AT_ONCE", {"cpu": 15, "cuda": 15})


def eager(hidden: Tensor, xa: Tensor, lora_b: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    logits = F.linear(hidden, weight, bias) + xa.to(hidden.dtype) @ lora_b.to(hidden.dtype).T
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="sum")


def ours(hidden: Tensor, xa: Tensor, lora_b: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    return lora_cross_entropy(hidden, xa, weight, bias, lora_b, labels)


def draw(
    n: int, D: int, R: int, V: int, dtype: torch.dtype, adapter: torch.dtype | None = None, bias: bool = True
) -> list[Any]:
    """The trained ones first."""
    own = adapter or dtype
    hidden, weight, c = torch.randn(n, D), torch.randn(V, D) * 3 / D**0.5, torch.randn(V)
    xa, lora_b = torch.randn(n, R), torch.randn(V, R) / R**0.5
    trained = [one.requires_grad_() for one in (hidden.to(dtype), xa.to(dtype), lora_b.to(own))]
    return [*trained, weight.to(dtype), c.to(dtype) if bias else None, torch.randint(V, (n,))]


def loss_and_gradients(function: Any, given: list[Any]) -> dict[str, Tensor]:
    loss = function(*given)
    found = gradients(loss, given[:3], torch.tensor(0.37).to(loss.dtype))
    return {"loss": loss.detach(), **dict(zip(("dh", "dxa", "db"), found, strict=True))}


@pytest.mark.usefixtures("in_blocks")
@pytest.mark.parametrize(
    ("dtype", "adapter"),
    [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.float32), (torch.float16, torch.float32)],
    ids=str,
)
@pytest.mark.parametrize(("n", "D", "R", "V"), [(7, 33, 3, 101), (19, 33, 16, 101), (1, 16, 1, 5), (0, 8, 2, 11)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", [lambda one: one, gapped], ids=["dense", "gaps"])
def test_bound(chosen, n, D, R, V, dtype, adapter, bias, layout):
    def compute():
        *given, labels = draw(n, D, R, V, dtype, adapter, bias)
        given = [one if one is None else layout(one) for one in given]
        wide = [double(one) for one in given]
        exact = [one if one is None else one.requires_grad_(i < 3) for i, one in enumerate(wide)]
        plain = [one if one is None else dense(one) for one in given]
        runs = [
            loss_and_gradients(function, [*values, labels])
            for function, values in ((ours, given), (eager, plain), (eager, exact))
        ]
        return {name: tuple(results[name] for results in runs) for name in runs[0]}

    assert_within_bound_over_inputs(compute)


@pytest.mark.usefixtures("in_blocks")
@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck(chosen, bias):
    hidden, xa, lora_b, *rest = draw(5, 6, 2, 13, torch.float64, bias=bias)
    assert torch.autograd.gradcheck(lambda *trained: ours(*trained, *rest), (hidden, xa, lora_b))


def test_autocast_casts_as_the_head_would(chosen):
    *given, labels = draw(9, 16, 3, 31, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = ours(*given, labels)
    narrow = [one.detach().bfloat16() for one in given]
    assert torch.equal(found, ours(*narrow, labels))


def test_each_has_its_gradient_alone(chosen):
    given = draw(7, 12, 3, 31, torch.float32)
    together = loss_and_gradients(ours, given)
    for i, name in enumerate(("dh", "dxa", "db")):
        for j in range(3):
            given[j] = given[j].detach().requires_grad_(i == j)
        [found] = gradients(ours(*given), [given[i]], torch.tensor(0.37))
        assert torch.equal(found, together[name]), name


def test_a_frozen_b_costs_no_second_product(monkeypatch):
    given = draw(7, 12, 3, 31, torch.float32)
    monkeypatch.setattr(operator, "run_backward", None)
    given[2].requires_grad_(False)
    ours(*given).backward()
    given[2].requires_grad_()
    with pytest.raises(TypeError):
        ours(*given).backward()


def test_no_tensor_has_a_row_for_each_token_and_a_column_for_each_word(monkeypatch):
    monkeypatch.setattr(linear_cross_entropy, "LOGITS_AT_ONCE", {"cpu": 256, "cuda": 256})
    made, product = [], linear_cross_entropy.frozen_linear.run

    def run(*args: Any) -> Tensor:
        made.append(found := product(*args))
        return found

    monkeypatch.setattr(linear_cross_entropy.frozen_linear, "run", run)
    ours(*draw(64, 8, 2, 1000, torch.bfloat16)).backward()
    assert len(made) == 500 and max(one.numel() for one in made) == 256


def test_bits_repeat(chosen):
    given = draw(11, 16, 4, 31, torch.bfloat16)
    first, second = loss_and_gradients(ours, given), loss_and_gradients(ours, given)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(chosen, dtype):
    hidden, xa, lora_b, weight, bias, labels = draw(7, 12, 3, 31, dtype)
    given = hidden.detach(), xa.detach(), weight, bias, lora_b.detach(), labels
    for need in (True, False):
        torch.library.opcheck(torch.ops.fastlora.lora_cross_entropy.default, (*given, need))
    _, highest, total, *_ = torch.ops.fastlora.lora_cross_entropy(*given, False)
    arguments = (torch.tensor(0.37), *given, highest, total)
    torch.library.opcheck(torch.ops.fastlora.lora_cross_entropy_backward.default, arguments)


def test_compiles_whole(chosen):
    torch.compiler.reset()
    hidden, xa, lora_b, weight, bias, labels = draw(7, 12, 3, 31, torch.float32)
    function = operator.LoRACrossEntropyFunction.apply
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for call in (compiled, function):
        loss = call(hidden, xa, weight, bias, lora_b, labels)
        results.append([loss, *gradients(loss, [hidden, xa, lora_b], torch.tensor(1.0))])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    torch.compiler.reset()


RIGHT = {
    "hidden": torch.ones(2, 4),
    "xa": torch.ones(2, 3),
    "weight": torch.ones(5, 4),
    "bias": None,
    "lora_b": torch.ones(5, 3),
    "labels": torch.tensor([0, 4]),
}


@pytest.mark.parametrize(
    ("name", "error", "value"),
    [
        ("hidden", ValueError, torch.ones(2, 3, 4)),
        ("xa", TypeError, [1.0]),
        ("xa", ValueError, torch.ones(3, 3)),
        ("xa", ValueError, torch.ones(2)),
        ("xa", ValueError, torch.ones(2, 3, device="meta")),
        ("weight", ValueError, torch.ones(5, 3)),
        ("weight", (TypeError, ValueError), torch.ones(5, 4, dtype=torch.float64)),
        ("losses", (TypeError, ValueError), torch.ones(3)),
        ("weight", ValueError, torch.ones(5, 4, requires_grad=True)),
        ("bias", ValueError, torch.ones(4)),
        ("bias", ValueError, torch.ones(5, requires_grad=True)),
        ("lora_b", TypeError, None),
        ("lora_b", ValueError, torch.ones(5, 2)),
        ("lora_b", ValueError, torch.ones(4, 3)),
        ("lora_b", ValueError, torch.ones(5, 3, device="meta")),
        ("labels", IndexError, torch.tensor([0, 5])),
    ],
)
def test_a_wrong_argument_is_named(name, error, value):
    with pytest.raises(error, match=rf"^{name}: "):
        lora_cross_entropy(**{**RIGHT, name: value})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_rows_losses_are_written_beside_the_sum_which_keeps_its_bits(dtype):
    hidden, xa, lora_b, weight, bias, labels = given = draw(19, 33, 3, 101, dtype)
    alone = ours(*given)
    losses = torch.full((19,), torch.nan, dtype=alone.dtype)
    beside = lora_cross_entropy(hidden, xa, weight, bias, lora_b, labels, losses)
    assert torch.equal(alone, beside) and not losses.requires_grad
    logits = (F.linear(hidden, weight, bias) + xa @ lora_b.T).detach().to(alone.dtype)
    coarse = dtype == torch.bfloat16
    torch.testing.assert_close(
        losses, F.cross_entropy(logits, labels, reduction="none"), rtol=1e-5, atol=0.1 if coarse else 1e-5
    )
    assert abs(losses.sum() - alone) <= (1e-2 if coarse else 1e-5) * alone


def test_plain_tensors_pass_the_dispatcher_by(monkeypatch):
    for name in ("lora_cross_entropy", "lora_cross_entropy_backward"):
        monkeypatch.setattr(torch.ops.fastlora, name, None)
    ours(*draw(5, 12, 3, 31, torch.float32)).backward()
