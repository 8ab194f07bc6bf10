"""The demo: a small base model learns to summarise dialogues, and one report says what that gives, and what it costs.

``fastlora demo --output DIR``. The base (``fastlora/assets/base``) was trained from scratch on all built-in tasks but
summarisation. LoRA and full fine-tuning are compared as ``fastlora compare`` does it, each at the best of its rates on
validation rows, and fastlora's step is timed beside PEFT's. Everything is generated, seeded and offline.
"""

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlora import metrics, writing

if TYPE_CHECKING:
    from fastlora.comparison import Comparison, Outcome
    from fastlora.config import Method
    from fastlora.demo.tasks import TaskExample

BASE_MODEL = Path(__file__).parents[1] / "assets" / "base"
TRAIN_DATA = Path("data", "train.jsonl")  # the first file that a demo writes
COMPARED = "compare"  # what `fastlora compare` leaves
SEED = 0
DIALOGUES = {"train": 400, "validation": 100, "test": 100}
RETAINED = 30  # held-out examples of each other task
METHODS: list["Method"] = ["lora", "full"]
R = 16
# The output layer, too: the words of summaries never were answers in the base's training, so that their rows in it are as they
# began. Without it LoRA's training loss ends at 1.4, with it at 0.4.
TARGET_MODULES = ".*(_proj|lm_head)"
# Of compare's default rates, and far above them: the base is three orders of magnitude smaller than the models those are meant for.
# Tried around them: full fine-tuning at 100 learns no more and forgets three times as much; LoRA at 25 learns less than at 15.
LR_FACTORS = [5.0, 15.0, 50.0]
EPOCHS = 5
BATCH_SIZE = 4
EVAL_BATCH_SIZE = 25
TIMED_STEPS = 30
TIMED_ROWS = 8
SAMPLES = 4


def main(output: Path, base: Path = BASE_MODEL, begin: Callable[[], object] | None = None) -> dict[str, Any]:
    """Train, measure and report; everything in the report is returned, too.

    Writes OUTPUT/report.html, report.json, data/ (dialogues, and examples of the base's tasks), compare/ (what
    ``fastlora compare`` leaves), lora/ (the best adapter) and full/ (the best fully fine-tuned model). An earlier
    demo's files there are replaced.

    Args:
        begin: as of `compare`.

    Raises:
        FileExistsError: an adapter, a model or a comparison lies there that is no earlier demo's.
        BlockingIOError: another demo writes there.
    """
    with writing.locked(output):
        theirs = [name for name in (*METHODS, COMPARED) if (output / name).exists()]
        if theirs and not (output / TRAIN_DATA).exists():
            raise FileExistsError(
                f"output={output} holds {' and '.join(theirs)}, no demo's: expected a folder of its own"
            )
        return _run(output, base, begin)


def _run(output: Path, base: Path, begin: Callable[[], object] | None) -> dict[str, Any]:
    # Imported here: who only draws examples needs this package, and waits for none of the below.
    from fastlora.comparison import Comparison, best, compare
    from fastlora.demo import report
    from fastlora.demo.steps import compare_steps
    from fastlora.demo.tasks import ADAPTED_TASK, BASE_TASKS, generate, write_jsonl

    began = time.perf_counter()
    dialogues = {split: generate(ADAPTED_TASK, count, SEED, split) for split, count in DIALOGUES.items()}
    retained = {task: generate(task, RETAINED, SEED, "test") for task in BASE_TASKS}
    rows = {**dialogues, "retain": [one for examples in retained.values() for one in examples]}
    (output / TRAIN_DATA).parent.mkdir(exist_ok=True)
    paths = {name: output / TRAIN_DATA.with_name(f"{name}.jsonl") for name in rows}
    for name, examples in rows.items():
        write_jsonl(examples, paths[name])
    given = Comparison(
        model=base,
        data=paths["train"],
        eval_data=paths["validation"],
        test_data=paths["test"],
        retain_data=paths["retain"],
        output=output / COMPARED,
        methods=METHODS,
        r=[R],
        target_modules=TARGET_MODULES,
        lr_factors=LR_FACTORS,
        epochs=EPOCHS,
        batch_size=BATCH_SIZE,
        eval_batch_size=EVAL_BATCH_SIZE,
        seed=SEED,
        dtype="float32",
        overwrite=True,
    )
    print("1/3 learning to summarise dialogues: the base, then each method at each of its rates", flush=True)
    outcomes = compare(given, begin)
    told = best(outcomes)
    losses = {one.kind: _publish(given, one, output) for one in told[1:]}
    print("2/3 answering a few dialogues and the base's own tasks, before and after", flush=True)
    answered = _answer(given, told, retained, dialogues["test"][:SAMPLES])
    print("3/3 timing training steps, fastlora and PEFT in turn", flush=True)
    lora = next(one.name for one in told if one.method == "lora")
    config = next(given.config_of(run, output) for run in given.runs() if run.name == lora)
    steps = compare_steps(config, rows=TIMED_ROWS, steps=TIMED_STEPS)
    results = {
        "command": f"fastlora demo --output {output}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": report.machine(),
        "base": json.loads((base / "training.json").read_text(encoding="utf-8")),
        "settings": {"seed": SEED, "dialogues": DIALOGUES, "retained": RETAINED, "epochs": EPOCHS, "rows": BATCH_SIZE},
        "outcomes": [asdict(one) for one in outcomes],
        "best": [one.name for one in told],
        "losses": losses,
        **answered,
        "step_time": steps,
        "seconds": time.perf_counter() - began,
    }
    writing.whole(output / "report.json", (json.dumps(results, indent=2) + "\n").encode())
    writing.whole(output / "report.html", report.html(results).encode())
    report.show(results)
    print(f"report: {output / 'report.html'}", flush=True)
    return results


def _publish(given: "Comparison", one: "Outcome", output: Path) -> list[float]:
    """Copy what the best run of a method leaves, but its checkpoints, to OUTPUT/METHOD; returns the losses of its steps."""
    from fastlora.comparison import RESULT, RUNS

    run = Path(given.output, RUNS, one.name)

    def fill(folder: Path) -> None:
        shutil.copytree(run, folder, ignore=shutil.ignore_patterns("checkpoints", RESULT), dirs_exist_ok=True)

    whole = writing.filled(output, fill)
    writing.remove(output / one.method)
    whole.rename(output / one.method)
    return [record["loss"] for record in metrics.read(run)]


def _answer(
    given: "Comparison",
    told: Sequence["Outcome"],
    retained: Mapping[str, Sequence["TaskExample"]],
    dialogues: Sequence["TaskExample"],
) -> dict[str, Any]:
    """Exact match on the base's tasks, and what a few dialogues are answered with, by the base and the best of each method."""
    from fastlora.comparison import load
    from fastlora.demo.tasks import answers
    from fastlora.evaluation import exact_match

    shares: dict[str, dict[str, float]] = {}
    samples: list[dict[str, Any]] = [
        {"prompt": one.prompt, "reference": one.completion.strip(), "answers": {}} for one in dialogues
    ]
    for one in told:
        model, tokenizer = load(given, one.name, one.method)
        shares[one.kind] = {
            task: exact_match(answers(model, tokenizer, examples), [example.completion for example in examples])
            for task, examples in retained.items()
        }
        for sample, answer in zip(samples, answers(model, tokenizer, dialogues), strict=True):
            sample["answers"][one.kind] = answer
    return {"exact_match": shares, "samples": samples}
