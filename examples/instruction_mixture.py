"""Instruction tuning: two tasks from small YAML files, asked in many wordings, mixed, and a tenth of the rows rehearsed against forgetting.

python examples/instruction_mixture.py                                     the shipped base model, on a CPU in seconds
python examples/instruction_mixture.py HuggingFaceTB/SmolLM2-135M-Instruct --steps 200 --lr 2e-4
"""

import argparse
import json
from pathlib import Path
from typing import Any

from fastlora.config import TrainConfig
from fastlora.demo import BASE_MODEL
from fastlora.demo.tasks import generate, write_jsonl
from fastlora.train import train

REVIEWS = """
name: reviews
data: reviews.jsonl
templates: sentiment        # of those that ship
few_shot_share: 0.3
inverted_share: 0.1
"""
PLACES = """
name: places
data: places.jsonl
columns: {who: person.name}
templates:
  - {input: "Where does {who} live?", target: "{who} lives in {city}."}
"""
MIXTURE = "{mixing: proportional, mixing_maximum: 40, tasks: [reviews.yaml, places.yaml]}"


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Write the files, train, print each task's rows and loss; returns the lines of metrics.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(BASE_MODEL), help="a folder, or a hub id")
    parser.add_argument("--output", default="instruction-output", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=3e-3)
    options = parser.parse_args(arguments)
    folder = options.output / "tasks"
    folder.mkdir(parents=True, exist_ok=True)
    liked = [("I would buy it again.", "positive"), ("It broke at once.", "negative"), ("A joy to use.", "positive")]
    reviews = [{"text": f"{text} ({day} days)", "label": label} for day in range(1, 31) for text, label in liked]
    places = [{"person": {"name": f"Ann {i}"}, "city": ("Rome", "Oslo", "Lima")[i % 3]} for i in range(30)]
    for name, rows in (("reviews", reviews), ("places", places)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, text in (("reviews", REVIEWS), ("places", PLACES), ("mixture", MIXTURE)):
        (folder / f"{name}.yaml").write_text(text)
    write_jsonl(generate("summarization", 32, seed=0), folder / "kept.jsonl")  # what the model can do already
    kept = {"rehearse": 0.1, "rehearse_data": folder / "kept.jsonl", "mixture": folder / "mixture.yaml"}
    given = {"model": options.model, "output": options.output, "max_steps": options.steps, "lr": options.lr}
    for name, task in train(TrainConfig(**given, **kept, overwrite=True)).tasks.items():
        print(f"{name:10} {task['rows']:4} rows, loss {task['loss']:.3f}")
    return [json.loads(line) for line in (options.output / "metrics.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    main()
