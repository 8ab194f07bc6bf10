"""The demo: a small frozen base model learns to summarise dialogues with LoRA, and one report says what came out.

``fastlora demo --output DIR`` or ``python -m fastlora.demo --output DIR``. The base (``fastlora/data/base``) was
trained from scratch on all built-in tasks but summarisation. LoRA is compared with full fine-tuning (quality,
forgetting, memory, file size) and with PEFT's own layers (step time, memory, loss). Everything is generated, seeded and
offline.
"""

import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

BASE = Path(__file__).parents[1] / "data" / "base"
SEED = 0
TRAIN_DIALOGUES = 400
TEST_DIALOGUES = 100
TEST_EXAMPLES = 50  # held-out examples of each other task
EPOCHS = 6
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": "all-linear"}
# The base is four orders of magnitude smaller than the models that the usual rates are meant for.
LR = {"lora": 3e-3, "full": 1e-3}
TIMED_STEPS = 30
TIMED_ROWS = 8
SAMPLES = 4


def main(output: Path, base: Path = BASE) -> dict[str, Any]:
    """Train, measure and report; everything in the report is returned, too.

    Writes OUTPUT/report.html, report.json, data/ (the dialogues), lora/ (the adapter), full/ (the fully fine-tuned
    model) and peft/ (the adapter trained by PEFT's own layers). An earlier demo's files there are replaced.
    """
    # Imported here: the base model's training needs this package, and none of the below.
    from fastlora.demo import report
    from fastlora.demo.steps import compare_steps

    began = time.perf_counter()
    output.mkdir(parents=True, exist_ok=True)
    data = _write_data(output)
    print("1/3 training on dialogue summaries: LoRA, LoRA with PEFT's layers, all weights", flush=True)
    methods = _train_all(output, base, data["train"])
    print("2/3 answering held-out dialogues and the base's own tasks, before and after", flush=True)
    quality = _score_all(output, base)
    print("3/3 timing training steps, fastlora and PEFT in turn", flush=True)
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
            "lora": LORA,
            "lr": LR,
        },
        "methods": methods,
        **quality,
        "step_time": steps,
        "seconds": time.perf_counter() - began,
    }
    (output / "report.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (output / "report.html").write_text(report.html(results), encoding="utf-8")
    report.show(results)
    print(f"report: {output / 'report.html'}", flush=True)
    return results


def _write_data(output: Path) -> dict[str, Path]:
    from fastlora.data.tasks import generate, write_jsonl

    (output / "data").mkdir(exist_ok=True)
    paths = {}
    for split, count in (("train", TRAIN_DIALOGUES), ("test", TEST_DIALOGUES)):
        paths[split] = output / "data" / f"{split}.jsonl"
        write_jsonl(generate("summarization", count, SEED, split), paths[split])
    return paths


def _train_all(output: Path, base: Path, data: Path) -> dict[str, dict[str, Any]]:
    """What each method's training reports, with its losses; one process a method, one after the other."""
    from fastlora import metrics
    from fastlora.demo.training import train_apart

    variants: dict[str, dict[str, Any]] = {
        "lora": {"method": "lora", "lr": LR["lora"], **LORA},
        "peft": {"method": "lora", "lr": LR["lora"], **LORA, "accelerate": False},
        "full": {"method": "full", "lr": LR["full"]},
    }
    methods = {}
    for name, options in variants.items():
        folder = output / name
        folder.mkdir(exist_ok=True)
        methods[name] = train_apart(
            folder / "process.json",
            model=str(base),
            data=str(data),
            output=str(folder),
            seed=SEED,
            epochs=EPOCHS,
            dtype="float32",
            save_steps=10_000,  # past the end: the last step's checkpoint is enough
            overwrite=True,
            **options,
        )
        methods[name]["losses"] = [record["loss"] for record in metrics.read(folder)]
    return methods


def _score_all(output: Path, base: Path) -> dict[str, Any]:
    """ROUGE and exact match of the base, of LoRA and of full fine-tuning, and a few dialogues with their answers."""
    from fastlora.data.tasks import generate
    from fastlora.demo.scores import ADAPTED_TASK, BASE_TASKS, answers, exact_match, reference, rouge
    from fastlora.inference import BASE as NO_ADAPTER
    from fastlora.inference import load_model

    adapted, tokenizer = load_model(str(base), {"lora": output / "lora"}, dtype="float32")
    full, _ = load_model(str(output / "full"), dtype="float32")
    models = {"base": (adapted, NO_ADAPTER), "lora": (adapted, "lora"), "full": (full, None)}
    dialogues = generate(ADAPTED_TASK, TEST_DIALOGUES, SEED, "test")
    others = {task: generate(task, TEST_EXAMPLES, SEED, "test") for task in BASE_TASKS}
    scores: dict[str, Any] = {"rouge": {}, "exact_match": {}}
    summaries = {}
    for name, (model, adapter) in models.items():
        summaries[name] = answers(model, tokenizer, dialogues, adapter)
        scores["rouge"][name] = rouge(summaries[name], dialogues)
        matches = {ADAPTED_TASK: exact_match(summaries[name], dialogues)}
        for task, examples in others.items():
            matches[task] = exact_match(answers(model, tokenizer, examples, adapter), examples)
        scores["exact_match"][name] = matches
    scores["samples"] = [
        {
            "prompt": dialogues[index].prompt,
            "reference": reference(dialogues[index]),
            **{name: summaries[name][index] for name in models},
        }
        for index in range(SAMPLES)
    ]
    return scores
