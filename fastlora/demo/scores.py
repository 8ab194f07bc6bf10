"""How well a model answers: greedy answers, exact match by task, ROUGE of summaries."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastlora.data.tasks import TASKS, Example

ADAPTED_TASK = "summarization"
BASE_TASKS = tuple(task for task in TASKS if task != ADAPTED_TASK)


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    max_new_tokens: int = 48,
    batch_size: int = 50,
) -> list[str]:
    """Greedy completions of the examples' prompts, stripped, in their order."""
    order = sorted(range(len(examples)), key=lambda index: len(examples[index].prompt))  # little padding
    found = [""] * len(examples)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        prompts = tokenizer(
            [examples[index].prompt for index in chosen], return_tensors="pt", padding=True, padding_side="left"
        )
        with torch.no_grad():
            tokens = model.generate(
                **{name: prompts[name] for name in ("input_ids", "attention_mask")},
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
        texts = tokenizer.batch_decode(tokens[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
        for index, text in zip(chosen, texts, strict=True):
            found[index] = text.strip()
    return found


def exact_match(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> float:
    """Share of examples whose greedy answer is the reference, spaces around both aside."""
    given = answers(model, tokenizer, examples)
    right = sum(answer == example.completion.strip() for answer, example in zip(given, examples, strict=True))
    return right / len(examples)
