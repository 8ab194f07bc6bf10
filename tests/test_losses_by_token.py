"""A loss before its sum: `linear_cross_entropy_by_row` and `LanguageModelLoss.by_token`, which weigh several adapters' tokens apart."""

import pytest
import torch
from bounds import assert_within_bound_over_inputs, dense, double, gapped, gradients
from test_language_model_loss import MODELS, adapted, batch, trained
from test_linear_cross_entropy import Seen, chosen, head, in_blocks, raw  # noqa: F401  (fixtures)
from torch import Tensor
from torch.nn import functional as F

from fastlora.functional import linear_cross_entropy
from fastlora.language_model_loss import LanguageModelLoss, cross_entropy, cross_entropy_by_row
from fastlora.operators.linear_cross_entropy import linear_cross_entropy_by_row


def eager(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    logits = F.linear(hidden, weight, bias)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="none")


@pytest.mark.usefixtures("in_blocks", "chosen")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "D", "V"), [(19, 33, 101), (1, 16, 5), (0, 8, 11)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_bound(n, D, V, dtype, with_bias):
    def compute():
        hidden, weight, bias, labels = raw(n, D, V, dtype, with_bias)
        weights = torch.randn(n)
        results = []
        for function, made in ((linear_cross_entropy_by_row, gapped), (eager, dense), (eager, double)):
            own = made(hidden).requires_grad_()
            losses = function(own, made(weight), None if bias is None else made(bias), labels)
            (dhidden,) = gradients(losses, [own], weights.to(losses.dtype))
            results.append({"losses": losses.detach(), "dhidden": dhidden})
        return {name: tuple(of_one[name] for of_one in results) for name in ("losses", "dhidden")}

    assert_within_bound_over_inputs(compute)


def test_its_sum_has_the_gradients_of_the_sum():
    hidden, weight, bias, labels = raw(7, 12, 31, torch.float32)
    hidden.requires_grad_()
    rows = gradients(linear_cross_entropy_by_row(hidden, weight, bias, labels).sum(), [hidden], torch.tensor(1.0))
    total = gradients(linear_cross_entropy(hidden, weight, bias, labels), [hidden], torch.tensor(1.0))
    assert torch.equal(rows[0], total[0])


def test_a_trained_head_is_refused_and_a_second_derivative_too():
    hidden, weight, bias, labels = head(5, 12, 31, torch.float32)
    with pytest.raises(ValueError, match="weight: requires a gradient, expected it frozen"):
        linear_cross_entropy_by_row(hidden, weight, bias, labels)
    with pytest.raises(ValueError, match="bias: requires a gradient"):
        linear_cross_entropy_by_row(hidden, weight.detach(), bias, labels)
    with pytest.raises(IndexError, match="labels: expected numbers from 0 to 30"):
        linear_cross_entropy_by_row(hidden, weight.detach(), None, labels + 31)
    losses = linear_cross_entropy_by_row(hidden, weight.detach(), None, labels)
    (first,) = torch.autograd.grad(losses.sum(), hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match="twice"):
        first.sum().backward()


def test_under_autocast_it_is_the_same_as_casting_by_hand():
    hidden, weight, bias, labels = raw(9, 16, 31, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_cross_entropy_by_row(hidden, weight.bfloat16(), bias.bfloat16(), labels)
    assert torch.equal(found, linear_cross_entropy_by_row(*(one.bfloat16() for one in (hidden, weight, bias)), labels))


def test_plain_cross_entropies_are_the_sums_parts():
    logits, labels = torch.randn(64, 8), torch.randint(8, (64,))
    found = cross_entropy_by_row(logits, labels)
    torch.testing.assert_close(found, F.cross_entropy(logits, labels, reduction="none"))
    torch.testing.assert_close(found.sum(), cross_entropy(logits, labels))
    assert cross_entropy_by_row(logits[:0], labels[:0]).shape == (0,)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "t5"])
