"""Soft prompts, PEFT's and the same accelerated: in which settings each text's values are those of the text alone, and what a step and a token cost.

Right is what a small model of random weights gives for each text alone, unpadded, its prompt in front by concatenation. Times are of the Llama of
`small_llama.py` and 100 rows of prompt, in turn; half of a row's 128 tokens have no label.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastlora import memory
from fastlora.choice.clock import Run, time_in_turn

from .device import clock_of
from .goals import Goal
from .session import Line, Session, first_line, seconds_of
from .small_llama import ACCELERATED, ROWS, SECONDS, SIZES, TOKENS, TOLERANCE, base_model, make_batch, step, step_times
from .step import own_process, require_agreement

P, TEMPLATE, OWN = 100, 200, 60
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
FEW = 5  # rows of a small model's prompt
LENGTHS = (7, 11, 9)
RIGHT = 1e-3  # of the largest logit
LORA, EACH_ROW = "fastlora's LoRA r 16", "fastlora, each row"
TIMES_FASTER = {"prompt tuning": 1.8, "prefix tuning": 1.5, "P-tuning": 1.5}
OVER_LORA, SHARED_FASTER, SHARED_MEMORY, OVER_BARE = 1.25, 2.5, 0.5, 1.1


def _config(method: str, rows: int) -> Any:
    import peft

    given: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": rows}
    makers: dict[str, Callable[[], Any]] = {
        "prompt tuning": lambda: peft.PromptTuningConfig(**given),
        "P-tuning": lambda: peft.PromptEncoderConfig(**given, encoder_hidden_size=128),
        "multitask prompts": lambda: peft.MultitaskPromptTuningConfig(**given, num_tasks=3),
        "prefix tuning": lambda: peft.PrefixTuningConfig(**given),
        "cartridge": lambda: peft.CartridgeConfig(**given),
        "LoRA": lambda: peft.LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear"),
    }
    return makers[method]()


METHODS = ("prompt tuning", "P-tuning", "multitask prompts", "prefix tuning", "cartridge")


def _model(method: str, sizes: Mapping[str, Any], dtype: str, rows: int = P) -> Any:
    import peft

    base = base_model(sizes, dtype)
    torch.manual_seed(1)
    model: Any = peft.get_peft_model(base, _config(method, rows))
    return model.train()


class _Alone:
    """Three texts, and what a model gives for each alone, with its own prompt of two adapters', or of two tasks."""

    def __init__(self, model: Any, method: str) -> None:
        self.model, self.method = model, method
        drawn = torch.Generator().manual_seed(2)
        self.texts = [torch.randint(5, 95, (length,), generator=drawn) for length in LENGTHS]

    def tasks(self, own: bool) -> dict[str, Tensor]:
        return {"task_ids": torch.tensor([0, 1, 0] if own else [0, 0, 0])} if self.method == "multitask prompts" else {}

    def logits(self, row: int, text: Tensor, own: bool = False) -> Tensor:
        """[T, V], differentiable."""
        self.model.set_adapter("other" if own and not self.tasks(own) and row == 1 else "default")
        more = {name: value[row : row + 1] for name, value in self.tasks(own).items()}
        prompt = self.model.get_prompt(1, **more)
        self.model.set_adapter("default")
        base = self.model.base_model
        if not isinstance(prompt, Tensor):
            found: Tensor = base(input_ids=text[None], past_key_values=prompt).logits[0]
            return found
        embeds = torch.cat((prompt, self.model.word_embeddings(text[None])), 1)
        found = base(inputs_embeds=embeds, use_cache=False).logits[0, FEW:]
        return found

    def batch(self, left: bool) -> tuple[dict[str, Tensor], Tensor]:
        width = max(LENGTHS)
        pads = [(width - length, 0) if left else (0, width - length) for length in LENGTHS]
        ids, mask = (
            torch.stack([torch.nn.functional.pad(text, pad) for text, pad in zip(texts, pads, strict=True)])
            for texts in (self.texts, [torch.ones_like(text) for text in self.texts])
        )
        return {"input_ids": ids, "attention_mask": mask}, mask == 1

    def error(self, found: Tensor, own: bool = False) -> float:
        """Of the logits [N, V] of all texts' tokens, over the largest."""
        with torch.no_grad():
            expected = torch.cat([self.logits(row, text, own) for row, text in enumerate(self.texts)])
        return float((found - expected).abs().max() / expected.abs().max())


def _padded(model: Any, alone: _Alone, left: bool) -> float:
    given, real = alone.batch(left)
    return alone.error(model(**given, **alone.tasks(False)).logits[:, -max(LENGTHS) :][real])


