"""The demo: a small frozen base model learns to summarise dialogues with LoRA, and one report says what came out.

``fastlora demo --output DIR``. The base (``fastlora/assets/base``) was trained from scratch on all built-in tasks but
summarisation. LoRA is compared with full fine-tuning (quality, forgetting, memory, file size) and with PEFT's own
layers (step time, memory, loss). Everything is generated, seeded and offline.
"""

import json
import tempfile
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastlora import metrics, writing
from fastlora.layers import BASE

BASE_MODEL = Path(__file__).parents[1] / "assets" / "base"
TRAIN_DATA = Path("data", "train.jsonl")  # the first file that a demo writes
SEED = 0
TRAIN_DIALOGUES = 400
TEST_DIALOGUES = 100
TEST_EXAMPLES = 50  # held-out examples of each other task
EPOCHS = 5
BATCH_SIZE = 4
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": "all-linear"}
# Far above the usual rates: the base is three orders of magnitude smaller than the models those are meant for.
LR = {"lora": 3e-3, "full": 5e-4}
MEMORY_STEPS = 40
TIMED_STEPS = 30
TIMED_ROWS = 8
SAMPLES = 4


def main(output: Path, base: Path = BASE_MODEL) -> dict[str, Any]:
    """Train, measure and report; everything in the report is returned, too.

    Writes OUTPUT/report.html, report.json, data/ (the dialogues), lora/ (the adapter) and full/ (the fully fine-tuned
    model). An earlier demo's files there are replaced.

    Raises:
        FileExistsError: an adapter or model lies there that is no earlier demo's.
        BlockingIOError: another demo writes there.
    """
    with writing.locked(output):
        theirs = [name for name in LR if writing.results(output / name)]
        if theirs and not (output / TRAIN_DATA).exists():
            raise FileExistsError(
                f"output={output} holds {' and '.join(theirs)}, no demo's: expected a folder of its own"
            )
        return _run(output, base)


def _run(output: Path, base: Path) -> dict[str, Any]:
    # Imported here: who only draws examples needs this package, and waits for none of the below.
    from fastlora.demo import report
    from fastlora.demo.steps import compare_steps

    began = time.perf_counter()
    data = _write_data(output)
    print("1/4 training on dialogue summaries: LoRA, then all weights", flush=True)
    methods = _train_both(output, base, data["train"])
    print("2/4 answering held-out dialogues and the base's own tasks, before and after", flush=True)
    quality = _score_all(output, base)
    print("3/4 measuring memory, each method in a process of its own", flush=True)
    memory = _memory(base, data["train"])
    print("4/4 timing training steps, fastlora and PEFT in turn", flush=True)
    steps = compare_steps(base, data["train"], LORA, LR["lora"], rows=TIMED_ROWS, steps=TIMED_STEPS)
    results = {
        "command": f"fastlora demo --output {output}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": report.machine(),
        "base": json.loads((base / "training.json").read_text(encoding="utf-8")),
        "settings": {
            "seed": SEED,
            "train_dialogues": TRAIN_DIALOGUES,
            "test_dialogues": TEST_DIALOGUES,
            "test_examples_per_task": TEST_EXAMPLES,
            "epochs": EPOCHS,
            "batch_size": BATCH_SIZE,
            "lora": LORA,
            "lr": LR,
        },
        "methods": methods,
        **quality,
        "peak_memory": {"steps": MEMORY_STEPS, "rows": TIMED_ROWS, "bytes": memory},
        "step_time": steps,
        "seconds": time.perf_counter() - began,
    }
    writing.whole(output / "report.json", (json.dumps(results, indent=2) + "\n").encode())
    writing.whole(output / "report.html", report.html(results).encode())
    report.show(results)
    print(f"report: {output / 'report.html'}", flush=True)
    return results


def _write_data(output: Path) -> dict[str, Path]:
    from fastlora.demo.tasks import generate, write_jsonl

    (output / "data").mkdir(exist_ok=True)
    paths = {}
    for split, count in (("train", TRAIN_DIALOGUES), ("test", TEST_DIALOGUES)):
        paths[split] = output / "data" / f"{split}.jsonl"
        write_jsonl(generate("summarization", count, SEED, split), paths[split])
    return paths


def _options(method: str, base: Path, data: Path, output: Path) -> dict[str, Any]:
    """TrainConfig's arguments for one method."""
    options: dict[str, Any] = {"method": method, "model": str(base), "data": str(data), "output": str(output)}
    options |= {"seed": SEED, "lr": LR[method], "dtype": "float32", "overwrite": True}
    return options | LORA if method == "lora" else options


def _train_both(output: Path, base: Path, data: Path) -> dict[str, dict[str, Any]]:
    """What the training of each method reports, with the losses of all its steps."""
    from fastlora.config import TrainConfig
    from fastlora.train import train

    methods = {}
    for method in LR:
        options = _options(method, base, data, output / method)
        # One checkpoint, at the end: save_steps lies past it.
        result = train(TrainConfig(**options, epochs=EPOCHS, batch_size=BATCH_SIZE, save_steps=10_000))
        methods[method] = {**asdict(result), "losses": [one["loss"] for one in metrics.read(output / method)]}
    return methods


def _memory(base: Path, data: Path) -> dict[str, int]:
    """Peak memory in bytes of LoRA by fastlora, of LoRA by PEFT's own layers, and of full fine-tuning."""
    from fastlora.demo.memory import peak_memory

    variants = {"lora": ("lora", True), "peft": ("lora", False), "full": ("full", True)}
    found = {}
    for name, (method, accelerate) in variants.items():
        with tempfile.TemporaryDirectory() as scratch:
            options = _options(method, base, data, Path(scratch) / "run")
            found[name] = peak_memory(**options, accelerate=accelerate, max_steps=MEMORY_STEPS, batch_size=TIMED_ROWS)
    return found


def _score_all(output: Path, base: Path) -> dict[str, Any]:
    """ROUGE and exact match of the base, of LoRA and of full fine-tuning, and a few dialogues with their answers."""
    from fastlora.demo.tasks import ADAPTED_TASK, BASE_TASKS, answers, generate
    from fastlora.evaluation import exact_match, rouge
    from fastlora.models import load_model

    adapted, tokenizer = load_model(str(base), {"lora": output / "lora"}, dtype="float32")
    full, _ = load_model(str(output / "full"), dtype="float32")
    models = {"base": (adapted, BASE), "lora": (adapted, "lora"), "full": (full, None)}
    asked = {ADAPTED_TASK: generate(ADAPTED_TASK, TEST_DIALOGUES, SEED, "test")}
    asked |= {task: generate(task, TEST_EXAMPLES, SEED, "test") for task in BASE_TASKS}
    expected = {task: [example.completion.strip() for example in examples] for task, examples in asked.items()}
    scores: dict[str, Any] = {"rouge": {}, "exact_match": {}}
    samples = [{"prompt": one.prompt, "reference": one.completion.strip()} for one in asked[ADAPTED_TASK][:SAMPLES]]
    for name, (model, adapter) in models.items():
        given = {task: answers(model, tokenizer, examples, adapter) for task, examples in asked.items()}
        scores["rouge"][name] = rouge(given[ADAPTED_TASK], expected[ADAPTED_TASK])
        scores["exact_match"][name] = {task: exact_match(given[task], expected[task]) for task in asked}
        for sample, summary in zip(samples, given[ADAPTED_TASK], strict=False):
            sample[name] = summary
    return {**scores, "samples": samples}
