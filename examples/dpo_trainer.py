"""TRL's DPOTrainer: an answer that is wanted against one that is not; `fastlora.accelerate` comes before `train`.

python examples/dpo_trainer.py                                     the shipped base model, on a CPU in seconds
python examples/dpo_trainer.py HuggingFaceTB/SmolLM2-135M-Instruct --data pairs.jsonl --steps 200 --lr 5e-5
"""

import argparse

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

import fastlora
from fastlora.demo import BASE_MODEL
from fastlora.demo.tasks import generate


def main(arguments: list[str] | None = None) -> list[float]:
    """Train, save the adapter, print which implementation ran in each layer; returns the logged losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(BASE_MODEL), help="a folder, or a hub id")
    parser.add_argument("--data", help="JSONL: prompt, chosen and rejected; else generated dialogues")
    parser.add_argument("--output", default="dpo-output")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=2e-3)
    options = parser.parse_args(arguments)

    if options.data:
        data = load_dataset("json", data_files=options.data, split="train")
    else:
        drawn = generate("summarization", 64, seed=0)
        others = drawn[1:] + drawn[:1]  # an answer that is not wanted: another dialogue's summary
        pairs = [(a.prompt, a.completion, b.completion) for a, b in zip(drawn, others, strict=True)]
        data = Dataset.from_list([{"prompt": a, "chosen": b, "rejected": c} for a, b, c in pairs])

    settings = DPOConfig(
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
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    base, tokenizer = AutoModelForCausalLM.from_pretrained(options.model), AutoTokenizer.from_pretrained(options.model)
    trainer = DPOTrainer(base, args=settings, train_dataset=data, processing_class=tokenizer, peft_config=lora)
    fastlora.accelerate(trainer.model)
    trainer.train()
    trainer.save_model(options.output)  # PEFT's own format
    print(fastlora.report(trainer.model))
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