def _packed(model: Any, alone: _Alone) -> float:
    ids, positions = torch.cat(alone.texts)[None], torch.cat([torch.arange(length) for length in LENGTHS])[None]
    more = {name: value[:1] for name, value in alone.tasks(False).items()}
    return alone.error(model(input_ids=ids, position_ids=positions, **more).logits[0, -ids.shape[1] :])


def _own_prompts(model: Any, alone: _Alone) -> float:
    given, real = alone.batch(left=False)
    names = {"adapter_names": ["default", "other", "default"]}
    more: dict[str, Any] = {**alone.tasks(True)} or names
    return alone.error(model(**given, **more).logits[:, -max(LENGTHS) :][real], own=True)


def _checkpointing(model: Any, alone: _Alone) -> float:
    """The gradient's error."""
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    try:
        given, real = alone.batch(left=False)
        model(**given, **alone.tasks(False)).logits[:, -max(LENGTHS) :][real].square().mean().backward()
    finally:
        model.gradient_checkpointing_disable()
    expected = torch.cat([alone.logits(row, text) for row, text in enumerate(alone.texts)]).square().mean()
    trained = [one for one in alone.model.prompt_encoder["default"].parameters() if one.requires_grad]
    grads = torch.autograd.grad(expected, trained)
    found = [one.grad for one in model.prompt_encoder["default"].parameters() if one.requires_grad]
    errors = [
        float("inf") if one is None else float((one - grad).abs().max()) for one, grad in zip(found, grads, strict=True)
    ]
    return max(errors) / max(float(grad.abs().max()) for grad in grads)


def _generation(model: Any, alone: _Alone) -> float:
    """The part of the texts whose answer is another."""
    given, _ = alone.batch(left=True)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    out = model.eval().generate(**given, **options, **alone.tasks(False))
    model.train()
    wrong = 0
    for row, text in enumerate(alone.texts):
        grown = text
        for _ in range(6):
            with torch.no_grad():
                grown = torch.cat((grown, alone.logits(row, grown)[-1:].argmax(-1)))
        wrong += out[row, max(LENGTHS) :].tolist() != grown[len(text) :].tolist()
    return wrong / len(alone.texts)


SETTINGS: dict[str, Callable[[Any, _Alone], float]] = {
    "padding at the right": partial(_padded, left=False),
    "padding at the left": partial(_padded, left=True),
    "packed texts": _packed,
    "a prompt for each row": _own_prompts,
    "gradient checkpointing": _checkpointing,
    "generation, padding at the left": _generation,
}


def _verdict(setting: str, model: Any, alone: _Alone) -> str:
    try:
        off = SETTINGS[setting](model, alone)
    except Exception as error:  # whatever it is, the other settings can do without this one
        return f"{type(error).__name__}: {first_line(error)[:60]}"
    return "" if off <= RIGHT else f"off by {off:.2g}"


def _settings(session: Session, method: str) -> Iterator[Goal]:
    import fastlora

    plain = _model(method, SMALL, "float32", FEW)
    if method != "multitask prompts":
        torch.manual_seed(3)
        plain.add_adapter("other", _config(method, FEW))
    wrong: dict[str, dict[str, str]] = {}
    for who in ("fastlora", "peft"):
        model = copy.deepcopy(plain)
        if who == "fastlora":
            fastlora.accelerate(model)
        verdicts = {setting: _verdict(setting, model, _Alone(copy.deepcopy(plain), method)) for setting in SETTINGS}
        wrong[who] = {setting: verdict for setting, verdict in verdicts.items() if verdict}
        for setting, verdict in wrong[who].items():
            session.notes.append(f"{method}, {who}, {setting}: {verdict}")
    count = len(SETTINGS)
    right = {who: count - len(some) for who, some in wrong.items()}
    yield Goal(
        f"settings of {count} that are right", method, "float32", count, right["fastlora"], right["peft"], at_least=True, unit="settings"
    )  # fmt: skip


