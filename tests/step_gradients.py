"""python step_gradients.py OPTIONS.json FOUND.pt: the loss and gradients of a training's first step under each of some options, of all processes."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from fastlora import train
from fastlora.bounds import Errors, compare, largest_value, over_inputs
from fastlora.config import TrainConfig
from fastlora.data.examples import read_examples
from fastlora.data.rows import encode
from fastlora.models import load_tokenizer


def first_step(**options: Any) -> dict[str, Tensor]:
    """The mean loss a labelled token, "loss", and its gradients by the parameters' names, the same on all processes. No adapter is at zero."""
    config = TrainConfig(**options)
    accelerator = Accelerator(mixed_precision="no")
    tokenizer = load_tokenizer(str(config.model))
    data = encode(read_examples(Path(config.data)), tokenizer, config.max_length, config.truncation)
    run = train._Run(config, data, tokenizer, accelerator, None)
    draw(run.trained)
    loss = accelerator.reduce(run._backward(run.course.step_rows(0)), "sum")
    return {"loss": loss, **{name: p.grad.clone() for name, p in run.trained.items() if p.grad is not None}}


@torch.no_grad()
def draw(trained: dict[str, torch.nn.Parameter]) -> None:
    """An adapter's weights, the same for whoever asks; where B is zero, no gradient reaches A."""
    drawn = torch.Generator().manual_seed(1)
    for parameter in trained.values():
        parameter.copy_(torch.randn(parameter.shape, generator=drawn) * 0.1)


def assert_a_step_within_bound(found: Any, eager: Any, exact: Any) -> None:
    """A step's loss, "loss", and its gradients by name: each in units of its largest value, and all gradients as one result."""
    assert_steps_within_bound([found], [eager], [exact])


def assert_steps_within_bound(found: Sequence[Any], eager: Sequence[Any], exact: Sequence[Any]) -> None:
    """The same of several inputs' steps: a loss is one number, which eager may have exactly by luck."""
    losses, gradients = [], []
    for one, theirs, right in zip(found, eager, exact, strict=True):
        assert one.keys() == theirs.keys() == right.keys() and len(right) > 1
        for name in right:
            size = largest_value(right[name])
            errors = Errors(*(value / size for value in compare(one[name], theirs[name], right[name])))
            (losses if name == "loss" else gradients).append(errors)
    assert over_inputs(losses).within, losses
    assert over_inputs(gradients).within, gradients


if __name__ == "__main__":
    found = [first_step(**options) for options in json.loads(Path(sys.argv[1]).read_text())]
    if Accelerator().is_main_process:
        torch.save(found, sys.argv[2])
