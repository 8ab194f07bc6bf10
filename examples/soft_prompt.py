"""Trainable rows in front of a batch (`fastlora.SoftPrompt`), right with any padding: the model's own weights stay as they are.

python examples/soft_prompt.py                                     the shipped base model, on a CPU in seconds
python examples/soft_prompt.py HuggingFaceTB/SmolLM2-135M-Instruct --data train.jsonl --steps 200 --lr 0.03
"""

import argparse
from itertools import cycle
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastlora
from fastlora.data.examples import Example, read_examples
from fastlora.data.rows import batches, collate, encode, pad_token_id
from fastlora.demo import BASE_MODEL
from fastlora.demo.tasks import generate


def main(arguments: list[str] | None = None) -> tuple[list[float], torch.Tensor, torch.Tensor]:
    """Train a prompt; returns the losses, and the next token's logits of a row in a padded batch and alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(BASE_MODEL), help="a folder, or a hub id")
    parser.add_argument("--data", help="JSONL: prompt and completion, or messages; else generated dialogues")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--lr", type=float, default=0.1)
    options = parser.parse_args(arguments)

    drawn = generate("summarization", 64, seed=0)
    examples = read_examples(options.data) if options.data else [Example(one.prompt, one.completion) for one in drawn]
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows = encode(examples, tokenizer, max_length=448).rows  # the prompt takes positions, too

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).requires_grad_(False)
    fastlora.accelerate(model, frozen=True)  # no adapters here: frozen layers alone
    table = model.get_input_embeddings().weight
    prompt = fastlora.SoftPrompt.from_tokens(table, tokenizer("In short:", return_tensors="pt").input_ids)

    def run(batch: dict[str, torch.Tensor]) -> Any:
        tokens = {"input_ids": batch["input_ids"], "embedding": table, "labels": batch.get("labels")}
        embeds, mask, positions, labels = prompt(None, batch["attention_mask"], **tokens)
        return model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, labels=labels)

    optimizer, losses = torch.optim.AdamW(prompt.parameters(), lr=options.lr, weight_decay=0.0), []
    for _, four in zip(range(options.steps), cycle(batches(rows, 4)), strict=False):
        loss = run(collate(four, pad_token_id(tokenizer))).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f} to {losses[-1]:.3f}, {prompt.prompt_embeddings.numel()} trained numbers")
    texts = ["A short row", "A row that is longer: the first one is padded"]
    padded = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    with torch.no_grad():
        return losses, run(padded).logits[0, -1], run(tokenizer(texts[:1], return_tensors="pt")).logits[0, -1]


if __name__ == "__main__":
    main()