def _steps(session: Session, method: str, dtype: str) -> Iterator[Goal]:
    import fastlora

    plain = _model(method, SIZES, dtype)
    models = {"peft": plain, "fastlora": fastlora.accelerate(copy.deepcopy(plain), **ACCELERATED)}
    batch = make_batch(SIZES["vocab_size"], TOKENS, TOKENS // 2)
    require_agreement({name: step(model, batch) for name, model in models.items()}, TOLERANCE[dtype], method)
    models[LORA] = fastlora.accelerate(_model("LoRA", SIZES, dtype), **ACCELERATED)
    times = step_times(session, models, batch)
    case = f"{ROWS} x {TOKENS} tokens, {P} rows of prompt"
    yield Goal(
        f"{method}: times PEFT's step's speed, {dtype}", case, dtype, TIMES_FASTER[method], 1 / times["fastlora"].ratio, 1.0,
        at_least=True, seconds=seconds_of(times),
    )  # fmt: skip
    goal = OVER_LORA if method == "prompt tuning" else None
    ours, theirs = (times[who].ratio / times[LORA].ratio for who in ("fastlora", "peft"))
    yield Goal(f"{method}: over {LORA}, {dtype}", case, dtype, goal, ours, theirs)


WAYS: dict[str, dict[str, bool] | None] = {
    "peft": None,
    "fastlora": {**ACCELERATED, "share_prefix": True},
    EACH_ROW: ACCELERATED,
}


def _lora(way: str, dtype: str) -> Any:
    import fastlora

    model, options = _model("LoRA", SIZES, dtype), WAYS[way]
    return model if options is None else fastlora.accelerate(model, **options)


def _template_batch() -> dict[str, Tensor]:
    return make_batch(SIZES["vocab_size"], TEMPLATE + OWN, TEMPLATE + OWN // 4, TEMPLATE)


def _bytes_of(way: str, dtype: str) -> int | None:
    """What two steps take beyond the model, in this process."""
    model, batch = _lora(way, dtype), _template_batch()
    before = memory.peak(torch.device("cpu"))
    for _ in range(2):
        step(model, batch)
    after = memory.peak(torch.device("cpu"))
    return None if before is None or after is None else after - before


def _shared(session: Session, dtype: str) -> Iterator[Goal]:
    batch = _template_batch()
    models = {way: _lora(way, dtype) for way in WAYS}
    require_agreement({way: step(model, batch) for way, model in models.items()}, TOLERANCE[dtype], "share_prefix")
    times = step_times(session, models, batch)
    case = f"{TEMPLATE} shared tokens, {ROWS} x {OWN} of their own"
    yield Goal(
        f"share_prefix, LoRA r 16: times PEFT's step's speed, {dtype}", case, dtype, SHARED_FASTER, 1 / times["fastlora"].ratio,
        1.0, at_least=True, seconds=seconds_of(times), rivals={EACH_ROW: 1 / times[EACH_ROW].ratio},
    )  # fmt: skip
    found: dict[str, int | None] = {}
    for way in WAYS:
        with own_process() as process:
            found[way] = process.submit(_bytes_of, way, dtype).result()
    if all(found.values()):
        parts = {way: some / found["peft"] for way, some in found.items()}  # type: ignore[operator]
        yield Goal(
            f"share_prefix, LoRA r 16: part of the memory beyond the model, {dtype}", case, dtype, SHARED_MEMORY, parts["fastlora"], 1.0,
            rivals={EACH_ROW: parts[EACH_ROW]},
        )  # fmt: skip


def _token(session: Session, dtype: str) -> Iterator[Goal]:
    """The first new token of one row of 32, and the bare model's with as many cached tokens as the prompt has rows."""
    from transformers import DynamicCache

    import fastlora

    plain = _model("prompt tuning", SIZES, dtype).eval()
    models = {"peft": plain, "fastlora": fastlora.accelerate(copy.deepcopy(plain)).eval()}
    bare = plain.base_model
    ids = torch.randint(5, SIZES["vocab_size"], (1, P + 32), generator=torch.Generator().manual_seed(5))
    options = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        known = bare(ids[:, :P], use_cache=True, past_key_values=DynamicCache()).past_key_values

    def with_cache(_: int) -> None:
        bare.generate(input_ids=ids, past_key_values=copy.deepcopy(known), **options)

    text = {"input_ids": ids[:, P:], "attention_mask": torch.ones_like(ids[:, P:])}

    def answer(_: int, model: Any) -> None:
        model.generate(**text, **options)

    runs: dict[str, Run] = {
        "bare": with_cache,
        **{name: partial(answer, model=model) for name, model in models.items()},
    }
    times = time_in_turn(runs, clock_of(session.device), SECONDS / 2)
    yield Goal(
        f"a new token over the bare model's behind a cache, {dtype}", f"{P} rows of prompt", dtype, OVER_BARE, times["fastlora"].ratio,
        times["peft"].ratio, seconds=seconds_of(times),
    )  # fmt: skip


def prompt_lines() -> dict[str, Line]:
    """The settings of each method, and what has a goal in each dtype, by their titles."""
    lines: dict[str, Line] = {f"settings, {method}": partial(_settings, method=method) for method in METHODS}
    for dtype in TOLERANCE:
        lines |= {f"a step, {method}, {dtype}": partial(_steps, method=method, dtype=dtype) for method in TIMES_FASTER}
        lines |= {f"what rows share, {dtype}": partial(_shared, dtype=dtype)}
        lines |= {f"a new token, {dtype}": partial(_token, dtype=dtype)}
    return lines
