"""An encoder-decoder's two sides: the prompt is what its encoder reads, the completion what its decoder is to write.

Each side is framed as the model's tokenizer frames a text of it: T5's ends both with the end token, BART's opens them, too, and mBART's names
another language on the completion's (`text_target`). A completion ends with the end token in any case. What the decoder's input begins with is the
model's own business, which shifts the labels. There is no chat template.
"""

from typing import Any

from fastlora.data.examples import BadLine, Example, Prompt


def encode(tokenizer: Any, example: Example) -> tuple[list[int], list[int]]:
    """The encoder's tokens, and the decoder's labels.

    Raises:
        BadLine: the example is of messages, or has no prompt; or the tokenizer has no tokens for a side.
        UnicodeEncodeError: a text has half of a surrogate pair.
    """
    prompt, end = encode_prompt(tokenizer, example.prompt), tokenizer.eos_token_id
    answer = _tokens(tokenizer, "completion", text_target=example.completion)
    return prompt, answer if end is None or answer[-1] == end else [*answer, end]


def encode_prompt(tokenizer: Any, prompt: Prompt) -> list[int]:
    """What the encoder reads, in training as in generation.

    Raises:
        As `encode`.
    """
    if not isinstance(prompt, str):
        raise BadLine("an encoder-decoder has no chat template: expected prompt and completion as text, got messages")
    if not prompt:
        raise BadLine("an encoder-decoder reads a prompt: expected prompt and completion, got none to read")
    return _tokens(tokenizer, "prompt", text=prompt)


def _tokens(tokenizer: Any, side: str, **text: str) -> list[int]:
    try:
        ids: list[int] = tokenizer(**text, verbose=False)["input_ids"]
    except TypeError:
        "".join(text.values()).encode("utf-8")  # names half of a surrogate pair, which is no character
        raise
    if len(ids) <= tokenizer.num_special_tokens_to_add():
        raise BadLine(f"{side}: the tokenizer has no token for it")
    return ids
