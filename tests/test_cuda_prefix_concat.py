"""csrc/cuda/prefix_concat.cu on an emulated card (emulated.py): the operator's own tests, and what is special to a card.

Every test runs with the threads of a block, and the blocks, in ascending and in descending order: a missing barrier makes the two differ.
`make sanitize` runs them under AddressSanitizer and UndefinedBehaviorSanitizer: a read or write outside a tensor or outside shared memory ends them.
"""

import ctypes
from collections.abc import Iterator
from typing import Any

import emulated
import pytest
import torch
from bounds import gapped, print_accepted
from test_prefix_concat import (  # noqa: F401  (run here, too, with RUNS)
    raw_arguments,
    test_by_hand,
    test_dtypes,
    test_each_row_is_that_row_alone,
    test_gradients_where_only_some_are_wanted,
    test_ids_equal_embeddings,
    test_layouts,
    test_masks_keep_their_dtype,
    test_no_width,
    test_numbers_that_do_not_exist,
    test_one_tensor_of_prompts,
    test_only_what_is_needed,
    test_prompt_lengths,
    test_two_runs_are_equal,
    test_wide_rows,
    test_without_gradients,
    with_ids,
)

from fastlora import ops, reference

RUNS = [("cpu", "cuda")]

pytestmark = pytest.mark.skipif(not emulated.available(), reason="needs a C++20 compiler")


@pytest.fixture(scope="module")
def card() -> ctypes.CDLL:
    return emulated.load()


