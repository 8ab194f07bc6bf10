"""What a run would be, told before it is: `fastlora train --dry-run`. Of memory and disk an estimate, whose formulas stand here.

A step holds, at the end of its forward:

    weights       of the base, as they lie in memory, and of the adapter; on a CPU also the packed copies that 16-bit weights may get
    gradients     4 bytes for each trained number
    optimiser     AdamW's two moments: 8 bytes for each
    activations   what the backward reads of each token: of a sublayer, as attention or an MLP, the input of its first product, the outputs of all
                  but the last, and the last's input; of a norm its input. In fastlora's layers dropout keeps a bit for each input. PEFT's own keep
                  each layer's dropped input in float32, and its mask in bytes; transformers' MLP keeps the activation as well, its attention keys
                  and values repeated for each head. Attention that drops keeps its weights, an activation
                  that is written in PyTorch what lies between. The backward of one block takes as much again. Of logits there is a block at a time
    process       what Python and its packages take, as it is now; on a card, nothing

The tokens are those of the batch that has the most. With gradient checkpointing a block keeps its input, and one block at a time the rest.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastlora import checkpoint, memory, tracking, writing
from fastlora.config import RANKED, WHOLE, TrainConfig
from fastlora.course import Course
from fastlora.data.rows import count_tokens, marked
from fastlora.frozen import packed
from fastlora.models import blocks, empty_base
from fastlora.operators.linear_cross_entropy import LOGITS_AT_ONCE
from fastlora.packing import attention_drops
from fastlora.resuming import require_free
from fastlora.train import begin, require_possible
from fastlora.typed import lined_up

SHOWN_ROWS = 3
LINE = 300  # bytes of metrics.jsonl, about


@dataclass(frozen=True)
class Sample:
    """A row as the model will see it."""

    source: str  # FILE:LINE
    tokens: int
    counted: int  # of them, in the loss
    text: str  # decoded, with [[ ]] around what counts


@dataclass(frozen=True)
class Plan:
    """What a run would be; prints as a table."""

    told: dict[str, str]  # what the run says before its first step
    steps: int
    tokens_per_step: float
    labelled_per_step: float  # of them, in the loss
    memory: dict[str, int]  # bytes, by what they are for; an estimate
    disk: int  # bytes that the output folder takes at most; an estimate
    free: str  # on its disk
    samples: list[Sample]

    @property
    def peak(self) -> int:
        """Bytes of memory."""
        return sum(self.memory.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {_gigabytes(size)}" for name, size in self.memory.items() if size)
        lines = {
            **self.told,
            "tokens": f"{self.tokens_per_step:,.0f} a step, of which {self.labelled_per_step:,.0f} count in the loss",
            "memory": f"about {_gigabytes(self.peak)}, an estimate: {parts}",
            "disk": f"about {_gigabytes(self.disk)} ({self.free})",
        }
        rows = [
            f"\n{one.source}: {one.tokens} tokens, {one.counted} count, [[these]]:\n{one.text}" for one in self.samples
        ]
        return "\n".join([*lined_up(lines), *rows])


def plan(config: TrainConfig) -> Plan:
    """What `train` would do with these options. Writes nothing and reads no weights; `accelerate` measures a machine that nobody has measured.

    Raises:
        As `train` before its first step.
    """
    require_possible(config)
    tracking.names(config)
    require_free(config)
    accelerator = Accelerator(mixed_precision="no", device_placement=False)
    run = begin(config, accelerator, empty_base)
    told = run.told()
    if accelerator.device.type != "cpu":
        told["runs"] = "what the card's own measurements choose: `fastlora train` says it before its first step"
    config, course, model = run.config, run.course, run.model
    epoch = [course.step_rows(step) for step in range(min(course.steps, course.steps_per_epoch))]
    samples = [
        Sample(example.source, len(row.input_ids), row.labelled, marked(row, run.tokenizer))
        for example, row in zip(run.data.examples[:SHOWN_ROWS], run.data.rows, strict=False)
    ]
    return Plan(
        told=told,
        steps=course.steps - run.step,
        tokens_per_step=sum(map(count_tokens, epoch)) / len(epoch),
        labelled_per_step=sum(row.labelled for rows in epoch for row in rows) / len(epoch),
        memory=needed_memory(config, model, largest_batch(config, course)),
        disk=needed_disk(config, model, course.steps),
        free=writing.free(Path(config.output)),
        samples=samples,
    )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def largest_batch(config: TrainConfig, course: Course) -> int:
    """The tokens of the batch that has the most, in the first epoch: fastlora leaves padding out, transformers computes it."""
    most = 0
    for step in range(min(course.steps, course.steps_per_epoch)):
        for rows in course.batches(course.step_rows(step), 0):
            lengths = [len(row.input_ids) for row in rows]
            most = max(most, sum(lengths) if config.accelerate else max(lengths) * len(lengths))
    return most


def needed_memory(config: TrainConfig, model: Any, tokens: int) -> dict[str, int]:
    """Bytes of a step with so many tokens at once, by what they are for: the formulas above."""
    parameters = list(model.parameters())
    trained = sum(one.numel() for one in parameters if one.requires_grad)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if _casts(config, device) else model.dtype
    weights = sum(one.nbytes for one in parameters)
    frozen = [one for one in parameters if one.dim() == 2 and not one.requires_grad]
    if config.bits is not None:  # all but the embeddings, which may be one
        ends = {
            id(one.weight) for one in (model.get_input_embeddings(), model.get_output_embeddings()) if one is not None
        }
        weights -= sum(one.nbytes - one.numel() * config.bits // 8 for one in frozen if id(one) not in ends)
    if config.method in WHOLE and dtype != model.dtype:
        weights += sum(one.numel() for one in parameters) * dtype.itemsize  # autocast's copies
    copies = 0
    if device == "cpu" and config.accelerate and packed.packs(model.dtype) and config.bits is None:
        inner = sum(math.prod(_size(module)) for block in _blocks(model) for module in _products(block))
        copies = min(packed.Budget(config.pack_budget).limit, 2 * inner * model.dtype.itemsize)
    of_blocks = [_kept(block, config, dtype.itemsize) for block in _blocks(model)]
    if attention_drops(model):
        of_blocks = [one + _of_dropped_attention(config, model, tokens) for one in of_blocks]
    width = model.get_input_embeddings().weight.shape[1] * dtype.itemsize
    if config.gradient_checkpointing:
        kept = len(of_blocks) * width + 2 * max(of_blocks)
    else:
        kept = sum(of_blocks) + max(of_blocks)
    logits = 3 * 4 * LOGITS_AT_ONCE[device]
    process = 0 if device == "cuda" else _process()
    return {
        "weights": weights,
        "packed copies": copies,
        "gradients": 4 * trained,
        "optimiser": 8 * trained,
        "activations": int(tokens * (kept + 3 * width)) + logits,
        "process": process,
    }


def _casts(config: TrainConfig, device: str) -> bool:
    """Whether a whole model, which is float32, computes in bfloat16."""
    if config.method not in WHOLE:
        return False
    return config.dtype == "bfloat16" or (
        config.dtype == "auto" and device == "cuda" and torch.cuda.is_bf16_supported()
    )


def _process() -> int:
    """Bytes that this process holds; 0 where the system does not tell."""
    try:
        return memory.resident("VmRSS")
    except OSError:
        return 0


def _of_dropped_attention(config: TrainConfig, model: Any, tokens: int) -> float:
    """Bytes that a block keeps of a token's attention where that drops: of each head and token of the row the weights in float32 before dropout and
    after it, what they are made of, and a byte of the mask."""
    heads = model.config.get_text_config(decoder=True).num_attention_heads
    return heads * tokens / config.batch_size * 13


def _blocks(model: Any) -> list[Any]:
    """What the model is a stack of; itself where transformers does not say."""
    return blocks(model) or [model.get_base_model() if hasattr(model, "get_base_model") else model]


def _products(part: nn.Module) -> Iterator[nn.Module]:
    """The products with a matrix of the base's in a part, in the order in which they were made, which is that of the forward."""
    if _size(part) is not None:
        yield part
        return
    for child in part.children():
        yield from _products(child)


