"""A loop of your own. The same model and batches give the same losses, by PEFT's layers and by fastlora's.

python examples/plain_loop.py                                     the shipped base model, on a CPU in seconds
python examples/plain_loop.py HuggingFaceTB/SmolLM2-135M-Instruct --data train.jsonl --steps 50 --lr 2e-4
"""

import argparse
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastlora
from fastlora.data.examples import Example, read_examples
from fastlora.data.rows import batches, collate, encode, pad_token_id
from fastlora.demo import BASE_MODEL
from fastlora.demo.tasks import generate


def train(name: str, batch_list: list[dict[str, torch.Tensor]], lr: float, accelerated: bool) -> list[float]:
    torch.manual_seed(0)  # the same first adapter both times; without dropout, so the losses can be compared
    base = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(
        torch.device("cuda" if torch.cuda.is_available() else "cpu")
    )
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")).train()
    if accelerated:
        fastlora.accelerate(model)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=lr)
    losses, began = [], time.perf_counter()
    for batch in batch_list:
        loss = model(**{key: one.to(base.device) for key, one in batch.items()}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"{'fastlora' if accelerated else 'PEFT':8}  {time.perf_counter() - began:6.2f} s  loss {losses[-1]:.6f}")
    return losses


def main(arguments: list[str] | None = None) -> tuple[list[float], list[float]]:
    """Train twice; returns the losses by PEFT's layers and by fastlora's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(BASE_MODEL), help="a folder, or a hub id")
    parser.add_argument("--data", help="JSONL: prompt and completion, or messages; else generated dialogues")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--lr", type=float, default=3e-3)
    options = parser.parse_args(arguments)

    drawn = generate("summarization", 64, seed=0)
    examples = read_examples(options.data) if options.data else [Example(one.prompt, one.completion) for one in drawn]
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows = encode(examples, tokenizer, max_length=512).rows
    every = [collate(part, pad_token_id(tokenizer)) for part in batches(rows, 4)][: options.steps]
    return train(options.model, every, options.lr, False), train(options.model, every, options.lr, True)


if __name__ == "__main__":
    main()
