"""Rows of one batch with adapters of their own, by PEFT's `adapter_names`: trained in one step, and answered in one call.

python examples/mixed_batch.py                                     the shipped base model, on a CPU in seconds
python examples/mixed_batch.py HuggingFaceTB/SmolLM2-135M-Instruct --steps 50 --lr 2e-4

PEFT refuses `adapter_names` in training mode; accelerated, a model takes them, each row with its own adapter's dropout.
"""

import argparse

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastlora
from fastlora.data.examples import Example
from fastlora.data.rows import batches, collate, encode, pad_token_id
from fastlora.demo import BASE_MODEL
from fastlora.demo.tasks import generate

TASKS = ["summarization", "translation"]  # an adapter each


def main(arguments: list[str] | None = None) -> tuple[list[float], torch.Tensor, torch.Tensor]:
    """Train both adapters at once; returns the losses, and a mixed batch's logits beside those of each adapter alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(BASE_MODEL), help="a folder, or a hub id")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--lr", type=float, default=3e-3)
    options = parser.parse_args(arguments)

    base = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=16, target_modules="all-linear"), adapter_name=TASKS[0])
    model.add_adapter(TASKS[1], LoraConfig(r=4, target_modules="all-linear"))  # ranks may differ
    model.set_requires_grad(TASKS)
    fastlora.accelerate(model).train()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    pairs = list(zip(*(generate(task, 2 * options.steps, seed=0) for task in TASKS), strict=True))
    rows = encode([Example(one.prompt, one.completion) for pair in pairs for one in pair], tokenizer, 512).rows
    optimizer, losses = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=options.lr), []
    for four in batches(rows, 4):  # "__base__" in the place of a name would be a row without an adapter
        loss = model(**collate(four, pad_token_id(tokenizer)), adapter_names=TASKS * 2).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    prompts = tokenizer([one.prompt for one in pairs[0]], return_tensors="pt", padding=True, padding_side="left")
    answers = model.eval().generate(**prompts, adapter_names=TASKS, max_new_tokens=16)
    print(f"loss {losses[0]:.3f} to {losses[-1]:.3f}", *map(repr, tokenizer.batch_decode(answers)), sep="\n")
    with torch.no_grad():
        mixed, alone = model(**prompts, adapter_names=TASKS).logits, []
        for row, name in enumerate(TASKS):
            model.set_adapter(name)
            alone.append(model(**prompts).logits[row])
    return losses, mixed, torch.stack(alone)


if __name__ == "__main__":
    main()
