"""What many adapters on one base want to reach on a CPU, each goal beside PEFT's figure of the same run: all of it by one command.

mixed batches       a forward of a small Llama with an adapter a row, over the bare base's: 1.25 at a token a row, 1.1 at 128, 1.5 of ranks 4 to 64
a sweep             8 jobs in one batch over 8 in turn (sweep.py): 3 times ours, 6 times PEFT's; 12 jobs with halving over 12 in turn: 2 times
a bank              while files of adapters are read, no other row waits more than a step
a server            32 clients over one at a time (serve.py): 6 times

Beside each forward stand the least seconds that it can take: its bytes at this machine's copy rate (each weight once, each adapter once), and its
products at the best product rate. Each row is told as soon as it is known.
"""

import json
import os
import queue
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastlora.bounds import nearly_equal
from fastlora.choice.clock import time_in_turn
from fastlora.config import Dtype

from . import serve, sweep
from .device import clock_of
from .gate import CaseError
from .goals import Goal
from .machine import bandwidths, product_rate
from .model_steps import NARROW, Material, save_random
from .session import Line, Session
from .small_llama import SMALL_HEAD, base_model
from .step import own_process
from .table import render, seconds

SECONDS = 4.0  # of timing, a forward
DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16")
MEMORY, PRODUCTS = "memory bound", "product bound"
REGISTERED, RESIDENT, ASKED = (
    1000,
    32,
    64,
)  # adapters of the bank's line, those it has room for, and new ones that are asked for
TOKENS, LONG = 12, 2000  # of their answers, and of the row's that waits
WAIT = 1.0  # steps, at most
HALVED, ROWS, RANKS, RATES = 2.0, 500, (4, 8, 16, 32), (1e-4, 3e-4, 1e-3)
TINY = {
    **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 1024},
    **{"num_attention_heads": 4, "num_key_value_heads": 2},
}


@dataclass(frozen=True)
class Forward:
    """A forward of rows that each have an adapter, in turn."""

    what: str
    rows: int
    tokens: int
    ranks: tuple[int, ...]
    goal: float

    def case(self) -> str:
        ranks = "r " + " to ".join(dict.fromkeys(str(r) for r in (min(self.ranks), max(self.ranks))))
        return f"{self.rows} rows of {self.tokens}, {len(self.ranks)} adapters, {ranks}"


