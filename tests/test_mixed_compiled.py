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

BATCHES = {
    lora_and_dora: [["default", BASE, "dora"], ["small", "dora", "default"], ["default", BASE, "dora"]],
    ia3_model: [["other", BASE, "default"], ["default", "other", "other"]],
}


@pytest.fixture(autouse=True)
def afresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def of_one_block(model: Any) -> Any:
    del model.base_model.model.model.layers[1]
    return model


@pytest.mark.parametrize("make", BATCHES)
def test_a_whole_model(make: Any) -> None:
    model = of_one_block(make()).eval()
    peer = copy.deepcopy(model)
    compiled = torch.compile(fastlora.accelerate(model), backend="aot_eager")
    ids = torch.arange(5, 38).view(3, 11)
    with torch.no_grad():
        for names in BATCHES[make]:
            expected = row_by_row(peer, names, ids)["logits"]
            torch.testing.assert_close(
                compiled(input_ids=ids, adapter_names=names).logits, expected, rtol=1e-4, atol=1e-5
            )
        model.set_adapter("default"), peer.set_adapter("default")
        torch.testing.assert_close(compiled(input_ids=ids).logits, peer(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    assert mixed.under_way == 0


def test_a_block_in_training() -> None:
    model = of_one_block(lora_and_dora()).train()
    peer = copy.deepcopy(model)
    fastlora.accelerate(model).base_model.model.model.layers[0].compile(backend="aot_eager")
    for names in BATCHES[lora_and_dora][:2]:
        expected = row_by_row(peer, names)
        found = all_at_once(model, names)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
