"""How well a model answers: exact match by task, ROUGE of summaries."""

from collections.abc import Sequence
from typing import Any

from rouge_score.rouge_scorer import RougeScorer

from fastlora.data.tasks import TASKS, Example
from fastlora.inference import generate

ADAPTED_TASK = "summarization"
BASE_TASKS = tuple(task for task in TASKS if task != ADAPTED_TASK)
ROUGE = ("rouge1", "rouge2", "rougeL")


def answers(model: Any, tokenizer: Any, examples: Sequence[Example], adapter_name: str | None = None) -> list[str]:
    """Greedy answers to the examples' prompts, in their order, without spaces around them."""
    prompts = [example.prompt for example in examples]
    texts = generate(model, tokenizer, prompts, max_new_tokens=48, batch_size=50, adapter_name=adapter_name)
    return [text.strip() for text in texts]


def exact_match(given: Sequence[str], examples: Sequence[Example]) -> float:
    """Share of answers equal to the reference completion, spaces around it aside."""
    return sum(answer == reference(example) for answer, example in zip(given, examples, strict=True)) / len(examples)


def rouge(given: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
    """Mean F-measures of ROUGE-1, ROUGE-2 and ROUGE-L from the package rouge-score, without stemming; 0 to 1."""
    scorer = RougeScorer(ROUGE)
    scores = [scorer.score(reference(example), answer) for answer, example in zip(given, examples, strict=True)]
    return {name: sum(score[name].fmeasure for score in scores) / len(scores) for name in ROUGE}


def reference(example: Example) -> str:
    return example.completion.strip()
