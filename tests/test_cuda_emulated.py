"""The CUDA C++ kernels on an emulated card (emulated.py): the tests of each operator, and what is special to a card.

Every test runs with the threads of a block, and the blocks, in ascending and in descending order: a missing barrier makes the two differ.
`make sanitize` runs them under AddressSanitizer and UndefinedBehaviorSanitizer: a read or write outside a tensor or outside shared memory ends them.
"""

import ctypes
import os
from collections.abc import Iterator

import emulated
import pytest
import torch
from bounds import gapped
from test_prefix_concat import (  # noqa: F401  (run here, too, with RUNS)
    MASKS,
    make_batch,
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
    return emulated.load(emulated.SANITIZERS if os.environ.get("FASTLORA_SANITIZE") == "1" else ())


@pytest.fixture(autouse=True, params=["ascending", "descending"])
def order(request: pytest.FixtureRequest, card: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The operators of the emulated card are entered as those of CUDA C++."""
    monkeypatch.setenv(ops.EMULATORS["cuda"], "1")
    monkeypatch.setattr(ops, "_table", {**ops._table, **emulated.operators()})
    card.emulated_descending(request.param == "descending")
    yield
    card.emulated_descending(0)
