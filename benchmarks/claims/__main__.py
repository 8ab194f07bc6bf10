"""python -m benchmarks.claims EXPERIMENT --model DIR --material DIR --output DIR [--dtype bfloat16] [--quick] [--dry-run]

The experiments: dialogue, examples, ranks, prompts, forgetting and clusters; `all` runs them in this order. The material is the user's: a
folder with a claims.yaml, see `material.py`. Each method is trained with three rates, the best is chosen on validation rows, and what is told is of
test rows. Where two that decide a claim differ by less than twice the standard deviation of a difference of two runs, which three seeds of one of
them tell, both get three seeds. A rate at which a training diverges has a row that says in which step, and is never the best.
OUTPUT gets DATE-MACHINE-claims-EXPERIMENT.json, .md and .png, and keeps every run in trials/: what was stopped goes on where it was.
`--dry-run` prints the runs that are left, their rows and the expected seconds. `--quick` runs all of it in two steps each, which says nothing.
Exit codes: 0 done, 2 wrong arguments or material.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastlora import writing
from fastlora.models import load_tokenizer

from .. import machine
from . import drawing, material
from .experiments import EXPERIMENTS, Told, failed_rows, tell_runs
from .trials import QUICK, SEEDS, Bench, NothingLeftError, Sizes, settle


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.claims", description="Measure what is said of fine-tuning.")
    add = parser.add_argument
    add("experiment", choices=[*EXPERIMENTS, "all"])
    add("--model", type=Path, required=True, help="the base, a folder")
    add("--material", type=Path, required=True, help=f"a folder with {material.NAME}")
    add("--output", type=Path, required=True, help="the results, and every run; the same for all experiments")
    add("--dtype", default="bfloat16", help="the base's (default: bfloat16)")
    add("--quick", action="store_true", help="two steps a run: does it run through?")
    add("--dry-run", action="store_true", help="only print what would run, and for how long")
    return parser.parse_args(argv)


def expect(bench: Bench, name: str, tokenizer: Any, seen: set[tuple[str, str]]) -> float:
    """Print what is left to run; its expected seconds, without more seeds. seen: what another experiment runs, too."""
    total = 0.0
    for trial in EXPERIMENTS[name].trials(bench):
        left = [
            (run, seconds)
            for run, seconds in bench.left(trial, lambda one: len(tokenizer(one.prompt + one.completion).input_ids))
            if (trial.name, run) not in seen
        ]
        seen |= {(trial.name, run) for run, _ in left}
        seconds = sum(seconds for _, seconds in left)
        budget = f"{trial.by_tokens} tokens" if trial.by_tokens else f"{trial.steps} steps"
        print(f"  {trial.name}: {len(trial.train)} rows, {len(trial.validation[: bench.sizes.held])} to choose by,"
              f" {len(trial.test[: bench.sizes.held])} to tell of, {budget}; {len(left)} runs left, {seconds:.0f} s")  # fmt: skip
        total += seconds
    print(f"{name}: {total:.0f} s expected of a model of 135M parameters on two cores, more seeds aside", flush=True)
    return total


def measure(bench: Bench, name: str, command: Sequence[str]) -> Path:
    """Run what is left of an experiment, and write what it says; the JSON file."""
    one = EXPERIMENTS[name]
    found = {trial.name: bench.run(trial) for trial in one.trials(bench)}
    try:
        settled = settle(bench, one.reference(found), one.pairs(found), one.metric)
        told = one.tell(bench, found)
    except NothingLeftError as error:
        settled, told = [f"nothing is concluded: {error}"], tell_runs(found)
    told.rows.extend(failed_rows(found, len(told.head)))
    here = machine.this_machine(torch.device("cpu"))
    says = [
        *told.says,
        *settled,
        "a rate with a ! is the lowest or highest that was tried: a better one may lie beyond",
    ]
    text = f"# {one.claim}\n\n{here.line()}\n\n{markdown(told)}\n\n" + "\n".join(f"- {line}" for line in says) + "\n"
    result = {
        "claim": one.claim,
        "says": says,
        "figures": told.figures,
        "head": told.head,
        "rows": told.rows,
        "sizes": bench.sizes,
        "trials": [trial.as_json() for trial in found.values()],
    }
    path = here.write(bench.output, f"claims-{name}", command, result)
    writing.whole(path.with_suffix(".md"), text.encode())
    if told.charts:
        writing.whole(path.with_suffix(".png"), drawing.png(told.charts, f"{one.claim}\n{here.name}, {here.date}"))
    print(text)
    return path


def markdown(told: Told) -> str:
    """The table."""
    lines = [told.head, ["---"] * len(told.head), *told.rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = _parse(given)
    try:
        import matplotlib  # noqa: F401
        import rouge_score  # noqa: F401
    except ModuleNotFoundError as error:
        print(f"{error}: expected matplotlib and rouge-score (pip install matplotlib rouge-score)", file=sys.stderr)
        return 2
    sizes = QUICK if arguments.quick else Sizes()
    try:
        tokenizer = load_tokenizer(str(arguments.model))
        rows = material.read(arguments.material, tokenizer, sizes.max_length)
        bench = Bench(arguments.model, arguments.output, rows, sizes, arguments.dtype)
        names = list(EXPERIMENTS) if arguments.experiment == "all" else [arguments.experiment]
        seen: set[tuple[str, str]] = set()
        total = sum(expect(bench, name, tokenizer, seen) for name in names)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"in all {total / 3600:.1f} h, with at most {len(SEEDS)} more seeds of what decides")
    for name in () if arguments.dry_run else names:
        began = time.perf_counter()
        path = measure(bench, name, ["python", "-m", "benchmarks.claims", *given])
        print(f"{path} ({time.perf_counter() - began:.0f} s)", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
