"""One training step of a small Llama: PEFT + transformers against the same accelerated, each in a fresh process.

The two processes take turns, so that both meet the same machine; each tells its own peak memory. Both start from the
same weights and see the same batches, so that without dropout their losses agree.
"""

import multiprocessing
import statistics
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch

from .cases import StepCase
from .clock import peak_of_process

VARIANTS = ("peft", "fastlora")
WARM_UP_STEPS = 1
LOSS_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


class StepError(RuntimeError):
    """A training process failed, or the two disagree about the loss."""


class Step(NamedTuple):
    seconds: float
    loss: float


@dataclass(frozen=True)
class StepResult:
    """peft and fastlora on the same steps."""

    seconds: dict[str, float]  # median of a step
    ratio: float  # fastlora over peft, median over the rounds
    losses: dict[str, list[float]]  # of every step, the first one before any update
    peak_bytes: dict[str, int | None]
    implementations: dict[str, int]  # layers by what computed them, fastlora's model
    rounds: int


def _model(case: StepCase, variant: str, device: torch.device) -> Any:
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=case.hidden,
        intermediate_size=case.intermediate,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.kv_heads,
        vocab_size=case.vocabulary,
        max_position_embeddings=2 * case.tokens,
        use_cache=False,
    )
    base: Any = LlamaForCausalLM(config)
    base.to(device, case.dtype)
    # B starts random: from PEFT's zeros the first loss could not tell a wrong adapter from a right one.
    lora = peft.LoraConfig(
        r=case.R,
        lora_alpha=case.R,
        lora_dropout=case.dropout_p,
        target_modules="all-linear",
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    model: Any = peft.get_peft_model(base, lora).train()
    if variant == "fastlora":
        from fastlora.peft import accelerate

        model = accelerate(model)
    return model


def _batch(case: StepCase, number: int, device: torch.device) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(case.vocabulary, (case.batch, case.tokens), generator=generator).to(device)
    labels = ids.clone()
    labels[:, : case.tokens // 2] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _implementations(model: Any) -> dict[str, int]:
    from fastlora.peft import report

    counts: dict[str, int] = {}
    for layer in report(model):
        counts[layer.implementation] = counts.get(layer.implementation, 0) + 1
    return counts


def _serve(pipe: Connection, case: StepCase, variant: str, device_name: str) -> None:
    """The life of a training process: a Step for every True that it is sent, at the first False its closing figures."""
    try:
        device = torch.device(device_name)
        model = _model(case, variant, device)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=1e-4)
        number = 0
        while pipe.recv():
            batch = _batch(case, number, device)
            number += 1
            start = time.perf_counter()
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            value = loss.item()  # waits for the forward only
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            pipe.send(Step(time.perf_counter() - start, value))
        counts = _implementations(model) if variant == "fastlora" else {}
        pipe.send((peak_of_process(device), counts))
    except Exception:
        pipe.send(StepError(f"{variant}, {case.name}:\n{traceback.format_exc()}"))


class Worker:
    """A training process; use it in a `with` block."""

    def __init__(self, case: StepCase, variant: str, device: torch.device) -> None:
        spawn = multiprocessing.get_context("spawn")  # a fork would inherit the parent's memory and its peak
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(theirs, case, variant, str(device)), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()

    def _ask(self, go_on: bool) -> Any:
        try:
            self._pipe.send(go_on)
            answer = self._pipe.recv()
        except (EOFError, BrokenPipeError):
            self._process.join()
            raise StepError(f"a training process ended with {self._process.exitcode} (out of memory?)") from None
        if isinstance(answer, StepError):
            raise answer
        return answer

    def step(self) -> Step:
        """One optimiser step.

        Raises:
            StepError: the process failed; the message holds its traceback.
        """
        answer: Step = self._ask(True)
        return answer

    def finish(self) -> tuple[int | None, dict[str, int]]:
        """(peak memory in bytes, layers by implementation), after the last step."""
        answer: tuple[int | None, dict[str, int]] = self._ask(False)
        return answer


def require_agreement(case: StepCase, losses: dict[str, list[float]]) -> None:
    """Raise StepError where the first losses differ and dropout cannot be the reason."""
    ours, peft = losses["fastlora"][0], losses["peft"][0]
    if case.dropout_p == 0 and not abs(ours - peft) <= LOSS_TOLERANCE[case.dtype] * abs(peft):
        raise StepError(f"{case.name}: the first loss is {ours:.7g} with fastlora, {peft:.7g} with PEFT: not timed")


def measure_step(case: StepCase, device: torch.device) -> StepResult:
    """Time `case.rounds` steps of each variant in turn, after a warm-up.

    Raises:
        StepError: a process failed, or without dropout the first losses differ.
    """
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    losses: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    with Worker(case, "peft", device) as peft, Worker(case, "fastlora", device) as fastlora:
        workers = {"peft": peft, "fastlora": fastlora}
        for number in range(WARM_UP_STEPS + case.rounds):
            for variant in VARIANTS if number % 2 else VARIANTS[::-1]:
                step = workers[variant].step()
                losses[variant].append(step.loss)
                if number >= WARM_UP_STEPS:
                    seconds[variant].append(step.seconds)
            if number == 0:
                require_agreement(case, losses)
        closing = {variant: worker.finish() for variant, worker in workers.items()}
    ratios = [ours / theirs for ours, theirs in zip(seconds["fastlora"], seconds["peft"], strict=True)]
    return StepResult(
        {variant: statistics.median(times) for variant, times in seconds.items()},
        statistics.median(ratios),
        losses,
        {variant: peak for variant, (peak, _) in closing.items()},
        closing["fastlora"][1],
        case.rounds,
    )
