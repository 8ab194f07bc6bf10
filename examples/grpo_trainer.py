"""TRL's GRPOTrainer: answers are drawn, and the better ones made likelier; here the shorter ones are better.

python examples/grpo_trainer.py                                    the shipped base model, on a CPU in seconds
python examples/grpo_trainer.py HuggingFaceTB/SmolLM2-135M-Instruct --data prompts.jsonl --steps 200 --lr 1e-5
"""

import argparse
from typing import Any

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

import fastlora
from fastlora.demo import BASE_MODEL
from fastlora.demo.tasks import generate


def shortness(completions: list[str], **_: Any) -> list[float]:
    return [-float(len(one)) for one in completions]


def main(arguments: list[str] | None = None) -> list[float]:
    """Train, save the adapter, print which implementation ran in each layer; returns the mean reward of each step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(BASE_MODEL), help="a folder, or a hub id")
    parser.add_argument("--data", help="JSONL: prompt; else generated dialogues")
    parser.add_argument("--output", default="grpo-output")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    options = parser.parse_args(arguments)

    drawn = Dataset.from_list([{"prompt": one.prompt} for one in generate("summarization", 64, seed=0)])
    data = load_dataset("json", data_files=options.data, split="train") if options.data else drawn
    settings = GRPOConfig(
        options.output,
        max_steps=options.steps,
        learning_rate=options.lr,
        per_device_train_batch_size=8,
        num_generations=8,
        max_completion_length=32,
        bf16=torch.cuda.is_available(),
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = GRPOTrainer(options.model, shortness, args=settings, train_dataset=data, peft_config=lora)
    # The answers to a prompt begin with it: share_prefix=True runs it once where a trainer keeps transformers' forward.
    fastlora.accelerate(trainer.model)
    trainer.train()
    trainer.save_model(options.output)  # PEFT's own format
    print(fastlora.report(trainer.model))
    return [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]


if __name__ == "__main__":
    main()
