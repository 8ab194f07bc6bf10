"""What a run would be, told before it is: `fastlora train --dry-run`. Of memory and disk an estimate, whose formulas stand here.

A step holds, at the end of its forward:

    weights       of the base, as they lie in memory, and of the adapter; on a CPU also the packed copies that 16-bit weights may get
    gradients     4 bytes for each trained number
    optimiser     what it keeps of each (optimisers.KINDS): AdamW two moments, 8 bytes; Adafactor a matrix's rows and columns; SGD nothing
    activations   what the backward reads of each token: of a sublayer, as attention or an MLP, the input of its first product, the outputs of all
                  but the last, and the last's input; of a norm its input. In fastlora's layers dropout keeps a bit for each input. PEFT's own keep
                  each layer's dropped input in float32, and its mask in bytes; transformers' MLP keeps the activation as well, its attention keys
                  and values repeated for each head. Attention that drops keeps its weights, an activation
                  that is written in PyTorch what lies between. The backward of one block takes as much again. Of logits there is a block at a time
    validation    by how much more a validation takes than gradients and activations, which are not there then: a block at a time of its largest
                  batch, and where prompts are answered the keys and values of all blocks
    process       what Python and its packages take, as it is now; on a card, nothing

The tokens are those of the batch that has the most, with its padding where that runs: not where fastlora's attention leaves it out. Through an
encoder-decoder's blocks go those of their side, but for the encoder's that a decoder attends to. Attention with a bias for each distance, as T5's,
keeps its weights, too. With gradient checkpointing a block keeps its input, and one block at a time the rest.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastlora import fusion, memory, packing, tracking, writing
from fastlora.bottleneck import ATTENTIONS
from fastlora.config import RANKED, WHOLE, TrainConfig
from fastlora.course import Course
from fastlora.data.examples import Example
from fastlora.data.lines import lay
from fastlora.data.rows import Encoded, Row, batches, count_tokens, marked
from fastlora.frozen import packed
from fastlora.models import DTYPES, blocks, empty_base
from fastlora.operators.linear_cross_entropy import LOGITS_AT_ONCE
from fastlora.optimisers import KINDS
from fastlora.resuming import require_free
from fastlora.train import begin, require_possible
from fastlora.typed import gigabytes, lined_up
from fastlora.validation import Validation

SHOWN_ROWS = 3
CROSS = tuple(name for _, *others in ATTENTIONS for name in others)
"""What attends to an encoder is called."""
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
        parts = ", ".join(f"{name} {gigabytes(size)}" for name, size in self.memory.items() if size)
        lines = {
            **self.told,
            "tokens": f"{self.tokens_per_step:,.0f} a step, of which {self.labelled_per_step:,.0f} count in the loss",
            "memory": f"about {gigabytes(self.peak)}, an estimate: {parts}",
            "disk": f"about {gigabytes(self.disk)} ({self.free})",
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
        for example, row in _shown(run.data)
    ]
    return Plan(
        told=told,
        steps=course.steps - run.step,
        tokens_per_step=sum(map(count_tokens, epoch)) / len(epoch),
        labelled_per_step=sum(row.labelled for rows in epoch for row in rows) / len(epoch),
        memory=_with_validation(needed_memory(config, model, *largest_batch(config, model, course)), run),
        disk=needed_disk(config, model, course.steps),
        free=writing.free(Path(config.output)),
        samples=samples,
    )


def _shown(data: Encoded) -> list[tuple[Example, Row]]:
    """The first rows, or of several tasks the first of each: all of them are asked in ways of their own."""
    pairs = list(zip(data.examples, data.rows, strict=True))
    firsts: dict[str, tuple[Example, Row]] = {}
    for example, row in pairs:
        firsts.setdefault(row.task, (example, row))
    return pairs[:SHOWN_ROWS] if len(firsts) == 1 else list(firsts.values())


def largest_batch(config: TrainConfig, model: Any, course: Course) -> list[int]:
    """The tokens that run at once of the batch that has the most, in the first epoch, a number for each side of its rows."""
    batches = chain.from_iterable(
        course.batches(course.step_rows(step), 0) for step in range(min(course.steps, course.steps_per_epoch))
    )
    return max((_run_at_once(config, model, rows) for rows in batches), key=sum)


def _run_at_once(config: TrainConfig, model: Any, rows: Sequence[Row]) -> list[int]:
    """The tokens that run of a training's batch, a number for each side of its rows."""
    sides = [[len(side) for side in of_rows] for of_rows in zip(*(row.sides for row in rows), strict=True)]
    if leaves_padding(config, model):
        return [sum(side) for side in sides]
    if config.packing:
        lines = lay(rows, min(config.max_length, config.max_tokens or config.max_length))
        sides = [[count_tokens(line) for line in lines]]
    return [_padded(side) for side in sides]


