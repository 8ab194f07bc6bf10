"""A batch with an adapter a row in a compiled model: names, and gradients, are the call's, whatever was traced with others."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from mixed_rows import BASE, all_at_once, lora_and_dora, row_by_row
from test_mixed_ia3 import ia3_model

import fastlora
from fastlora.peft import mixed

BATCHES = [
    ["default", BASE, "dora"],
    ["dora", "default", "default"],
    ["default", BASE, "dora"],
    ["small", "dora", BASE],
]


@pytest.fixture(autouse=True)
def afresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(model: Any, whole: bool) -> Any:
    if whole:
        return torch.compile(model, backend="aot_eager")
    for layer in model.base_model.model.model.layers:
        layer.compile(backend="aot_eager")
    return model


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "blocks"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_rows_are_those_of_the_call(whole: bool, training: bool) -> None:
    model = lora_and_dora().train(training)
    peer = copy.deepcopy(model)
    runs = compiled(fastlora.accelerate(model), whole)
    for names in BATCHES:
        expected = row_by_row(peer, names)
        found = all_at_once(runs, names)
        for name, value in expected.items():
            ours = found[name if name in found else f"_orig_mod.{name}"]
            torch.testing.assert_close(ours, value, rtol=1e-4, atol=1e-5)
    model.set_adapter("default")
    peer.set_adapter("default")
    with torch.no_grad():
        ids = torch.arange(5, 16)[None]
        torch.testing.assert_close(runs(input_ids=ids).logits, peer(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    assert mixed.under_way == 0


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "blocks"])
def test_of_factors(whole: bool) -> None:
    model = ia3_model().train()
    peer = copy.deepcopy(model)
    runs = compiled(fastlora.accelerate(model), whole)
    for names in (["other", BASE, "default"], ["default", "other", "other"]):
        expected = row_by_row(peer, names)
        found = all_at_once(runs, names)
        for name, value in expected.items():
            ours = found[name if name in found else f"_orig_mod.{name}"]
            torch.testing.assert_close(ours, value, rtol=1e-4, atol=1e-5)
