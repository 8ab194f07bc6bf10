"""A batch of rows with adapters of their own against each row alone, unpadded, under plain PEFT: ranks × mixes, in evaluation and in training.

The mixes are what a service sees (every adapter as popular, one that has all rows, Zipf's law) and the corners: adapters without a row, rows
without an adapter, one row each, and one adapter whose layers are some of the others'.
"""

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft_models import peft_model
from torch import Tensor

import fastlora
from fastlora.peft.mixed import BASE

RANKS = {"equal": (8, 8, 8, 8, 8), "ragged": (1, 4, 17, 33, 64), "large": (129, 2, 64, 300, 16)}
MIXES: dict[str, list[int | None]] = {  # of each row its adapter's number; adapter 3 has two kinds of layers alone
    "uniform": [0, 1, 2, 3, 4] * 2,
    "uniform, with base rows": [0, None, 1, 2, None, 3, 4, None],
    "one hot": [2] * 9,
    "one hot, a base row": [1] * 6 + [None, 1],
    "Zipf": [0, 1, 0, 0, 2, 0, 1, 0, 3, 1, 0, 2, 4],
    "Zipf, with base rows": [4, None, 4, 1, 4, 4, None, 1, 4, 0],
    "two adapters, three without a row": [3, 0, 3, 0],
    "one row": [4],
    "base rows alone": [None] * 4,
}
T = 9


def adapted(ranks: tuple[int, ...]) -> tuple[Any, list[str]]:
    """A small Llama with an adapter of each rank, each with another scale; the last but one on two kinds of layers alone."""
    model, _ = peft_model(r=ranks[0], lora_alpha=ranks[0])
    names = ["default"]
    for number, rank in enumerate(ranks[1:], start=1):
        targets = ["q_proj", "down_proj"] if number == 3 else "all-linear"
        config = LoraConfig(
            r=rank, lora_alpha=rank * (0.5 + number / 4), target_modules=targets, init_lora_weights=False
        )
        model.add_adapter(f"a{number}", config)
        names.append(f"a{number}")
    model.set_requires_grad(names)
    return model, names


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    model.zero_grad()
    return found


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS)
def test_each_row_is_as_it_is_alone(ranks: tuple[int, ...], mix: list[int | None]) -> None:
    peer, names = adapted(ranks)
    model = fastlora.accelerate(copy.deepcopy(peer))
    given = [BASE if number is None else names[number] for number in mix]
    ids = torch.randint(5, 90, (len(mix), T))
    lengths = torch.randint(3, T + 1, (len(mix),)).tolist()
    mask = torch.tensor([[1] * length + [0] * (T - length) for length in lengths])
    weights = torch.randn(len(mix), T, 96) * mask[..., None]  # of the logits, in what is minimised
    expected: list[Tensor] = []
    for row, (name, length) in enumerate(zip(given, lengths, strict=True)):
        text = ids[row : row + 1, :length]
        if name == BASE:
            with peer.disable_adapter():
                expected.append(peer(input_ids=text).logits.detach())
        else:
            peer.set_adapter(name)
            peer.set_requires_grad(names)
            out = peer(input_ids=text).logits
            (out * weights[row, :length]).sum().backward()
            expected.append(out.detach())
    alone = gradients(peer)
    with torch.no_grad():
        found = model.eval()(input_ids=ids, attention_mask=mask, adapter_names=given).logits
    trained = model.train()(input_ids=ids, attention_mask=mask, adapter_names=given).logits
    for row, (logits, length) in enumerate(zip(expected, lengths, strict=True)):
        for one in (found, trained.detach()):
            torch.testing.assert_close(one[row : row + 1, :length], logits, rtol=1e-4, atol=1e-4)
    if trained.requires_grad:
        (trained * weights).sum().backward()
    together = gradients(model)
    assert together.keys() == alone.keys() and bool(together) == any(number is not None for number in mix)
    for name, gradient in alone.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(together[name], gradient, rtol=1e-4, atol=1e-5 * max(1.0, scale))
