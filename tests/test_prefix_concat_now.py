"""prefix_concat where nobody traces: csrc's entry for it gives what the operator gives, and wrong arguments meet the same words."""

from functools import partial
from typing import Any

import pytest
import torch
from bounds import gradients, print_accepted, run_apart
from conftest import implementations
from measurements import entry, hold
from test_prefix_concat import MASKS, assert_same, make_batch, raw_arguments, with_ids
from test_prefix_concat_arguments import IDS, WRONG, integers, right_arguments
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastlora import ops
from fastlora.functional import prefix_concat
from fastlora.operators import prefix_concat as module

pytestmark = pytest.mark.skipif(
    "cpu" not in implementations("prefix_concat", "cpu"), reason="the native extension is not built"
)


class Watched(TorchDispatchMode):
    """Lists the operators that reach torch's dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A line for each call of csrc's entries."""
    called: list[str] = []

    def counted(name: str, entry: Any, *arguments: Any) -> Any:
        called.append(name)
        return entry(*arguments)

    for name in ("_now", "_now_backward"):
        monkeypatch.setattr(module, name, partial(counted, name, getattr(module, name)))
    return called


@pytest.mark.parametrize("looked_up", [False, True], ids=["embeds", "ids"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_as_the_operator(mask: list[str], looked_up: bool, count: list[str]) -> None:
    """Bit for bit, results and gradients, for prompts as one tensor and as a list."""
    batch = make_batch(mask, (2, 2, 2))
    embedding = torch.randn(7, 5)
    ids = torch.randint(0, 7, batch.attention_mask.shape)
    given: dict[str, Any] = {"input_ids": ids, "embedding": embedding} if looked_up else {}
    embeds = None if looked_up else batch.embeds
    options = {
        **given,
        "prompt_index": batch.prompt_index,
        "labels": ids,
        "position_ids": torch.randint(0, 9, ids.shape),
    }
    stacked = torch.stack(batch.prompts).detach().requires_grad_()
    for prompts, leaves in ((stacked, [stacked]), (batch.prompts, batch.prompts)):
        leaves = [*leaves, *([] if looked_up else [batch.embeds])]
        count.clear()
        got = prefix_concat(prompts, embeds, batch.attention_mask, **options)
        dout = torch.randn_like(got.embeds)
        grads = gradients(got.embeds, leaves, dout)
        assert count == ["_now", "_now_backward"]
        with Watched() as watched:
            expected = prefix_concat(prompts, embeds, batch.attention_mask, **options)
            wanted = gradients(expected.embeds, leaves, dout)
        assert count == ["_now", "_now_backward"] and "fastlora.prefix_concat_backward.default" in watched.names
        assert_same(got, expected)
        for grad, want in zip(grads, wanted, strict=True):
            assert torch.equal(grad, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_prompts_of_another_dtype_get_gradients_of_their_own(dtype: torch.dtype, count: list[str]) -> None:
    other = torch.float32 if dtype is torch.bfloat16 else torch.bfloat16
    batch = make_batch(["0111", "1111"], (3, 3, 3), dtype=dtype, prompts_dtype=other)
    stacked = torch.stack(batch.prompts).detach().requires_grad_()
    out = prefix_concat(stacked, *batch[1:3], prompt_index=batch.prompt_index).embeds
    (grad,) = gradients(out, [stacked], torch.ones_like(out))
    assert count == ["_now", "_now_backward"] and out.dtype is dtype and grad.dtype is other
    assert grad.shape == stacked.shape


def run_backward(result: Any) -> None:
    result.embeds.backward(torch.ones_like(result.embeds))


def test_another_implementation_does_not_take_it(count: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "forced", "reference")
    for arguments in (right_arguments(), stacked_arguments()):
        run_backward(prefix_concat(**arguments))
    assert count == []


def test_the_backward_is_chosen_for_itself(count: list[str]) -> None:
    hold(entry(0.5, "prefix_concat"), entry(2.0, "prefix_concat_backward"))
    run_backward(prefix_concat(**stacked_arguments()))
    assert count == ["_now"]


def test_a_backward_that_is_watched_goes_through_torchs_dispatcher(count: list[str]) -> None:
    result = prefix_concat(**stacked_arguments())
    with Watched() as watched:
        run_backward(result)
    assert count == ["_now"] and "fastlora.prefix_concat_backward.default" in watched.names


@pytest.mark.parametrize("looked_up", [False, True], ids=["embeds", "ids"])
def test_what_csrc_checks_is_not_checked_twice(
    looked_up: bool, count: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def line_up(prompts: Any) -> None:
        raise AssertionError("the arguments are checked in Python")

    monkeypatch.setattr(module, "_line_up", line_up)
    for changes in ({}, {"labels": None, "position_ids": None}, {"prompts": torch.ones(1, 2, 5), "prompt_index": None}):
        prefix_concat(**{**stacked_arguments(), **(IDS if looked_up else {}), **changes})
    with torch.no_grad():  # where an embedding that trains is no fault
        prefix_concat(**{**stacked_arguments(), **IDS, "embedding": torch.ones(7, 5, requires_grad=True)})
    assert count == ["_now"] * 4


def test_narrow_integers_take_it_too(count: list[str]) -> None:
    """Once they are int64, which csrc asks for; of the tokens' and labels', which are often narrow, it is not asked in vain."""
    prompts, mask = torch.randn(2, 2, 5), torch.ones(2, 4, dtype=torch.bool)
    given = {"input_ids": integers(2, 4) + 3, "labels": integers(2, 4), "prompt_index": integers(2)}
    options = {"embedding": torch.randn(7, 5), "position_ids": integers(2, 4)}
    wide = prefix_concat(prompts, None, mask, **given, **options)
    for name in given:
        narrow = prefix_concat(prompts, None, mask, **{**given, name: given[name].to(torch.int32)}, **options)
        assert_same(narrow, wide)
    assert len(count) == 1 + 1 + 1 + 2  # the last is the prompt_index


def stacked_arguments() -> dict[str, Any]:
    return {**right_arguments(), "prompts": torch.ones(3, 2, 5)}


STACKED = {case: one for case, one in WRONG.items() if isinstance(one[1].get("prompts", torch.ones(1)), Tensor)}


@pytest.mark.parametrize(("name", "changes"), STACKED.values(), ids=STACKED)
def test_wrong_arguments(name: str, changes: dict[str, Any]) -> None:
    """What csrc refuses is refused in the function's words, and what only the function asks it asks first."""
    start = name.replace("[", r"\[").replace("]", r"\]")
    with pytest.raises((IndexError, TypeError, ValueError), match=rf"^{start}: .*expected"):
        prefix_concat(**{**stacked_arguments(), **changes})


def test_prompts_without_a_dimension_are_not_taken_for_rows() -> None:
    """csrc takes rows [sum P_i, D], which these could be."""
    with pytest.raises(ValueError, match=r"^prompts: .*expected shape \[S, P, D\]"):
        prefix_concat(torch.ones(1, 1), torch.ones(2, 4, 1), torch.ones(2, 4))


def test_what_fails_in_csrc_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault that is none of the arguments' is raised as it is."""

    def fail(*_: Any) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(module, "_now", fail)
    with pytest.raises(RuntimeError, match="^no memory$"):
        prefix_concat(**stacked_arguments())


def test_prompts_that_require_no_gradient_make_no_graph(count: list[str]) -> None:
    assert not prefix_concat(**{**stacked_arguments(), "embeds": torch.ones(2, 4, 5)}).embeds.requires_grad
    assert count == ["_now"]


def call_the_entries_wrongly() -> None:
    right = {**raw_arguments(), "starts": [0, 2, 5, 6]}
    wrong: dict[str, tuple[str, dict[str, Any]]] = {
        "prompts: another D": ("prompts", {"prompts": torch.ones(6, 4)}),
        "prompts: 1-D": ("prompts", {"prompts": torch.ones(5)}),
        "prompts: 4-D": ("prompts", {"prompts": torch.ones(1, 1, 6, 5)}),
        "prompts: integers": ("prompts", {"prompts": integers(6, 5)}),
        "prompts: too few rows": ("starts", {"prompts": torch.ones(1, 5, 5)}),
        "starts: falling": ("starts", {"starts": [0, 5, 2, 6]}),
        "starts: beyond the prompts": ("starts", {"starts": [0, 2, 5, 2**40]}),
        "starts: empty": ("starts", {"starts": []}),
        "starts: no prompt": ("starts", {"starts": [0]}),
        "max_prompt: too small": ("max_prompt", {"max_prompt": 1}),
        "prompt_index: dtype": ("prompt_index", {"prompt_index": integers(2).int()}),
        "embeds: None": ("embeds", {"embeds": None}),
        "attention_mask: 1-D": ("attention_mask", {"attention_mask": integers(4)}),
        "labels: dtype": ("labels", {"labels": integers(2, 4).int()}),
    }
    print_accepted("prefix_concat_now_cpu", right, wrong)
    ids = {**with_ids(raw_arguments()), "starts": [0, 2, 5, 6]}
    print_accepted("prefix_concat_now_cpu", ids, {"embedding: 1-D": ("embedding", {"embedding": torch.ones(5)})})
    source = torch.ops.fastlora.prefix_concat_cpu(*raw_arguments().values())[4]
    backward = {"dout": torch.ones(2, 7, 5), "source": source, "prompts": [3, 2, 5], "tokens": 4, "p": True, "e": True}
    print_accepted(
        "prefix_concat_backward_now_cpu",
        backward,
        {
            "dout: 2-D": ("dout", {"dout": torch.ones(2, 7)}),
            "prompts: another D": ("prompts", {"prompts": [6, 4]}),
            "prompts: one size": ("prompts", {"prompts": [5]}),
            "prompts: none": ("prompts", {"prompts": []}),
            "prompts: negative": ("prompt_rows", {"prompts": [-6, 5]}),
            "prompts: fewer than in source": ("source", {"prompts": [1, 5]}),
            "source: beyond the tokens": ("source", {"source": source + 100}),
        },
    )


def test_wrong_arguments_to_the_entries() -> None:
    """They raise, naming the argument; none ends the process."""
    assert run_apart("test_prefix_concat_now", call_the_entries_wrongly) == ""


def test_a_missing_number_is_told_with_its_kind() -> None:
    entry = torch.ops.fastlora.prefix_concat_now_cpu
    arguments = {**with_ids(raw_arguments()), "starts": [0, 2, 5, 6]}
    assert entry(*arguments.values())[5] == 0
    far = {**arguments, "input_ids": arguments["input_ids"] + 2**62}
    assert entry(*far.values())[5] == 1
    assert entry(*{**far, "attention_mask": integers(2, 4)}.values())[5] == 0  # nobody looks at padding
    assert entry(*{**arguments, "prompt_index": torch.tensor([0, 3])}.values())[5] == 2
    with pytest.raises(IndexError, match="^input_ids: expected numbers from 0 to 6"):
        prefix_concat(**{**stacked_arguments(), **IDS, "input_ids": integers(2, 4) - 1})
    with pytest.raises(IndexError, match="^prompt_index: expected numbers from 0 to 2"):
        prefix_concat(**{**stacked_arguments(), "prompt_index": integers(2) - 1})
