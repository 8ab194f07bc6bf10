"""FASTLORA_IMPL: each implementation, forced for a whole PEFT model in a process of its own, gives PEFT's results within the bound."""

import copy
import os
from pathlib import Path

import pytest
import torch
from bounds import run_apart
from conftest import implementations
from peft_models import IDS, assert_as_near_as, peft_model, run

import fastlora

MIXED = ["default", "__base__", "default"]  # the adapter of each row of IDS


def results(model, labels):
    """Logits, gradients, and the logits of a mixed batch, which is multi_lora."""
    found = run(model, labels)
    with torch.no_grad():
        found["mixed"] = model.eval()(input_ids=IDS, adapter_names=MIXED).logits
    return found


def compute_forced() -> None:
    model, labels = peft_model()
    found = results(fastlora.accelerate(model), labels)
    print(*{entry.implementation for entry in fastlora.report(model)})
    torch.save(found, os.environ["RESULTS"])


@pytest.mark.parametrize("name", implementations("lora_linear", "cpu"))
def test_a_forced_implementation_computes_the_whole_model(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTLORA_IMPL", name)
    monkeypatch.setenv("RESULTS", str(tmp_path / "results.pt"))
    assert run_apart("test_forced", compute_forced).split() == [name]
    model, labels = peft_model()
    exact = results(copy.deepcopy(model).double(), labels)
    assert_as_near_as(torch.load(tmp_path / "results.pt"), results(model, labels), exact)
