"""The emulated card itself (emulated_cuda.h), by the kernels of emulated_check.cu: what a card does, and what none would survive.

Every test runs with the threads of a block, and the blocks, in ascending and in descending order.
"""

import ctypes
import re
from collections.abc import Callable
from typing import Any

import emulated
import pytest
import torch

pytestmark = pytest.mark.skipif(not emulated.available(), reason="needs a C++20 compiler")


@pytest.fixture(autouse=True, params=["ascending", "descending"])
def order(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def run(order: str) -> Callable[[str, torch.Tensor, int, int], str | None]:
    """Launch a kernel of emulated_check.cu by name, on the memory of a tensor; what the exception says, if there is one."""
    library = ctypes.CDLL(str(emulated.build([emulated.ROOT / "tests/emulated_check.cu"])))
    library.check.restype = ctypes.c_char_p
    library.emulated_descending(order == "descending")

    def launch(kernel: str, memory: torch.Tensor, blocks: int, threads: int) -> str | None:
        said = library.check(kernel.encode(), ctypes.c_void_p(memory.data_ptr()), blocks, threads)
        return said and said.decode()

    return launch


def test_shuffles_and_barriers(run: Any) -> None:
    memory = torch.arange(1003, dtype=torch.int32)
    assert run("sum", memory, 3, 256) is None
    assert memory[:3].tolist() == [sum(range(3, 1003))] * 3


def test_threads_that_leave_are_not_waited_for(run: Any) -> None:
    votes = torch.zeros(96, dtype=torch.int32)
    assert run("leave_early", votes, 1, 96) is None
    assert votes.tolist() == [0] * 40 + [-256] * 24 + [-1] * 32  # lanes 8 to 31 of the second warp are left


def test_blocks_that_wait_for_others(run: Any) -> None:
    flags = torch.zeros(33, dtype=torch.int32)
    assert run("wait", flags, 4, 32) is None
    assert flags.tolist() == [96] + [7] * 32


def test_a_missing_barrier_shows(run: Any, order: str) -> None:
    """Shared memory is all ones, -1, before it is written: only the last thread to run finds its neighbour's."""
    out = torch.zeros(64, dtype=torch.int32)
    assert run("race", out, 1, 64) is None
    assert out.tolist() == ([-1] * 63 + [1] if order == "ascending" else [1] * 63 + [-1])


@pytest.mark.parametrize(
    ("kernel", "threads", "message"),
    [
        ("diverge", 32, "lanes of one warp meet at different instructions"),
        ("hang", 32, "wait for one another forever"),
        ("wait_forever", 32, "wait for one another forever"),
        ("too_early", 32, "does not wait for the launch before"),
        ("trap", 32, r"trap \(block 0,0,0"),
        ("sum", 2048, "no card can launch this"),
        ("sum", 0, "no card can launch this"),
    ],
)
def test_what_a_card_would_not_survive_is_an_exception(run: Any, kernel: str, threads: int, message: str) -> None:
    said = run(kernel, torch.zeros(2000, dtype=torch.int32), 1, threads)
    assert said and re.search(message, said)
