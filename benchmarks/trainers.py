"""Trainers by models by dtypes: each cell trains the same PEFT model twice, as it is and accelerated, and compares losses and adapters.

The trainers are transformers', TRL's, an accelerate loop and Lightning's, as their users call them, with `fastlora.accelerate` as the one line more.
Models are small ones of random weights that share the embedded base's tokenizer.
"""

import importlib
import importlib.util
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastlora
from fastlora.demo import BASE_MODEL
from fastlora.demo.tasks import generate

from .session import Line, Session
from .table import render

STEPS, ROWS = 4, 4
RATE = 1e-3
BOUNDS = {"float32": 1e-4, "bfloat16": 2e-2}  # of losses, relative
ADAPTERS = {"float32": 2e-2, "bfloat16": 0.5}
"""Of the adapters' change, by its norm. Adam divides by what is near zero, where the order of a sum decides on the sign."""
WANTED = {"Trainer": "transformers", "accelerate": "accelerate", "Lightning": "lightning"}
"""The packages of trainers that are not TRL's."""


@dataclass(frozen=True)
class Cell:
    """One trainer, model and dtype: how far the accelerated run is from the other."""

    trainer: str
    model: str
    dtype: str
    loss: float  # the largest relative distance of a step's loss
    adapter: float  # the distance of the trained adapters, relative to how far they moved
    fused: int  # LoRA layers that did not run PEFT's forward
    layers: int
    files_agree: bool  # both saved the same tensors, by name and shape

    @property
    def equal(self) -> bool:
        within = self.loss <= BOUNDS[self.dtype] and self.adapter <= ADAPTERS[self.dtype]
        return within and self.files_agree and 0 < self.fused == self.layers


def _small(**more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    return {**sizes, "num_key_value_heads": 2, "max_position_embeddings": 512, **more}


def _config(name: str, vocabulary: int) -> Any:
    transformers = importlib.import_module("transformers")
    same = {"vocab_size": vocabulary, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    if name == "gpt2":
        sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}
        return transformers.GPT2Config(**same, **sizes, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    if name == "t5":
        return transformers.T5Config(
            **{**same, "decoder_start_token_id": 0},
            d_model=64,
            d_kv=16,
            d_ff=96,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
        )
    kinds = {"llama": "LlamaConfig", "qwen3": "Qwen3Config", "gemma3": "Gemma3TextConfig", "mistral": "MistralConfig"}
    more = {"head_dim": 16} if name in ("qwen3", "gemma3") else {}
    return getattr(transformers, kinds[name])(**same, **_small(**more))


MODELS = ("llama", "qwen3", "gemma3", "mistral", "gpt2", "t5")
TARGETS = {"gpt2": ["c_attn", "c_proj", "c_fc"], "t5": ["q", "k", "v", "o", "wi", "wo"]}


def _model(name: str, vocabulary: int, dtype: str) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    torch.manual_seed(0)
    kind: Any = AutoModelForSeq2SeqLM if name == "t5" else AutoModelForCausalLM
    base = kind.from_config(_config(name, vocabulary), dtype=getattr(torch, dtype))
    task = "SEQ_2_SEQ_LM" if name == "t5" else "CAUSAL_LM"
    config = LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.0, target_modules=TARGETS.get(name, "all-linear"), task_type=task
    )
    model = get_peft_model(base, config)
    # PEFT's zeros would leave A without a gradient in the first step.
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def _texts() -> list[dict[str, str]]:
    drawn = generate("summarization", STEPS * ROWS, seed=0)
    return [{"prompt": one.prompt, "completion": one.completion} for one in drawn]


def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(BASE_MODEL)


def _batches(tokenizer: Any, seq2seq: bool) -> list[dict[str, Tensor]]:
    """The steps' batches: prompt and completion in one row, or the one in and the other out."""
    from fastlora.data.examples import Example
    from fastlora.data.rows import collate, encode, pad_token_id

    texts = _texts()
    if seq2seq:
        ask = tokenizer(
            [one["prompt"] for one in texts], return_tensors="pt", padding=True, truncation=True, max_length=128
        )
        answer = tokenizer([one["completion"] for one in texts], return_tensors="pt", padding=True)
        labels = answer["input_ids"].masked_fill(answer["attention_mask"] == 0, -100)
        whole = {"input_ids": ask["input_ids"], "attention_mask": ask["attention_mask"], "labels": labels}
        return [{name: value[i : i + ROWS] for name, value in whole.items()} for i in range(0, len(texts), ROWS)]
    rows = encode([Example(one["prompt"], one["completion"]) for one in texts], tokenizer, 256).rows
    return [collate(rows[i : i + ROWS], pad_token_id(tokenizer)) for i in range(0, len(rows), ROWS)]


def _package(name: str) -> Any:
    """One that not everybody has, and whose types are left aside."""
    return importlib.import_module(name)


Train = Callable[
    [Any, Any, str, Path, bool], list[float]
]  # model, tokenizer, dtype, folder, accelerated: each step's loss


def _arguments(folder: Path, dtype: str) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": ROWS,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": dtype == "bfloat16",
        "seed": 0,
    }