def _padded(lengths: Sequence[int]) -> int:
    return max(lengths) * len(lengths)


def leaves_padding(config: TrainConfig, model: Any) -> bool:
    """Whether the model's padded batches would run without their padding, as far as its parts tell: all of its attention is fastlora's, on a CPU."""
    return (
        config.accelerate
        and not model.config.is_encoder_decoder
        and not torch.cuda.is_available()
        and not packing.keeps_padding(model)
        and fusion.attends(model)
    )


def _with_validation(needed: dict[str, int], run: Any) -> dict[str, int]:
    """What is needed, with what a run's validation needs beyond it."""
    beyond = needed_validation(run.config, run.model, run.validation) - needed["gradients"] - needed["activations"]
    process = needed.pop("process")
    return {**needed, "validation": max(0, beyond), "process": process}


def needed_validation(config: TrainConfig, model: Any, validation: Validation) -> int:
    """Bytes that measuring takes besides weights, their copies and the optimiser's state: the formulas above. 0 where nothing is measured."""
    size, of_token = config.eval_batch_size, _of_token(config, model)
    most = 0
    for one in (validation.held_out, validation.retained):
        lengths = sorted(sum(map(len, row.sides)) for row in one.rows) if one else []
        for part in batches(lengths, size):
            most = max(most, sum(part) if leaves_padding(config, model) else _padded(part))
    needed = most * of_token + _of_logits() if most else 0
    for part in batches(sorted(map(len, validation.prompts)), size):
        answered = len(part) * (max(part) + config.eval_max_new_tokens) * _of_cached_token(model)
        needed = max(needed, int(_padded(part) * of_token + answered))
    return int(needed)


def _of_token(config: TrainConfig, model: Any) -> float:
    """Bytes of a token that runs without being kept for a backward: what a block holds of it, its input and its result."""
    itemsize = _computes_in(config, model).itemsize
    of_blocks = (sum(_kept(part, config, itemsize) for _, part in _parts(block)) for block in _blocks(model))
    return max(of_blocks) + 3 * _width(model) * itemsize


def _of_cached_token(model: Any) -> int:
    """Bytes of a token's keys and values in all blocks."""
    text = model.config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or _width(model) // text.num_attention_heads
    return 2 * heads * width * model.dtype.itemsize * len(_blocks(model))


def _of_logits() -> int:
    """Bytes of a block of logits, and what is made of it."""
    return 3 * 4 * LOGITS_AT_ONCE["cuda" if torch.cuda.is_available() else "cpu"]


def _width(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[1])


def _computes_in(config: TrainConfig, model: Any) -> torch.dtype:
    """The dtype of what is computed: of a whole model, which is float32, autocast's."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if config.method not in WHOLE or config.dtype == "float32":
        dtype: torch.dtype = model.dtype
        return dtype
    if config.dtype != "auto":
        return DTYPES[config.dtype]
    return torch.bfloat16 if device == "cuda" and torch.cuda.is_bf16_supported() else torch.float32


def kept_by_optimiser(config: TrainConfig, model: Any) -> int:
    """Bytes that the optimiser keeps of what is trained, in float32; a step's number and its like aside."""
    of_each = (KINDS[config.optim].keeps(one) for one in model.parameters() if one.requires_grad)
    return 4 * sum(math.prod(kept.shape) for each in of_each for kept in each.values() if kept.shape)


def needed_memory(config: TrainConfig, model: Any, tokens: int, written: int = 0) -> dict[str, int]:
    """Bytes of a step with so many tokens at once, by what they are for: the formulas above.

    Args:
        tokens: a causal model's, or an encoder's.
        written: its decoder's.
    """
    parameters = list(model.parameters())
    trained = sum(one.numel() for one in parameters if one.requires_grad)
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", _computes_in(config, model)
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
        copies = min(
            packed.Budget(config.pack_budget).limit, 2 * inner * packed.copy_bytes(torch.empty(1, dtype=model.dtype))
        )
    through = _through(model, tokens, written)
    of_blocks = [_of_block(block, config, model, dtype.itemsize, own, tokens) for block, own in through]
    width = _width(model) * dtype.itemsize
    if config.gradient_checkpointing:
        kept = sum(own for _, own in through) * width + 2 * max(of_blocks)
    else:
        kept = sum(of_blocks) + max(of_blocks)
    process = 0 if device == "cuda" else _process()
    return {
        "weights": weights,
        "packed copies": copies,
        "gradients": 4 * trained,
        "optimiser": kept_by_optimiser(config, model),
        "activations": int(kept + (tokens + written) * 3 * width) + _of_logits(),
        "process": process,
    }