FORWARDS = (
    Forward("decode", 8, 1, (16,) * 8, 1.25),
    Forward("decode", 32, 1, (16,) * 8, 1.25),
    Forward("prefill", 8, 128, (16,) * 8, 1.1),
    Forward("decode, many ranks", 32, 1, tuple(4 + 60 * i // 31 for i in range(32)), 1.5),
)


def adapter_lines(material: Material, quick: bool) -> dict[str, Line]:
    """Every goal of many adapters. quick: on tiny models, in float32, without the server and the twelve jobs."""
    sizes, budget = (TINY, 0.1) if quick else ({}, SECONDS)
    counts = (40, 4, 8) if quick else (REGISTERED, RESIDENT, ASKED)
    # The engines first: their threads are slower once this one has computed (fastlora/serving/server.py).
    lines: dict[str, Line] = {f"a bank, {counts[0]:,} registered": partial(_bank, counts=counts, sizes=sizes)}
    if not quick:
        lines |= {f"serve, {title}": line for title, line in serve.serve_lines(material).items()}
    for one in FORWARDS:
        for dtype in DTYPES[: 1 if quick else None]:
            line = partial(_forward, one=one, dtype=dtype, sizes=sizes, budget=budget)
            lines[f"{one.what}, {one.case()}, {dtype}"] = line
    for title, gains in sweep.sweep_lines(True).items():
        lines[f"sweep, {title}"] = partial(_sweep, line=gains)
    if not quick and material.model is not None and material.data is not None:
        for dtype in DTYPES:
            title = f"sweep, {len(RANKS) * len(RATES)} jobs with halving, {dtype}"
            lines[title] = partial(_halving, material=material, dtype=dtype)
    return {title: partial(_telling, line=line) for title, line in lines.items()}


def _telling(session: Session, line: Line) -> Iterator[Goal]:
    for goal in line(session):
        what, *rest = zip(HEADS, _cells(goal), strict=True)
        print(f"{what[1]}: {', '.join(f'{head} {cell}' for head, cell in rest if cell != '-')}", flush=True)
        yield goal


# ---- mixed batches


def _adapted(sizes: Mapping[str, Any], dtype: str, ranks: Sequence[int]) -> Any:
    """The model with adapters a0, a1, ... of these ranks on all its linear layers."""
    from peft import LoraConfig, get_peft_model

    def config(r: int) -> LoraConfig:
        return LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear", init_lora_weights=False)

    model: Any = get_peft_model(
        base_model({**SMALL_HEAD, **sizes}, dtype), config(ranks[0]), "a0", autocast_adapter_dtype=False
    )
    for number, r in enumerate(ranks[1:], 1):
        model.add_adapter(f"a{number}", config(r), autocast_adapter_dtype=False)
    return model.to(getattr(torch, dtype)).eval().requires_grad_(False)


def _forward(session: Session, one: Forward, dtype: str, sizes: Mapping[str, Any], budget: float) -> Iterator[Goal]:
    import fastlora

    whole = {**SMALL_HEAD, **sizes}
    torch.manual_seed(0)
    peft, ours, fused = (_adapted(sizes, dtype, one.ranks) for _ in range(3))
    for other in (ours, fused):
        other.load_state_dict(peft.state_dict())
    fastlora.accelerate(ours), fastlora.accelerate(fused, frozen=True, fuse=True)
    bare = base_model(whole, dtype).eval().requires_grad_(False)
    ids = torch.randint(5, whole["vocab_size"], (one.rows, one.tokens), generator=torch.Generator().manual_seed(4))
    names = [f"a{i % len(one.ranks)}" for i in range(one.rows)]

    def run(model: Any, **options: Any) -> torch.Tensor:
        with torch.inference_mode():
            logits: torch.Tensor = model(input_ids=ids, use_cache=False, **options).logits
            return logits

    expected = run(peft, adapter_names=names)
    for name, model in (("fastlora", ours), ("all of it", fused)):
        if not nearly_equal(run(model, adapter_names=names), expected):
            raise CaseError(f"{one.case()}, {dtype}: {name} has other logits than PEFT: not timed")
    given = {"base": (bare, {}), **{name: (model, {"adapter_names": names}) for name, model in
             (("peft", peft), ("fastlora", ours), ("all of it", fused))}}  # fmt: skip
    runs = {
        name: lambda _, model=model, options=options: run(model, **options) for name, (model, options) in given.items()
    }
    timed = time_in_turn(runs, clock_of(session.device), budget)
    spent = {name: found.seconds for name, found in timed.items()}
    spent |= bounds(session, one, bare, peft, getattr(torch, dtype))
    ratios = {name: timed[name].ratio for name in ("peft", "fastlora", "all of it")}
    yield Goal(
        f"{one.what}, over the bare base", one.case(), dtype, one.goal, ratios["fastlora"], ratios["peft"], seconds=spent,
        rivals={"all of it": ratios["all of it"]},
    )  # fmt: skip


def bounds(session: Session, one: Forward, bare: Any, adapted: Any, dtype: torch.dtype) -> dict[str, float]:
    """The least seconds of a forward: its weights and adapters once at the copy rate, its products at the product rate."""
    table = bare.get_input_embeddings().weight
    weights = [weight for weight in bare.parameters() if weight is not table]
    used = [weight for name, weight in adapted.named_parameters() if ".lora_" in name]
    rows = one.rows * one.tokens
    moved = sum(weight.nbytes for weight in (*weights, *used)) + rows * table.shape[1] * table.itemsize
    products = 2 * rows * sum(weight.numel() for weight in weights if weight.dim() > 1)
    products += 2 * rows * sum(weight.numel() for weight in used) / len(one.ranks)
    rates = bandwidths(session.device)["copy"], product_rate(session.device, dtype)
    return {MEMORY: moved / rates[0], PRODUCTS: products / rates[1]}


# ---- sweeps


def _sweep(session: Session, line: Line) -> Iterator[Goal]:
    for gain in line(session):
        of_case = partial(
            Goal,
            case=f"{sweep.JOBS} jobs, a row of {gain.tokens} tokens",
            numbers=gain.numbers,
            peft=None,
            at_least=True,
        )
        yield of_case("a sweep: times the speed of ours in turn", goal=sweep.OVER_OURS, ours=gain.over_ours,
                      seconds={"fastlora": gain.sweep})  # fmt: skip
        yield of_case("a sweep: times the speed of PEFT's in turn", goal=sweep.OVER_PEFT, ours=gain.over_peft,
                      seconds={"fastlora": gain.sweep, "peft": sweep.JOBS * gain.peft})  # fmt: skip


def _halving(session: Session, material: Material, dtype: Dtype) -> Iterator[Goal]:
    """Twelve jobs with halving, against each alone to its end: a job's rate changes nothing of its time, so one of each rank is timed."""
    from fastlora.sweep.jobs import Sweep
    from fastlora.sweep.run import sweep as run

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        assert material.data is not None
        with material.data.open(encoding="utf-8") as lines:
            rows = [line for line, _ in zip(lines, range(ROWS), strict=False)]
        held_out = max(1, len(rows) // 10)
        (folder / "train.jsonl").write_text("".join(rows[held_out:]))
        (folder / "eval.jsonl").write_text("".join(rows[:held_out]))

        def timed(output: str, r: Sequence[int], lr: Sequence[float], halving: bool) -> float:
            begun = time.perf_counter()
            run(Sweep(model=str(material.model), data=folder / "train.jsonl", eval_data=folder / "eval.jsonl", output=folder / output,
                      r=[*r], lr=[*lr], halving=halving, dtype=dtype, epochs=1, batch_size=8, max_length=512), progress=False)  # fmt: skip
            return time.perf_counter() - begun

        together = timed("all", RANKS, RATES, True)
        alone = len(RATES) * sum(timed(f"r{r}", [r], RATES[:1], False) for r in RANKS)
    case = f"{len(RANKS) * len(RATES)} jobs, {len(rows)} dialogues, {Path(str(material.model)).name}"
    yield Goal(
        "a sweep with halving: times the speed of ours in turn", case, dtype, HALVED, alone / together, None, at_least=True,
        seconds={"fastlora": together, "in turn": alone},
    )  # fmt: skip


# ---- a bank


def _save(folder: Path, registered: int, sizes: Mapping[str, Any]) -> None:
    """A model, and as many folders of one adapter's files: links, which are read as others are."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    save_random(NARROW, folder / "model", **{"num_hidden_layers": 6, **_with_tokens(sizes)})
    base: Any = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    config = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(str(folder / "one"))
    for number in range(registered):
        own = folder / "adapters" / f"a{number}"
        own.mkdir(parents=True)
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            os.link(folder / "one" / file, own / file)


def _with_tokens(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Those sizes, with the vocabulary of the tokenizer that is saved beside."""
    return {name: value for name, value in sizes.items() if name != "vocab_size"}


def _peft_seconds(folder: Path) -> float:
    """What PEFT takes to load an adapter into a model, in which time nobody else gets a token."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base: Any = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, folder / "one")
    spent = []
    for number in range(5):
        begun = time.perf_counter()
        model.load_adapter(str(folder / "adapters" / f"a{number}"), f"a{number}")
        spent.append(time.perf_counter() - begun)
    return statistics.median(spent)


def _bank(session: Session, counts: tuple[int, int, int], sizes: Mapping[str, Any]) -> Iterator[Goal]:
    from fastlora.serving.server import start_engine

    registered, resident, asked = counts
    with tempfile.TemporaryDirectory() as name, own_process() as process:  # this one's main thread is not to compute
        folder = Path(name)
        process.submit(_save, folder, registered, sizes).result()
        by_peft = process.submit(_peft_seconds, folder).result()
        size = sum(tensor["bytes"] for tensor in _tensors(folder / "one" / "adapter_model.safetensors"))
        engine = start_engine(
            str(folder / "model"),
            folder / "adapters",
            max_rows=8,
            max_queue=8,
            max_length=2048,
            max_adapter_bytes=resident * size,
        )
        try:
            cold, warm, step = waits(engine, [f"a{1 + i}" for i in range(asked)], resident)
        finally:
            engine.close(drain=False)
    case = f"{registered:,} registered, {resident} resident, {asked} asked for in turn"
    yield Goal(
        "a bank: steps that another row waits for a file", case, "float32", WAIT, max(0.0, cold.longest - warm.longest) / step,
        by_peft / step, seconds={"fastlora": cold.first, "resident": warm.first, "step": step},
    )  # fmt: skip
    yield Goal(
        "a bank: from the request to the first token", case, "float32", None, 1e3 * cold.first, None, unit="ms",
        rivals={"resident": 1e3 * warm.first}, seconds={"fastlora": cold.first},
    )  # fmt: skip


def _tensors(file: Path) -> Iterator[dict[str, int]]:
    with file.open("rb") as content:
        header = json.loads(content.read(int.from_bytes(content.read(8), "little")))
    for name, entry in header.items():
        if name != "__metadata__":
            yield {"bytes": entry["data_offsets"][1] - entry["data_offsets"][0]}


@dataclass(frozen=True)
class Waits:
    """Seconds: the longest between two tokens of a row that was under way, and to the first of those that came, the median."""

    longest: float
    first: float


def waits(engine: Any, names: Sequence[str], resident: int) -> tuple[Waits, Waits, float]:
    """What a row under way, of adapter a0, and new rows wait: those of adapters that are not there, those of one that is; and a step's seconds."""
    from fastlora.serving.engine import EngineError, Piece, Request

    times: list[float] = []
    row = engine.submit(Request([5, 6, 7], "a0", LONG), lambda _: times.append(time.perf_counter()))

    def ask(name: str) -> float:
        begun, firsts, over = time.perf_counter(), list[float](), queue.SimpleQueue[EngineError | None]()

        def hear(news: Piece | EngineError) -> None:
            firsts.append(time.perf_counter() - begun)
            if isinstance(news, EngineError):
                over.put(news)
            elif news.finish is not None:
                over.put(None)

        engine.submit(Request([8, 9, 10], name, TOKENS), hear)
        if (error := over.get()) is not None:
            raise error
        return firsts[0]

    def measured(asked: Sequence[str]) -> Waits:
        begun = len(times)
        firsts = [ask(name) for name in asked]
        own = times[begun:]
        return Waits(max(b - a for a, b in zip(own, own[1:], strict=False)), statistics.median(firsts))

    ask("a0")
    warm = measured(["a0"] * max(4, resident))
    cold = measured(names)
    step = statistics.median(b - a for a, b in zip(times, times[1:], strict=False))
    engine.cancel(row)
    return cold, warm, step


# ---- the table

HEADS = ("goal", "case", "numbers", "wanted", "fastlora", "PEFT", "met", "takes", MEMORY, PRODUCTS, "beside")


def _cells(one: Goal) -> tuple[str, ...]:
    def quantity(value: float | None) -> str:
        return "-" if value is None else f"{value:,.0f} {one.unit}" if one.unit else f"{value:.2f}"

    wanted = "-" if one.goal is None else f"{'≥' if one.at_least else '≤'} {one.goal:g}"
    spent = [seconds(one.seconds[name]) if name in one.seconds else "-" for name in ("fastlora", MEMORY, PRODUCTS)]
    beside = ", ".join(f"{name} {quantity(value)}" for name, value in one.rivals.items()) or "-"
    met = {True: "yes", False: "no", None: "-"}[one.is_met()]
    return one.what, one.case, one.numbers, wanted, quantity(one.ours), quantity(one.peft), met, *spent, beside


def adapters_table(goals: Sequence[Goal], notes: Sequence[str]) -> str:
    """For people: each goal, what was measured, PEFT's figure, and the least that a forward can take."""
    legend = (
        "adapters: over the bare base: the forward of transformers' model without adapters; fastlora: PEFT's model after `accelerate`;"
        " all of it: with `frozen=True, fuse=True`, over the same base",
        f"{MEMORY}: every weight and adapter once at this machine's copy rate; {PRODUCTS}: its products at the best rate; medians timed in turn",
    )
    met = [one.is_met() for one in goals if one.goal is not None]
    return "\n".join(
        [
            *legend,
            "",
            render(HEADS, [_cells(one) for one in goals]),
            "",
            f"{sum(map(bool, met))} of {len(met)} goals are met",
            *notes,
        ]
    )
