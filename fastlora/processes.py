"""A training on several processes: what may start them, what goes around the model, and that none waits for one that has ended.

Each process has the whole model, and gets the mean of all gradients (DistributedDataParallel). With fsdp each keeps its share of the frozen base
(FSDP2, `fully_shard`), whose blocks are whole only while they run, and all of what is trained, whose gradients are exchanged once a step.

What happens on one process alone, as writing files does, happens inside `as_one`: an error there ends all of them, each with a message.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from fastlora import tracking, writing
from fastlora.config import TrainConfig
from fastlora.course import TrainingError
from fastlora.models import blocks, resolve_dtype

INSTEAD = "expected DDP (torchrun, or accelerate launch without it), or fsdp=True, which shards the base over the processes as ZeRO-3 does"
FOREIGN = {
    "ACCELERATE_USE_DEEPSPEED": f"DeepSpeed keeps weights in pieces that only a layer of its own puts together: {INSTEAD}",
    "ACCELERATE_USE_MEGATRON_LM": f"Megatron-LM trains models of its own: {INSTEAD}",
    "FSDP_OFFLOAD_PARAMS": "a share stays on its device: expected false; more processes, or gradient_checkpointing=True, take less memory",
}
"""What `accelerate launch` may have been told and this loop cannot do, by its variable; why, and what it can."""
PRECISIONS = {"bf16": "bfloat16", "fp16": "float16"}
"""What the launcher's mixed precision is as a dtype of ours."""


def begin(config: TrainConfig) -> tuple[Accelerator, TrainConfig]:
    """This process among the others, and the options: fsdp is True where the launcher says FSDP2.

    Raises:
        ValueError: the launcher, or fsdp, asks for what cannot be done; the message says what can. As `tracking.names`.
        ImportError: as `tracking.names`.
    """
    for name, why in FOREIGN.items():
        if _is_set(name):
            raise ValueError(f"{name}=true: {why}")
    if _is_set("FSDP_ACTIVATION_CHECKPOINTING") and not config.gradient_checkpointing:
        raise ValueError("FSDP_ACTIVATION_CHECKPOINTING=true: expected gradient_checkpointing=True, which does it here")
    if _is_set("ACCELERATE_USE_FSDP"):
        if os.environ.get("FSDP_VERSION") != "2":
            raise ValueError("FSDP_VERSION: the launcher says FSDP of the first version: expected fsdp_version 2")
        config = replace(config, fsdp=True)
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if several and not torch.accelerator.is_available():
        # accelerate joins processes on CPUs, by gloo, where this says so and nowhere else.
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    accelerator = tracking.accelerator(config)
    if several and accelerator.num_processes == 1:
        raise ValueError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}: accelerate has not joined these processes, and each would train alone:"
            " expected a card for each, or ACCELERATE_USE_CPU=true for CPUs, set before the first training"
        )
    if config.fsdp and accelerator.num_processes == 1:
        raise ValueError("fsdp=True: expected several processes (torchrun or accelerate launch), got one")
    _require_precision(config, accelerator.device)
    return accelerator, config


def _is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() == "true"


def _require_precision(config: TrainConfig, device: torch.device) -> None:
    """Raise ValueError where the launcher says a mixed precision that is not what this run computes in."""
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    meant = PRECISIONS.get(asked)
    if asked != "no" and (meant is None or resolve_dtype(meant, device) != resolve_dtype(config.dtype, device)):
        wanted = f"dtype={meant}, or " if meant else ""
        raise ValueError(
            f"ACCELERATE_MIXED_PRECISION={asked}: this run computes in what dtype={config.dtype} says:"
            f" expected {wanted}mixed precision no of the launcher"
        )


def around(accelerator: Accelerator, model: nn.Module, trained: Iterable[Tensor], fsdp: bool) -> Any:
    """The model as a step calls it: in DistributedDataParallel, where there are several processes; with fsdp the same, its base sharded.

    trained: what each process has whole. Nothing else may require a gradient then.

    Raises:
        ValueError: fsdp, and transformers does not say what the model's blocks are.
    """
    if not fsdp:
        return accelerator.prepare_model(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    stack = blocks(model)
    if not stack:
        raise ValueError(f"fsdp: transformers does not say what the layers of {type(model).__name__} are")
    options: Any = {
        "mesh": init_device_mesh(accelerator.device.type, (accelerator.num_processes,)),
        "ignored_params": set(trained),
    }
    for block in stack:
        fully_shard(block, **options)
    return fully_shard(model, **options)  # embedding, head and what else there is


def reshard(model: nn.Module) -> None:
    """Let go of what a forward without a backward has left whole of a sharded base: one process may do alone what shards it, as saving does."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def share_gradients(trained: Iterable[Tensor]) -> None:
    """Give every process the mean of all gradients; a weight that no gradient has reached on any has none afterwards."""
    weights = list(trained)
    reached = torch.tensor([float(p.grad is not None) for p in weights], device=weights[0].device)
    flat = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten().float() for p in weights]
    shared = torch.cat([reached, *flat])
    torch.distributed.all_reduce(shared)
    counts, *sums = shared.split([len(weights), *(p.numel() for p in weights)])
    for p, count, total in zip(weights, counts.tolist(), sums, strict=True):
        if count:
            p.grad = (total / torch.distributed.get_world_size()).view_as(p).to(p.dtype)


@contextmanager
def as_one(accelerator: Accelerator) -> Iterator[None]:
    """What is done here, all do together, or none goes on: every process comes by, whatever it does inside.

    Raises:
        TrainingError: on a process where all went well, that it did not on another, and the words of that one's error.
    """
    caught: Exception | None = None
    try:
        yield
    except Exception as error:
        caught = error
    if accelerator.num_processes > 1:
        failed = torch.tensor(float(caught is not None), device=accelerator.device)
        if accelerator.reduce(failed, "sum").item():
            told = gather_object([None if caught is None else str(caught) or type(caught).__name__])
            number = next(i for i, text in enumerate(told) if text is not None)
            caught = caught or TrainingError(f"process {number} has ended this training: {told[number]}")
    if caught is not None:
        raise caught


@contextmanager
def holding(accelerator: Accelerator, output: Path, check: Callable[[], None]) -> Iterator[None]:
    """The output folder, locked by one process for all, and checked by it.

    Raises:
        TrainingError: another process ended meanwhile, and has said why.
        OSError, ValueError: of the lock, and of the check; a TrainingError on the other processes.
    """
    with ExitStack() as held:
        with as_one(accelerator):
            if accelerator.is_main_process:
                held.enter_context(writing.locked(output))
                check()
        try:
            yield
        except RuntimeError as error:
            if accelerator.num_processes == 1 or not _is_of_peers(error):
                raise
            raise TrainingError("another process of this training has ended, and has said why") from error


def _is_of_peers(error: RuntimeError) -> bool:
    """Whether it says that the others cannot be reached."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower()
