"""swap.py: a module of a derived class has another forward, and copies, pickles and names do not notice."""

import copy
import functools
import pickle
from typing import Any

import pytest
from torch import nn

from fastlora import swap


class Plain(nn.Linear):
    """A layer."""

    def forward(self, x: Any) -> Any:
        return "plain"


@functools.cache
def with_word(plain: Any) -> type:
    def forward(self: Any, x: Any) -> Any:
        return f"derived, {plain.forward(self, x)}"

    return swap.derive(plain, with_word, forward=forward)


@pytest.fixture(autouse=True)
def derived_anew() -> None:
    with_word.cache_clear()


def swapped() -> Any:
    module = Plain(2, 3)
    module.__class__ = with_word(Plain)
    return module


def test_the_methods_are_ours_and_the_words_the_classs_own() -> None:
    derived: Any = with_word(Plain)
    assert swapped()(None) == "derived, plain" and issubclass(derived, Plain)
    for word in ("__name__", "__qualname__", "__module__", "__doc__"):
        assert getattr(derived, word) == getattr(Plain, word)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_comes_back_derived(protocol: int) -> None:
    module = swapped()
    other = pickle.loads(pickle.dumps(module, protocol))
    assert type(other) is with_word(Plain)
    assert other.weight.equal(module.weight) and other.__dict__.keys() == module.__dict__.keys()


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy])
def test_a_copy_is_derived(make: Any) -> None:
    module = swapped()
    other = make(module)
    assert type(other) is with_word(Plain) and other is not module and other.weight.equal(module.weight)


def test_who_derives_further_keeps_the_class() -> None:
    class Further(with_word(Plain)):  # type: ignore[misc]
        pass

    module = swapped()
    module.__class__ = Further
    assert type(copy.copy(module)) is type(copy.deepcopy(module)) is Further
    assert not swap.is_derived(module)


def test_undo_gives_the_class_back_and_leaves_others_alone() -> None:
    module, other = swapped(), nn.Linear(2, 3)
    assert swap.is_derived(module) and not swap.is_derived(other)
    for one in (module, other):
        swap.undo(one)
    assert type(module) is Plain and type(other) is nn.Linear and not swap.is_derived(module)