def _run(trainer: Any) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def _transformers(model: Any, tokenizer: Any, dtype: str, folder: Path, accelerated: bool) -> list[float]:
    transformers = _package("transformers")
    batches = _batches(tokenizer, model.config.is_encoder_decoder)  # of which a step takes one, in their order

    class InOrder(transformers.Trainer):  # type: ignore[name-defined]
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(batches)

    if accelerated:
        fastlora.accelerate(model, loss=not model.config.is_encoder_decoder, fuse=True)
    given = {**_arguments(folder, dtype), "per_device_train_batch_size": 1, "remove_unused_columns": False}
    arguments = transformers.TrainingArguments(**given, dataloader_pin_memory=False)
    return _run(InOrder(model, arguments, data_collator=lambda one: one[0], train_dataset=batches))


def _sft(model: Any, tokenizer: Any, dtype: str, folder: Path, accelerated: bool) -> list[float]:
    from datasets import Dataset

    trl = _package("trl")

    arguments = trl.SFTConfig(**_arguments(folder, dtype), max_length=256)
    trainer = trl.SFTTrainer(model, arguments, train_dataset=Dataset.from_list(_texts()), processing_class=tokenizer)
    if accelerated:
        fastlora.accelerate(trainer.model)
    return _run(trainer)


def _dpo(model: Any, tokenizer: Any, dtype: str, folder: Path, accelerated: bool) -> list[float]:
    from datasets import Dataset

    trl = _package("trl")

    texts = _texts()
    pairs = [
        {"prompt": one["prompt"], "chosen": one["completion"], "rejected": other["completion"]}
        for one, other in zip(texts, texts[1:] + texts[:1], strict=True)
    ]
    trainer = trl.DPOTrainer(
        model,
        args=trl.DPOConfig(**_arguments(folder, dtype), max_length=256),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
    )
    if accelerated:
        fastlora.accelerate(trainer.model)
    return _run(trainer)


def _grpo(model: Any, tokenizer: Any, dtype: str, folder: Path, accelerated: bool) -> list[float]:
    """The reward is how many letters e an answer has, which no answer of a random model escapes."""
    from datasets import Dataset

    trl = _package("trl")

    def letters(completions: Sequence[str], **_: Any) -> list[float]:
        return [float(one.count("e")) for one in completions]

    arguments = trl.GRPOConfig(**_arguments(folder, dtype), num_generations=ROWS, max_completion_length=8)
    trainer = trl.GRPOTrainer(
        model,
        letters,
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": one["prompt"]} for one in _texts()]),
        processing_class=tokenizer,
    )
    if accelerated:
        fastlora.accelerate(trainer.model)
    return _run(trainer)


