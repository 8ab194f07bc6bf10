"""prefix_concat's arguments: wrong ones are named, by the function and by the native operators."""

from typing import Any

import pytest
import torch
from bounds import print_accepted, run_apart
from conftest import implementations
from test_prefix_concat import make_batch, raw_arguments, with_ids
from torch import Tensor

from fastlora import ops
from fastlora.functional import prefix_concat


def right_arguments() -> dict[str, Any]:
    batch = make_batch(["0011", "1111"])
    return {
        **batch._asdict(),
        "labels": torch.zeros(2, 4, dtype=torch.int64),
        "position_ids": torch.zeros(2, 4, dtype=torch.int64),
    }


def integers(*shape: int, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=torch.int64, device=device)


IDS = {"embeds": None, "input_ids": integers(2, 4), "embedding": torch.ones(7, 5)}
ONE = [torch.ones(2, 5)]
WRONG: dict[str, tuple[str, dict[str, Any]]] = {
    "prompts: None": ("prompts", {"prompts": None}),
    "prompts: a number": ("prompts", {"prompts": 3}),
    "prompts: empty list": ("prompts", {"prompts": []}),
    "prompts: empty tensor": ("prompts", {"prompts": torch.ones(0, 2, 5)}),
    "prompts: 2-D": ("prompts", {"prompts": torch.ones(2, 5)}),
    "prompts: integers": ("prompts", {"prompts": integers(3, 2, 5)}),
    "prompts: None inside": ("prompts[1]", {"prompts": [*ONE, None]}),
    "prompts: no dimension inside": ("prompts[0]", {"prompts": [torch.tensor(1.0)]}),
    "prompts: 3-D inside": ("prompts[0]", {"prompts": [torch.ones(1, 2, 5)]}),
    "prompts: another D inside": ("prompts[1]", {"prompts": [*ONE, torch.ones(2, 4)]}),
    "prompts: another dtype inside": ("prompts[1]", {"prompts": [*ONE, torch.ones(2, 5).double()]}),
    "prompts: another device inside": ("prompts[1]", {"prompts": [*ONE, torch.ones(2, 5, device="meta")]}),
    "prompts: another D": ("embeds", {"prompts": torch.ones(3, 2, 4)}),
    "prompts: on meta": ("attention_mask", {"prompts": torch.ones(3, 2, 5, device="meta")}),
    "embeds: a list": ("embeds", {"embeds": [1.0]}),
    "embeds: None": ("embeds", {"embeds": None}),
    "embeds: None, ids alone": ("embeds", {"embeds": None, "input_ids": integers(2, 4)}),
    "embeds: None, embedding alone": ("embeds", {"embeds": None, "embedding": torch.ones(7, 5)}),
    "embeds: and ids": ("embeds", {"input_ids": integers(2, 4), "embedding": torch.ones(7, 5)}),
    "embeds: and ids alone": ("embeds", {"input_ids": integers(2, 4)}),
    "embeds: and embedding alone": ("embeds", {"embedding": torch.ones(7, 5)}),
    "embeds: 2-D": ("embeds", {"embeds": torch.ones(2, 4)}),
    "embeds: another T": ("embeds", {"embeds": torch.ones(2, 5, 5)}),
    "embeds: integers": ("embeds", {"embeds": integers(2, 4, 5)}),
    "embeds: on meta": ("embeds", {"embeds": torch.ones(2, 4, 5, device="meta")}),
    "attention_mask: None": ("attention_mask", {"attention_mask": None}),
    "attention_mask: 1-D": ("attention_mask", {"attention_mask": integers(4)}),
    "attention_mask: 4-D": ("attention_mask", {"attention_mask": integers(2, 1, 4, 4)}),
    "attention_mask: complex": ("attention_mask", {"attention_mask": torch.ones(2, 4, dtype=torch.complex64)}),
    "attention_mask: on meta": ("attention_mask", {"attention_mask": integers(2, 4, device="meta")}),
    "input_ids: a list": ("input_ids", {**IDS, "input_ids": [[0] * 4] * 2}),
    "input_ids: floats": ("input_ids", {**IDS, "input_ids": torch.zeros(2, 4)}),
    "input_ids: another T": ("input_ids", {**IDS, "input_ids": integers(2, 3)}),
    "input_ids: too large": ("input_ids", {**IDS, "input_ids": integers(2, 4) + 7}),
    "input_ids: negative": ("input_ids", {**IDS, "input_ids": integers(2, 4) - 1}),
    "input_ids: far out of range": ("input_ids", {**IDS, "input_ids": integers(2, 4) + 2**62}),
    "input_ids: on meta": ("input_ids", {**IDS, "input_ids": integers(2, 4, device="meta")}),
    "embedding: a module": ("embedding", {**IDS, "embedding": torch.nn.Embedding(7, 5)}),
    "embedding: no dimension": ("embedding", {**IDS, "embedding": torch.tensor(1.0)}),
    "embedding: 1-D": ("embedding", {**IDS, "embedding": torch.ones(5)}),
    "embedding: another D": ("embedding", {**IDS, "embedding": torch.ones(7, 4)}),
    "embedding: empty": ("embedding", {**IDS, "embedding": torch.ones(0, 5)}),
    "embedding: integers": ("embedding", {**IDS, "embedding": integers(7, 5)}),
    "embedding: on meta": ("embedding", {**IDS, "embedding": torch.ones(7, 5, device="meta")}),
    "embedding: requires grad": ("embedding", {**IDS, "embedding": torch.ones(7, 5, requires_grad=True)}),
    "prompt_index: None of three": ("prompt_index", {"prompt_index": None}),
    "prompt_index: None of two": ("prompt_index", {"prompts": torch.ones(2, 2, 5), "prompt_index": None}),
    "prompt_index: a list": ("prompt_index", {"prompt_index": [0, 1]}),
    "prompt_index: floats": ("prompt_index", {"prompt_index": torch.zeros(2)}),
    "prompt_index: bools": ("prompt_index", {"prompt_index": torch.zeros(2, dtype=torch.bool)}),
    "prompt_index: another B": ("prompt_index", {"prompt_index": integers(3)}),
    "prompt_index: 2-D": ("prompt_index", {"prompt_index": integers(2, 1)}),
    "prompt_index: too large": ("prompt_index", {"prompt_index": integers(2) + 3}),
    "prompt_index: negative": ("prompt_index", {"prompt_index": integers(2) - 1}),
    "prompt_index: on meta": ("prompt_index", {"prompt_index": integers(2, device="meta")}),
    "labels: a list": ("labels", {"labels": [[0] * 4] * 2}),
    "labels: floats": ("labels", {"labels": torch.zeros(2, 4)}),
    "labels: another T": ("labels", {"labels": integers(2, 5)}),
    "labels: on meta": ("labels", {"labels": integers(2, 4, device="meta")}),
    "position_ids: floats": ("position_ids", {"position_ids": torch.zeros(2, 4)}),
    "position_ids: one row": ("position_ids", {"position_ids": integers(1, 4)}),
    "position_ids: on meta": ("position_ids", {"position_ids": integers(2, 4, device="meta")}),
}


