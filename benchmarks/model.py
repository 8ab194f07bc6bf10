"""Training steps of a model that fills the card: one process and one set of weights, as PEFT runs it and then accelerated.

A step is forward, loss, backward and AdamW's update of the adapters, on one random batch; nothing is downloaded. Variants follow one another,
since two of them do not fit beside one another: each is warmed up, then timed, and the median kept.
"""

import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch

import fastlora
from fastlora.choice.clock import Run, time_in_turn

from .cases import StepCase
from .device import captured, clock_of
from .step import loss_function, make_batch, make_model

PEFT, EAGER, COMPILED, GRAPH = "peft", "eager", "blocks compiled", "CUDA graph"
STEP_SECONDS = 0.5  # of timing, a round: time_in_turn makes at least five rounds


def measure_model(case: StepCase, device: torch.device, notes: list[str]) -> Iterator[tuple[str, float]]:
    """(variant, seconds a step): PEFT's own, accelerated, with each block through torch.compile, and as one CUDA graph.

    A variant that does not fit, compile or capture is left out with a note.
    """
    if device.type == "cuda":
        held = torch.cuda.get_device_properties(device).total_memory
        if held < 2 * case.weight_bytes():  # activations and their gradients take as much again
            notes.append(
                f"{case.name}: skipped: needs {2 * case.weight_bytes() / 2**30:.0f} GiB, this card has {held / 2**30:.0f}"
            )
            return
    model = make_model(case, PEFT, device)
    batch = make_batch(case, 0, device)
    del batch["attention_mask"]  # all ones, which transformers would ask the card about in each step
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, fused=True, capturable=device.type == "cuda")
    clock = clock_of(device)
    for variant in (PEFT, EAGER, COMPILED, GRAPH):
        try:
            step = _prepare(variant, model, batch, optimizer)
            with _unpacked():
                step(0)
                run = captured(step, device) if variant == GRAPH else step
                seconds = time_in_turn({variant: run}, clock, STEP_SECONDS * case.rounds)[variant].seconds
            yield variant, seconds
        except torch.OutOfMemoryError as error:
            notes.append(f"{case.name}, {variant}: skipped: {str(error).splitlines()[0]}")
        except RuntimeError as error:
            notes.append(f"{case.name}, {variant}: fails: {str(error).splitlines()[0]}")
        optimizer.zero_grad(set_to_none=True)
        gc.collect()  # a cycle that holds a step's activations would leave no room for the next variant's
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _unpacked() -> AbstractContextManager[Any]:
    """transformers takes it for known that rows hold one text each.

    It asks the card in each step; in a capture, where it cannot, it makes a mask for packed rows, which keeps flash attention out.
    """
    from transformers import masking_utils

    return mock.patch.object(masking_utils, "find_packed_sequence_indices", lambda _: None)


def _prepare(variant: str, model: Any, batch: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> Run:
    if variant == EAGER:
        fastlora.accelerate(model, frozen=True)
    for layer in model.get_base_model().model.layers:
        layer._compiled_call_impl = None
        if variant == COMPILED:
            layer.compile(dynamic=False)
    loss_of = loss_function(model, "peft" if variant in (PEFT, GRAPH) else "fastlora")

    def step(_: int) -> None:
        loss_of(batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