def test_a_models_tokens_sum_up_to_its_loss(name):
    """And their weighted sum to its gradients: row after row, padding or not."""
    model = adapted(name)
    parameters, loss = list(trained(model).values()), LanguageModelLoss(model)
    counted = (batch()["labels"][:, 1:] != -100).sum(1).tolist()
    found = loss.by_token(batch())
    assert loss.path == MODELS[name][1] and found.shape == (sum(counted),)
    weights = torch.tensor([0.5, 0.0, 2.0], dtype=found.dtype).repeat_interleave(torch.tensor(counted))
    mine = torch.autograd.grad((found * weights).sum(), parameters)
    expected = []
    for row, weight in ((0, 0.5), (2, 2.0)):
        total = loss({key: value[row : row + 1] for key, value in batch().items()})
        torch.testing.assert_close(found.split(counted)[row].sum(), total, rtol=1e-9, atol=1e-9)
        expected.append([weight * one for one in torch.autograd.grad(total, parameters)])
    for one, first, second in zip(mine, *expected, strict=True):
        torch.testing.assert_close(one, first + second, rtol=1e-9, atol=1e-9)


def test_a_head_with_an_adapter_does_not_tell_its_tokens_apart():
    loss = LanguageModelLoss(adapted("llama", target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ValueError, match="the head has an adapter"):
        loss.by_token(batch())


@pytest.mark.usefixtures("in_blocks", "chosen")
def test_by_row_whoever_looks_at_operators_sees_one_and_plain_tensors_pass_the_dispatcher_by(monkeypatch):
    *leaves, labels = raw(5, 12, 31, torch.float32)
    with Seen() as seen:
        linear_cross_entropy_by_row(*leaves, labels)
    assert [name for name in seen.names if "fastlora" in name] == ["fastlora.linear_cross_entropy.default"]
    monkeypatch.setattr(torch.ops.fastlora, "linear_cross_entropy", None)
    linear_cross_entropy_by_row(*leaves, labels)


def test_by_row_a_transform_is_refused():
    hidden, weight, bias, labels = raw(5, 12, 31, torch.float32)
    with pytest.raises(NotImplementedError):
        torch.func.vmap(lambda one: linear_cross_entropy_by_row(one[None], weight, bias, labels[:1]))(hidden)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("trained", [False, True])
def test_the_rows_losses_are_written_beside_the_sum_which_keeps_its_bits(dtype, trained):
    given = [head, raw][not trained](19, 33, 101, dtype)
    leaves = [one.requires_grad_() for one in given[: 3 if trained else 1]]
    alone = linear_cross_entropy(*given)
    losses = torch.full((19,), torch.nan, dtype=alone.dtype)
    beside = linear_cross_entropy(*given, losses)
    assert torch.equal(alone, beside) and not losses.requires_grad
    for one, other in zip(*(gradients(of, leaves, torch.tensor(0.37)) for of in (alone, beside)), strict=True):
        assert torch.equal(one, other)
    torch.testing.assert_close(
        losses, eager(*(one.detach() for one in given)), rtol=1e-5, atol=0.1 if dtype == torch.bfloat16 else 1e-5
    )
    assert abs(losses.sum() - alone) <= (1e-2 if dtype == torch.bfloat16 else 1e-5) * alone


@pytest.mark.parametrize(
    "losses",
    [
        torch.zeros(4),
        torch.zeros(5, dtype=torch.bfloat16),
        torch.zeros(5).requires_grad_(),
        torch.zeros(5, device="meta"),
        [0.0] * 5,
    ],
)
def test_where_losses_are_written_to_is_checked(losses):
    with pytest.raises((TypeError, ValueError), match="losses"):
        linear_cross_entropy(*raw(5, 12, 31, torch.float32), losses)


@pytest.mark.parametrize("name", [*MODELS, "head"])
def test_a_models_tokens_are_told_beside_its_loss(name):
    """On every path, of a head with an adapter, and with the same gradients."""
    model = adapted("llama", target_modules=["q_proj", "lm_head"]) if name == "head" else adapted(name)
    parameters, loss, given = list(trained(model).values()), LanguageModelLoss(model), batch()
    counted = given["labels"] if name == "t5" else given["labels"][:, 1:]
    alone = loss(given)
    losses = torch.full((int((counted != -100).sum()),), torch.nan, dtype=alone.dtype)
    beside = loss(given, losses)
    torch.testing.assert_close(beside, alone, rtol=1e-12, atol=0)
    torch.testing.assert_close(losses.sum(), alone.detach(), rtol=1e-9, atol=0)
    if name not in ("t5", "head"):
        torch.testing.assert_close(losses, loss.by_token(given).detach(), rtol=1e-9, atol=1e-9)
    for one, other in zip(*(torch.autograd.grad(of, parameters) for of in (alone, beside)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_the_path_can_be_chosen_before():
    loss = LanguageModelLoss(adapted("llama"))
    loss.choose(batch())
    assert loss.path == "fused"