def _process() -> int:
    """Bytes that this process holds; 0 where the system does not tell."""
    try:
        return memory.resident("VmRSS")
    except OSError:
        return 0


def _through(model: Any, tokens: int, written: int) -> list[tuple[nn.Module, int]]:
    """The model's blocks, each with how many tokens go through it."""
    stack, base = _blocks(model), model.get_base_model() if hasattr(model, "get_base_model") else model
    reading = set(base.get_encoder().modules()) if base.config.is_encoder_decoder else set(stack)
    return [(block, tokens if block in reading else written) for block in stack]


def _of_block(block: nn.Module, config: TrainConfig, model: Any, itemsize: int, own: int, tokens: int) -> float:
    """Bytes that a block keeps from its forward to its backward.

    Args:
        itemsize: of an activation's element.
        own: tokens that go through it.
        tokens: those that it attends to, where it attends to an encoder.
    """
    kept, weight = 0.0, _of_attention_weight(block, model)
    if weight:
        weight *= model.config.get_text_config(decoder=True).num_attention_heads
        kept += own * own / config.batch_size * weight
    for name, part in _parts(block):
        crosses = name in CROSS  # keys and values, half of what it keeps, are of the encoder's tokens
        kept += _kept(part, config, itemsize) * ((own + tokens) / 2 if crosses else own)
        kept += own * tokens / config.batch_size * weight * crosses
    return kept


def _of_attention_weight(block: nn.Module, model: Any) -> int:
    """Bytes that a block keeps of a weight of its attention, where that drops: of float32 before dropout and after it, what it is made of, and a byte
    of the mask; where it has a bias for each distance: itself."""
    biased = any(hasattr(module, "has_relative_attention_bias") for module in block.modules())
    if packing.attention_drops(model) or (biased and getattr(model.config, "dropout_rate", 0.0) > 0):
        return 13
    return 4 * biased


def _blocks(model: Any) -> list[Any]:
    """What the model is a stack of; itself where transformers does not say."""
    return blocks(model) or [model.get_base_model() if hasattr(model, "get_base_model") else model]


def _parts(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """A block's sublayers and norms, by name: what has products of its own, or none. T5's lie in parts of the block."""
    for name, child in block.named_children():
        whole = _size(child) is not None or any(_size(one) is not None for one in child.children())
        if whole or isinstance(child, BaseTunerLayer) or next(_products(child), None) is None:
            yield name, child
        else:
            yield from _parts(child)


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


def _kept(part: nn.Module, config: TrainConfig, itemsize: int) -> float:
    """Bytes that a sublayer or a norm keeps of a token from its forward to its backward. itemsize: of an activation's element."""
    layers = list(_products(part))
    if not layers:
        return sum(one.numel() for one in part.parameters() if one.dim() == 1) * (itemsize if config.accelerate else 4)
    sizes = [_size(layer) for layer in layers]
    kept: float = (sizes[-1][0] + sum(out for _, out in sizes[:-1])) * itemsize
    if len(sizes) in (2, 3) and (between := _between(part)):
        # Behind a gate, which is no operator of ours then, what the activation gives is kept, too.
        kept += (between + (config.accelerate and len(sizes) == 3)) * sizes[0][1] * itemsize
    adapted = [one for one, layer in zip(sizes, layers, strict=True) if isinstance(layer, BaseTunerLayer)]
    if config.accelerate or not adapted:
        kept += sizes[0][0] * itemsize + sum(inputs for inputs, _ in adapted) / 8 * bool(config.lora_dropout)
    else:
        kept += sum(inputs for inputs, _ in adapted) * (5 if config.lora_dropout else 4)
    if not config.accelerate:
        # What an MLP's activation gives is as wide, and so are the heads that keys and values are repeated for.
        last = sizes[-1][0]
        kept += (2 * (last - sizes[1][1]) if len(sizes) == 4 else last) * itemsize
    return kept


def needed_disk(config: TrainConfig, model: Any, steps: int) -> int:
    """Bytes in the output folder at most: what comes out, and the newest checkpoints while another is written."""
    parameters = list(model.parameters())
    trained = sum(one.numel() for one in parameters if one.requires_grad)
    saved = sum(one.nbytes for one in parameters) if config.method in WHOLE else 4 * trained
    twice = 4 * trained if config.method not in (*RANKED, *WHOLE) else 0  # trained.safetensors
    checkpoints = config.save_total_limit + config.load_best_model_at_end + 1
    return saved + checkpoints * (saved + twice + kept_by_optimiser(config, model)) + steps * LINE
