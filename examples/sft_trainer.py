"""TRL's SFTTrainer: it makes the PEFT model itself, so `fastlora.accelerate` comes after it and before `train`.

python examples/sft_trainer.py                                     the shipped base model, on a CPU in seconds
python examples/sft_trainer.py HuggingFaceTB/SmolLM2-135M-Instruct --data train.jsonl --steps 200 --lr 2e-4
"""

import argparse

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

import fastlora
from fastlora.demo import BASE_MODEL
from fastlora.demo.tasks import generate


def main(arguments: list[str] | None = None) -> list[float]:
    """Train, save the adapter, print which implementation ran in each layer; returns the logged losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(BASE_MODEL), help="a folder, or a hub id")
    parser.add_argument("--data", help="JSONL: prompt and completion, or messages; else generated dialogues")
    parser.add_argument("--output", default="sft-output")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=3e-3)
    options = parser.parse_args(arguments)

    if options.data:
        data = load_dataset("json", data_files=options.data, split="train")
    else:
        drawn = generate("summarization", 64, seed=0)
        data = Dataset.from_list([{"prompt": one.prompt, "completion": one.completion} for one in drawn])

    settings = SFTConfig(
        options.output,
        max_steps=options.steps,
        learning_rate=options.lr,
        per_device_train_batch_size=4,
        max_length=512,
        bf16=torch.cuda.is_available(),
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SFTTrainer(options.model, settings, train_dataset=data, peft_config=lora)
    fastlora.accelerate(trainer.model)
    trainer.train()
    trainer.save_model(options.output)  # PEFT's own format
    print(fastlora.report(trainer.model))
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