def _size(module: Any) -> Any:
    """(K, N) of a layer that multiplies [tokens, K] by a matrix of the base's; None of what is no such layer."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if isinstance(base, Conv1D):
        return base.nx, base.nf
    return (base.in_features, base.out_features) if isinstance(base, nn.Linear) else None


def _between(part: nn.Module) -> int:
    """How many tensors an activation that is written in PyTorch keeps of those between what it is given and what it gives, as GPT-2's does."""
    found = 0
    for child in part.children():
        if "activation" not in type(child).__name__.lower():
            continue
        given, kept = torch.zeros(8, requires_grad=True), list[Tensor]()
        with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda none: none):
            gives = child(given)
        found += len({one.data_ptr() for one in kept} - {given.data_ptr(), gives.data_ptr()})
    return found


def _kept(block: nn.Module, config: TrainConfig, itemsize: int) -> float:
    """Bytes that a block keeps of a token from its forward to its backward. itemsize: of an activation's element."""
    kept = 0.0
    for part in block.children():
        layers = list(_products(part))
        if not layers:
            kept += sum(one.numel() for one in part.parameters() if one.dim() == 1) * (
                itemsize if config.accelerate else 4
            )
            continue
        sizes = [_size(layer) for layer in layers]
        kept += (sizes[-1][0] + sum(out for _, out in sizes[:-1])) * itemsize
        if len(sizes) == 2:  # without a gate, which would be an operator of ours
            kept += _between(part) * sizes[0][1] * itemsize
        adapted = [one for one, layer in zip(sizes, layers, strict=True) if isinstance(layer, BaseTunerLayer)]
        if config.accelerate or not adapted:
            kept += sizes[0][0] * itemsize + sum(inputs for inputs, _ in adapted) / 8 * bool(config.lora_dropout)
        else:
            kept += sum(inputs for inputs, _ in adapted) * (5 if config.lora_dropout else 4)
        if not config.accelerate:
            last = sizes[-1][
                0
            ]  # what an MLP's activation gives is as wide, and so are the heads that keys and values are repeated for
            kept += (2 * (last - sizes[1][1]) if len(sizes) == 4 else last) * itemsize
    return kept


def needed_disk(config: TrainConfig, model: Any, steps: int) -> int:
    """Bytes in the output folder at most: what comes out, and the newest checkpoints while another is written."""
    parameters = list(model.parameters())
    trained = sum(one.numel() for one in parameters if one.requires_grad)
    saved = sum(one.nbytes for one in parameters) if config.method in WHOLE else 4 * trained
    twice = 4 * trained if config.method not in (*RANKED, *WHOLE) else 0  # trained.safetensors
    return saved + (checkpoint.KEPT + 1) * (saved + twice + 8 * trained) + steps * LINE
