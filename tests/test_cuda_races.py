"""No call of the CUDA C++ kernels has a race, and each barrier, fence, wait and release in them is needed: races.py says how that is found."""

import ctypes

import emulated
import pytest
import races
import torch
from races import Calls, Card, Mutant

pytestmark = pytest.mark.skipif(not emulated.can_order(), reason="needs g++, and its -fsanitize=thread")


@pytest.fixture(scope="module")
def card() -> Card:
    return Card()


@pytest.fixture(scope="module")
def calls(card: Card) -> Calls:
    return Calls(card)


def test_no_order_of_threads_has_a_race(calls: Calls) -> None:
    for call in calls.card.calls:
        assert calls.card.run(call, descending=True) == ("", calls.written[call]), call


def test_every_place_is_reached(calls: Calls) -> None:
    assert calls.reaching.keys() == {str(site) for site in races.sites()}


@pytest.mark.parametrize("mutant", races.mutants(), ids=str)
def test_each_place_is_needed(calls: Calls, mutant: Mutant) -> None:
    assert bool(calls.find(mutant)) == (races.explained(mutant) is None)


def test_explanations_are_of_places_that_there_are() -> None:
    assert {f"{site.file}: {site.text}" for site in races.sites()} >= races.EXPLAINED.keys()


@pytest.mark.parametrize(
    ("kernel", "blocks", "said"),
    [
        ("sum", 2, None),
        ("leave_early", 1, None),
        ("wait", 3, None),
        ("early", 1, None),
        (
            "race",
            1,
            "race in shared memory at 4: thread 0 of block 0 read, thread 1 of block 0 wrote, neither before the other",
        ),
        ("tell", 2, "thread 0 of block 0 wrote, thread 0 of block 1 read, neither before the other"),
        ("too_early", 1, "a launch before wrote, thread 0 of block 0 read, neither before the other"),
    ],
)
def test_the_card_knows_a_race(kernel: str, blocks: int, said: str | None) -> None:
    order = emulated.ROOT / "tests/emulated_order.cpp"
    library = ctypes.CDLL(
        str(emulated.build([emulated.ROOT / "tests/emulated_check.cu", order], emulated.ORDER, [order]))
    )
    library.check.restype = ctypes.c_char_p
    memory = torch.zeros(4000, dtype=torch.int32)
    found = library.check(kernel.encode(), ctypes.c_void_p(memory.data_ptr()), blocks, 64)
    assert (found is None) if said is None else (said in races.without_code(found.decode())), found