def _accelerate(model: Any, tokenizer: Any, dtype: str, folder: Path, accelerated: bool) -> list[float]:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # it is the process's, and has one precision
    if accelerated:
        fastlora.accelerate(model, loss=not model.config.is_encoder_decoder, fuse=True)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if dtype == "bfloat16" else "no")
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=RATE)
    prepared, optimizer = accelerator.prepare(model.train(), optimizer)
    losses = []
    for batch in _batches(tokenizer, model.config.is_encoder_decoder):
        loss = prepared(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _lightning(model: Any, tokenizer: Any, dtype: str, folder: Path, accelerated: bool) -> list[float]:
    lightning = _package("lightning")

    if accelerated:
        fastlora.accelerate(model, loss=not model.config.is_encoder_decoder, fuse=True)
    losses: list[float] = []

    class Module(lightning.LightningModule):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = model.train()

        def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
            loss: Tensor = self.model(**batch).loss
            losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW((p for p in self.model.parameters() if p.requires_grad), lr=RATE)

    trainer = lightning.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        precision="bf16-mixed" if dtype == "bfloat16" else "32-true",
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches: Any = _batches(tokenizer, model.config.is_encoder_decoder)
    trainer.fit(Module(), torch.utils.data.DataLoader(batches, batch_size=None))
    return losses


TRAINERS: dict[str, Train] = {
    "Trainer": _transformers,
    "SFTTrainer": _sft,
    "DPOTrainer": _dpo,
    "GRPOTrainer": _grpo,
    "accelerate": _accelerate,
    "Lightning": _lightning,
}
CAUSAL_ONLY = ("SFTTrainer", "DPOTrainer", "GRPOTrainer")


def is_installed(trainer: str) -> bool:
    return importlib.util.find_spec(WANTED.get(trainer, "trl")) is not None


def cells() -> Iterator[tuple[str, str, str]]:
    """Trainer, model and dtype of every cell that there is."""
    for trainer in TRAINERS:
        for model in MODELS:
            if model == "t5" and trainer in CAUSAL_ONLY:
                continue
            yield from ((trainer, model, dtype) for dtype in BOUNDS)


def _trained(
    trainer: str, name: str, dtype: str, folder: Path, accelerated: bool
) -> tuple[list[float], Any, dict[str, Tensor]]:
    tokenizer = _tokenizer()
    model = _model(name, len(tokenizer), dtype)
    start = {key: value.detach().float().clone() for key, value in model.named_parameters() if "lora_" in key}
    torch.manual_seed(0)
    losses = TRAINERS[trainer](model, tokenizer, dtype, folder, accelerated)
    model.save_pretrained(folder)
    moved = {key: value.detach().float() - start[key] for key, value in model.named_parameters() if key in start}
    return losses, model, moved


def compare(trainer: str, name: str, dtype: str) -> Cell:
    """Train twice, and say how far the one is from the other.

    Args:
        trainer, name, dtype: of TRAINERS, MODELS and BOUNDS.
    """
    import safetensors.torch

    with tempfile.TemporaryDirectory() as place:
        folders = [Path(place) / side for side in ("plain", "accelerated")]
        runs = [_trained(trainer, name, dtype, folder, folder.name == "accelerated") for folder in folders]
        saved = [safetensors.torch.load_file(folder / "adapter_model.safetensors") for folder in folders]
    (expected, _, moved), (got, model, ours) = runs
    loss = max(abs(a - b) / max(abs(b), 1e-2) for a, b in zip(got, expected, strict=True))
    far = sum(float((ours[key] - moved[key]).square().sum()) for key in moved) ** 0.5
    whole = sum(float(one.square().sum()) for one in moved.values()) ** 0.5
    layers = {key for key, module in model.named_modules() if hasattr(module, "lora_A")}
    shapes = [{key: (value.shape, value.dtype) for key, value in one.items()} for one in saved]
    fused = sum(line.name in layers and line.implementation != "peft" for line in fastlora.report(model))
    return Cell(trainer, name, dtype, loss, far / whole, fused, len(layers), shapes[0] == shapes[1])


def _line(_: Session, trainer: str, model: str, dtype: str) -> Iterator[Cell]:
    yield compare(trainer, model, dtype)


def trainer_lines(quick: bool) -> dict[str, Line]:
    """A line a cell whose trainer is installed; quick: those of Llama in float32."""
    return {
        f"{trainer}, {model}, {dtype}": partial(_line, trainer=trainer, model=model, dtype=dtype)
        for trainer, model, dtype in cells()
        if is_installed(trainer) and (not quick or (model, dtype) == ("llama", "float32"))
    }


def trainers_table(found: Sequence[Cell], notes: Sequence[str]) -> str:
    """For people."""
    heads = ("trainer", "model", "numbers", "loss", "adapter", "accelerated", "files", "equal")
    rows = [
        (one.trainer, one.model, one.dtype, f"{one.loss:.0e}", f"{one.adapter:.0e}", f"{one.fused} of {one.layers}")
        + ("agree" if one.files_agree else "differ", "yes" if one.equal else "NO")
        for one in found
    ]
    legend = (
        f"{STEPS} steps with and without fastlora.accelerate: the largest relative distance of a loss, that of the trained adapters from one another"
        f" over how far they moved, and the LoRA layers that ran fastlora's operators; equal: within {BOUNDS} and {ADAPTERS}"
    )
    verdict = f"{sum(one.equal for one in found)} of {len(found)} cells are equal"
    return "\n".join([legend, "", render(heads, rows), "", verdict, *notes])
