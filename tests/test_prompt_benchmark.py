"""`python -m benchmarks prompts`: the table of settings and methods, on its small models. No time is asserted."""

import pytest
import torch

from benchmarks import prompts, small_llama
from benchmarks.session import Session


@pytest.mark.parametrize("method", prompts.METHODS)
def test_every_setting_is_right_and_pefts_are_told(method: str) -> None:
    session = Session(torch.device("cpu"))
    (row,) = prompts._settings(session, method)
    assert row.ours == row.goal == len(prompts.SETTINGS) and row.is_met()
    assert row.peft is not None and len(session.notes) == row.goal - row.peft > 0
    assert all(note.startswith(f"{method}, peft, ") for note in session.notes)


def test_the_lines() -> None:
    in_a_dtype = len(prompts.TIMES_FASTER) + 2
    assert len(prompts.prompt_lines()) == len(prompts.METHODS) + len(small_llama.TOLERANCE) * in_a_dtype