@pytest.fixture(autouse=True, params=["ascending", "descending"])
def order(request: pytest.FixtureRequest, card: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The operators of the emulated card are entered as those of CUDA C++."""
    monkeypatch.setenv(ops.EMULATORS["cuda"], "1")
    monkeypatch.setattr(ops, "implementations", {**ops.implementations, **emulated.operators()})
    card.emulated_descending(request.param == "descending")
    yield
    card.emulated_descending(0)


def wide_batch(
    dtype: torch.dtype, D: int, B: int = 3, T: int = 300, P: tuple[int, ...] = (33, 0, 64)
) -> dict[str, Any]:
    """Rows longer than what a block looks at in one step; B rows padded on the left, on the right, on both sides and not at all, by turns."""
    mask = torch.rand(B, T) < 0.9
    mask[0::4, : T // 3] = False
    mask[1::4, T // 2 :] = False
    mask[3::4] = True
    return {
        "prompts": torch.randn(sum(P), D),
        "starts": torch.tensor([0, *P]).cumsum(0),
        "max_prompt": max(P),
        "prompt_index": torch.randint(0, len(P), (B,)),
        "embeds": torch.randn(B, T, D).to(dtype),
        "input_ids": None,
        "embedding": None,
        "attention_mask": mask,
        "position_ids": torch.randint(0, T, (B, T)),
        "labels": torch.randint(0, 99, (B, T)),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("D", [264, 250])  # in packs of 16 bytes, and not
def test_long_rows_are_the_references(dtype: torch.dtype, D: int) -> None:
    """To the bit: copies, prompts rounded once, and sums in float32 in the batch's order."""
    arguments = wide_batch(dtype, D)
    for case in (
        arguments,
        {**arguments, "prompts": arguments["prompts"].to(dtype)},
        {**arguments, "labels": None, "position_ids": None},
    ):
        expected = reference.prefix_concat(*case.values())
        got = torch.ops.fastlora.prefix_concat_cuda(*case.values())
        for one, other in zip(got, expected, strict=True):
            assert one.dtype == other.dtype and torch.equal(one, other)
    dout = torch.randn(expected[0].shape).to(dtype)
    for given in (dout, gapped(dout)):
        backward = (given, expected[4], len(arguments["prompts"]), 300, True, True)
        for one, other in zip(
            torch.ops.fastlora.prefix_concat_backward_cuda(*backward),
            reference.prefix_concat_backward(*backward),
            strict=True,
        ):
            assert one.dtype == other.dtype and torch.equal(one, other)


def test_many_rows() -> None:
    """More rows of the batch than a block's threads; enough columns that a block takes 32 of them."""
    arguments = wide_batch(torch.float32, 3, B=301, T=50, P=(2, 5))
    expected = reference.prefix_concat(*arguments.values())
    for one, other in zip(torch.ops.fastlora.prefix_concat_cuda(*arguments.values()), expected, strict=True):
        assert torch.equal(one, other)
    backward = (torch.randn(301, 55, 3), expected[4], 7, 50, True, True)
    for one, other in zip(
        torch.ops.fastlora.prefix_concat_backward_cuda(*backward),
        reference.prefix_concat_backward(*backward),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_numbers_out_of_range_are_never_addresses() -> None:
    """Starts and sources that no forward writes: NaN, or nothing. (make sanitize sees where they would have read.)"""
    right = raw_arguments()
    for starts in ([0, 2, 5, 90], [-7, 2, 5, 6], [6, 5, 2, 0], [2**62, -(2**62), 2**62, 0]):
        out, mask, *_ = torch.ops.fastlora.prefix_concat_cuda(*{**right, "starts": torch.tensor(starts)}.values())
        assert out.shape == (2, 7, 5) and not (out.isnan().any(-1) & (mask == 0)).any()
    dout = torch.randn(2, 7, 5)
    first_beyond = 6 + 2 * 4  # prompt rows and tokens
    for source in (2**62, -(2**62), -1, first_beyond - 1, first_beyond):
        given = torch.full((2, 7), source)
        dprompts, dembeds = torch.ops.fastlora.prefix_concat_backward_cuda(dout, given, 6, 4, True, True)
        assert dprompts.shape == (6, 5) and not dprompts.any()
        assert bool(dembeds.any()) == (source == first_beyond - 1) and not dembeds[:, :-1].any()


WRONG: dict[str, tuple[str, dict[str, Any]]] = {
    "attention_mask: 1-D": ("attention_mask", {"attention_mask": torch.ones(4)}),
    "attention_mask: complex": ("attention_mask", {"attention_mask": torch.ones(2, 4, dtype=torch.complex64)}),
    "max_prompt: negative": ("max_prompt", {"max_prompt": -1}),
    "prompts: integers": ("prompts", {"prompts": torch.ones(6, 5, dtype=torch.int64)}),
    "prompts: another D": ("prompts", {"prompts": torch.ones(6, 4)}),
    "starts: int32": ("starts", {"starts": torch.tensor([0, 2, 5, 6], dtype=torch.int32)}),
    "starts: one": ("starts", {"starts": torch.tensor([0])}),
    "prompt_index: another B": ("prompt_index", {"prompt_index": torch.zeros(3, dtype=torch.int64)}),
    "embeds: float64": ("embeds", {"embeds": torch.ones(2, 4, 5).double()}),
    "embeds: another T": ("embeds", {"embeds": torch.ones(2, 3, 5)}),
    "embeds: none": ("embeds", {"embeds": None}),
    "input_ids: floats": ("input_ids", {**with_ids(raw_arguments()), "input_ids": torch.ones(2, 4)}),
    "embedding: empty": ("embedding", {**with_ids(raw_arguments()), "embedding": torch.ones(0, 5)}),
    "position_ids: another T": ("position_ids", {"position_ids": torch.zeros(2, 3, dtype=torch.int64)}),
    "labels: int32": ("labels", {"labels": torch.zeros(2, 4, dtype=torch.int32)}),
}
WRONG_BACKWARD: dict[str, tuple[str, dict[str, Any]]] = {
    "dout: float64": ("dout", {"dout": torch.ones(2, 7, 5).double()}),
    "dout: 2-D": ("dout", {"dout": torch.ones(2, 7)}),
    "source: another W": ("source", {"source": torch.zeros(2, 6, dtype=torch.int64)}),
    "source: int32": ("source", {"source": torch.zeros(2, 7, dtype=torch.int32)}),
    "prompt_rows: negative": ("prompt_rows", {"prompt_rows": -1}),
    "tokens: negative": ("tokens", {"tokens": -1}),
}


def test_wrong_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    """Each is refused by the operator itself, with a message that names it."""
    print_accepted("prefix_concat_cuda", raw_arguments(), WRONG)
    right = {"dout": torch.ones(2, 7, 5), "source": torch.zeros(2, 7, dtype=torch.int64), "prompt_rows": 6, "tokens": 4}
    print_accepted("prefix_concat_backward_cuda", {**right, "need_prompts": True, "need_embeds": True}, WRONG_BACKWARD)
    assert capsys.readouterr().out == ""