@pytest.mark.parametrize(("name", "changes"), WRONG.values(), ids=WRONG)
def test_wrong_arguments(name: str, changes: dict[str, Any]) -> None:
    start = name.replace("[", r"\[").replace("]", r"\]")
    with pytest.raises((IndexError, TypeError, ValueError), match=rf"^{start}: .*expected"):
        prefix_concat(**{**right_arguments(), **changes})


@pytest.mark.parametrize("forced", [None, "reference"])
def test_numbers_that_do_not_exist_are_told_with_those_that_do(
    forced: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "forced", forced)
    for changes, message in (
        ({**IDS, "input_ids": integers(2, 4) + 7}, r"^input_ids: expected numbers from 0 to 6 \(embedding \[7, 5\]\)$"),
        ({"prompt_index": integers(2) + 3}, r"^prompt_index: expected numbers from 0 to 2 \(3 prompts\)$"),
    ):
        with pytest.raises(IndexError, match=message):
            prefix_concat(**{**right_arguments(), **changes})


def test_one_token_and_one_prompt_are_enough() -> None:
    ids = {**IDS, "embedding": torch.ones(1, 5), "prompt_index": None}
    for prompts in (torch.ones(1, 2, 5), ONE):
        assert prefix_concat(**{**right_arguments(), **ids, "prompts": prompts}).embeds.shape == (2, 6, 5)


