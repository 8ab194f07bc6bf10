"""transformers' Trainer on a PEFT model: `fastlora.accelerate` is one line before it, and the rest is yours as it was.

python examples/trainer.py                                     the shipped base model, on a CPU in seconds
python examples/trainer.py HuggingFaceTB/SmolLM2-135M-Instruct --data train.jsonl --steps 200 --lr 2e-4
"""

import argparse

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import fastlora
from fastlora.data.examples import Example, read_examples
from fastlora.data.rows import collate, encode, pad_token_id
from fastlora.demo import BASE_MODEL
from fastlora.demo.tasks import generate


def main(arguments: list[str] | None = None) -> list[float]:
    """Train, save the adapter, print which implementation ran in each layer; returns the logged losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(BASE_MODEL), help="a folder, or a hub id")
    parser.add_argument("--data", help="JSONL: prompt and completion, or messages; else generated dialogues")
    parser.add_argument("--output", default="trainer-output")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=3e-3)
    options = parser.parse_args(arguments)

    drawn = generate("summarization", 64, seed=0)
    examples = read_examples(options.data) if options.data else [Example(one.prompt, one.completion) for one in drawn]
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows = encode(examples, tokenizer, max_length=512).rows  # token rows; only the completion has labels

    base = AutoModelForCausalLM.from_pretrained(options.model)
    config = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
    # The loss, too, from logits of labelled tokens only; and norms, MLPs and attention, without padding.
    model = fastlora.accelerate(get_peft_model(base, config), loss=True, fuse=True)

    settings = TrainingArguments(
        options.output,
        max_steps=options.steps,
        learning_rate=options.lr,
        per_device_train_batch_size=4,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,  # the rows are fastlora's, and collate makes the batch
    )
    trainer = Trainer(
        model, settings, data_collator=lambda batch: collate(batch, pad_token_id(tokenizer)), train_dataset=rows
    )
    trainer.train()
    model.save_pretrained(options.output)  # PEFT's own format
    print(fastlora.report(model))
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
