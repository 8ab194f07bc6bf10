"""What a person sees while a training runs: a bar with its loss, its speed, how near that is to the machine's limit, its memory, the time left."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from tqdm import tqdm

from fastlora import memory
from fastlora.choice.clock import HostClock
from fastlora.config import PROMPTS, TrainConfig
from fastlora.data.rows import Row
from fastlora.limits import Products, fastest_product

SECONDS = 0.2  # of measuring what the machine can do, about
WIDTHS = {"cuda": 4096, "cpu": 768}  # of the products that tell it


class Limit:
    """What part of the machine's rate of products a step reaches."""

    def __init__(self, products: Products, rate: float) -> None:
        self.products, self.rate = products, rate

    @classmethod
    def of(cls, model: Any, config: TrainConfig, device: torch.device, dtype: torch.dtype) -> "Limit | None":
        """None where there is no honest figure: products that are not those of the model's sizes and the rows' tokens, or none of that dtype here."""
        others = config.method == "peft" or config.method in PROMPTS  # a prompt's tokens, and its encoder, are no row's
        if others or config.bits or config.share_prefix or device.type not in WIDTHS or not Products.known(model):
            return None
        # A CPU runs products of 16 bits by way of float32 where that is faster, as of float16 it mostly is.
        dtypes = {dtype, torch.float32} if device.type == "cpu" else {dtype}
        seconds = SECONDS / len(dtypes)
        try:
            rates = [fastest_product(device, one, HostClock(device), seconds, WIDTHS[device.type]) for one in dtypes]
        except (RuntimeError, MemoryError):  # no such product here, or no room for it
            return None
        return cls(Products(model), max(rates))

    def percent(self, rows: Sequence[Row], seconds: float, processes: int) -> float:
        """Of a step over so many processes that are alike."""
        flops = self.products.flops([len(row.input_ids) for row in rows], sum(row.labelled for row in rows))
        return 100 * flops / processes / seconds / self.rate


class Bar:
    """The bar of a training's steps on stderr; where it is not shown, nothing is measured for it."""

    def __init__(self, steps: int, done: int, shown: bool, device: torch.device, processes: int) -> None:
        self.device, self.processes = device, processes
        self.tqdm = tqdm(
            total=steps,
            initial=done,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.1 if sys.stderr.isatty() else 2.0,  # seconds; a log keeps every line
            disable=not shown,
        )

    def __enter__(self) -> "Bar":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.tqdm.close()

    @contextmanager
    def aside(self, what: str) -> Iterator[None]:
        """While something is done that comes once, before the first step: what is told, and its time is no step's."""
        self.tqdm.set_postfix_str(what)
        yield
        self.tqdm.set_postfix_str("", refresh=False)
        self.tqdm.unpause()

    def tell(self, record: Mapping[str, float], rows: Sequence[Row], limit: Limit | None, measured: str = "") -> None:
        """One more step is done, with this record of metrics.jsonl, on these rows of all processes; measured: by the last validation."""
        if not self.tqdm.disable:
            parts = [
                f"loss {record['loss']:.4f}",
                *[measured] * bool(measured),
                f"{record['tokens_per_second']:.0f} tokens/s",
            ]
            if limit is not None:
                parts.append(f"{limit.percent(rows, record['seconds'], self.processes):.0f} % of the machine")
            held = memory.peak(self.device)
            if held is not None:
                parts.append(f"{held / 1e9:.1f} GB")
            self.tqdm.set_postfix_str(", ".join(parts), refresh=False)
        self.tqdm.update()