def test_an_embedding_that_trains_is_no_fault_where_nothing_does() -> None:
    with torch.no_grad():
        prefix_concat(**{**right_arguments(), **IDS, "embedding": torch.ones(7, 5, requires_grad=True)})


def call_the_native_operators_wrongly() -> None:
    wrong: dict[str, tuple[str, dict[str, Any]]] = {
        "prompts: 3-D": ("prompts", {"prompts": torch.ones(1, 6, 5)}),
        "prompts: another D": ("prompts", {"prompts": torch.ones(6, 4)}),
        "prompts: integers": ("prompts", {"prompts": integers(6, 5)}),
        "prompts: too few rows": ("prompts", {"prompts": torch.ones(5, 5)}),
        "starts: falling": ("starts", {"starts": torch.tensor([0, 5, 2, 6])}),
        "starts: negative": ("starts", {"starts": torch.tensor([-3, 2, 5, 6])}),
        "starts: beyond the prompts": ("starts", {"starts": torch.tensor([0, 2, 5, 2**40])}),
        "starts: dtype": ("starts", {"starts": torch.tensor([0, 2, 5, 6], dtype=torch.int32)}),
        "starts: empty": ("starts", {"starts": integers(0)}),
        "starts: no prompt": ("starts", {"starts": integers(1)}),
        "max_prompt: too small": ("max_prompt", {"max_prompt": 1}),
        "max_prompt: negative": ("max_prompt", {"max_prompt": -4}),
        "prompt_index: another B": ("prompt_index", {"prompt_index": integers(3)}),
        "prompt_index: dtype": ("prompt_index", {"prompt_index": integers(2).int()}),
        "embeds: None": ("embeds", {"embeds": None}),
        "embeds: another T": ("embeds", {"embeds": torch.ones(2, 5, 5)}),
        "embeds: 2-D": ("embeds", {"embeds": torch.ones(2, 4)}),
        "attention_mask: 1-D": ("attention_mask", {"attention_mask": integers(4)}),
        "position_ids: another T": ("position_ids", {"position_ids": integers(2, 3)}),
        "position_ids: dtype": ("position_ids", {"position_ids": integers(2, 4).int()}),
        "labels: another T": ("labels", {"labels": integers(2, 3)}),
        "labels: dtype": ("labels", {"labels": integers(2, 4).int()}),
    }
    print_accepted("prefix_concat_cpu", raw_arguments(), wrong)
    print_accepted(
        "prefix_concat_cpu",
        with_ids(raw_arguments()),
        {
            "input_ids: another T": ("input_ids", {"input_ids": integers(2, 5)}),
            "input_ids: dtype": ("input_ids", {"input_ids": integers(2, 4).int()}),
            "embedding: 1-D": ("embedding", {"embedding": torch.ones(5)}),
            "embedding: another D": ("embedding", {"embedding": torch.ones(7, 4)}),
            "embedding: empty": ("embedding", {"embedding": torch.ones(0, 5)}),
        },
    )
    source = torch.ops.fastlora.prefix_concat_cpu(*raw_arguments().values())[4]
    right = {
        "dout": torch.ones(2, 7, 5),
        "source": source,
        "prompt_rows": 6,
        "tokens": 4,
        "need": True,
        "need_embeds": True,
    }
    print_accepted(
        "prefix_concat_backward_cpu",
        right,
        {
            "dout: 2-D": ("dout", {"dout": torch.ones(2, 7)}),
            "dout: integers": ("dout", {"dout": integers(2, 7, 5)}),
            "source: another W": ("source", {"source": source[:, :6]}),
            "source: dtype": ("source", {"source": source.int()}),
            "source: beyond the tokens": ("source", {"source": source + 100}),
            "source: far out of range": ("source", {"source": source + 2**40}),
            "prompt_rows: negative": ("prompt_rows", {"prompt_rows": -1}),
            "tokens: negative": ("tokens", {"tokens": -1}),
        },
    )


@pytest.mark.skipif("cpu" not in implementations("prefix_concat", "cpu"), reason="the native extension is not built")
def test_wrong_arguments_to_the_native_operators() -> None:
    """They raise, naming the argument, also when no one checks before them; none ends the process."""
    assert run_apart("test_prefix_concat_arguments", call_the_native_operators_wrongly) == ""
