"""What to train, on what, and how: every option is checked when a TrainConfig is made, before anything is read or written."""

import re
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from fastlora import schedules
from fastlora.adapters import LARGEST_RANK, is_number
from fastlora.data.examples import check_reading
from fastlora.data.mixture import Mixing, check_mixing
from fastlora.data.rows import Truncation, Turns, check_counting
from fastlora.data.sources import each, one_or_several
from fastlora.data.tasks import check_asking
from fastlora.metrics import MEASURED, SCORES
from fastlora.typed import check_fields, is_finite, shown

Method = Literal[
    "lora",
    "dora",
    "prompt",
    "prefix",
    "ptuning",
    "cartridge",
    "ia3",
    "adapter",
    "norm",
    "tokens",
    "bitfit",
    "full",
    "peft",
]
Dtype = Literal["auto", "float32", "bfloat16"]
TrainingDtype = Literal["auto", "float32", "bfloat16", "float16"]
Optim = Literal["adamw_torch_fused", "adamw_torch", "adafactor", "sgd"]
CombinationType = Literal[
    "linear",
    "cat",
    "svd",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_linear_svd",
    "dare_ties",
    "dare_ties_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
]
MajoritySignMethod = Literal["total", "frequency"]
PromptInit = Literal["RANDOM", "SAMPLE_VOCAB", "TEXT"]
InitLoraWeights = Literal["gaussian", "orthogonal", "olora", "pissa"]
NonLinearity = Literal["relu", "gelu", "swish", "tanh"]
DEFAULT_LR: dict[Method, float] = {
    **{"lora": 2e-4, "dora": 2e-4, "peft": 2e-4, "full": 2e-5},
    **{"prompt": 1e-2, "prefix": 1e-2, "ptuning": 1e-3, "cartridge": 1e-3},
    **{"ia3": 5e-3, "adapter": 3e-4, "norm": 1e-3, "tokens": 1e-3, "bitfit": 1e-3},
}
"""AdamW's; soft prompts and scales want far more than a matrix does (Lester et al. 2021 train a prompt at 0.3, with Adafactor)."""
DEFAULT_R = 16
RANKED: tuple[Method, ...] = ("lora", "dora")
PROMPTS: tuple[Method, ...] = ("prompt", "prefix", "ptuning", "cartridge")
WHOLE: tuple[Method, ...] = ("bitfit", "full")
"""What is saved as a model, not as an adapter: PEFT has no file for biases alone."""
UNQUANTISED: dict[Method, str] = dict.fromkeys(WHOLE, "it trains parameters of the base, and saves it as a model")
"""Why not."""
OPTIONS_OF: dict[str, tuple[Method, ...]] = {
    **dict.fromkeys(
        ("r", "lora_alpha", "lora_dropout", "use_rslora"), (*RANKED, "full")
    ),  # full has always taken them, and has no use for them
    "init_lora_weights": RANKED,
    "layers_to_transform": (*RANKED, "full"),
    "target_modules": (*RANKED, "ia3", "adapter", "norm"),
    **dict.fromkeys(("reduction_factor", "non_linearity", "is_parallel", "scaling"), ("adapter",)),
    "num_virtual_tokens": PROMPTS,
    **dict.fromkeys(("prompt_tuning_init", "prompt_tuning_init_text"), ("prompt",)),
    "prefix_projection": ("prefix",),
    "encoder_hidden_size": ("prefix", "ptuning"),
    "token_indices": ("tokens",),
    "peft_config": ("peft",),
    **dict.fromkeys(("loraplus_lr_ratio", "loraplus_lr_embedding"), (*RANKED, "peft")),
}
"""Whose option it is, where it is not everyone's."""
OF_VALIDATION = (
    *("eval_steps", "eval_on_start", "eval_generate", "eval_samples", "load_best_model_at_end"),
    *("metric_for_best_model", "greater_is_better", "early_stopping_patience", "early_stopping_threshold"),
)
"""Of no use without rows to measure on."""
MOST = 2**31 - 1  # of everything that is counted, bytes aside
SEEDS = 2**32  # numpy takes no larger one


def option(help: str, default: Any = MISSING, *, typed: Any = None) -> Any:
    """A field of TrainConfig, and an option of `fastlora train`.

    Args:
        help: what the command line says of it.
        typed: what is typed there, where the field takes something else, too.
    """
    return field(default=default, metadata={"help": help, "typed": typed})


@dataclass
class TrainConfig:
    """What to train, on what, and how; the names are PEFT's and transformers'. `fastlora train` makes its options of these fields.

    Raises:
        TypeError: an option is of another type than the one written here; the message names it.
        ValueError: an option is out of range; the message names it.
    """

    model: str | Path = option("Base model: a folder or a hub id.", typed=str)
    output: str | Path = option(
        "Folder for the adapter, metrics.jsonl, summary.json, report.html and checkpoints/.", typed=Path
    )
    data: str | Path | list[str] | None = option(
        "Rows: a JSONL, JSON, CSV, TSV or Parquet file, a folder or pattern of them, hf:OWNER/NAME:SPLIT, or a task's YAML; several are mixed.",
        None,
        typed=list[str],
    )
    eval_data: str | Path | list[str] | None = option(
        "Held-out rows of the same task, from where data may be, to measure on.", None, typed=list[str]
    )
    retain_data: str | Path | list[str] | None = option(
        "Rows of other tasks, as data but without columns: how much their loss rises is what is forgotten.",
        None,
        typed=list[str],
    )
    columns: dict[str, str] | None = option(
        "Which column is which field: prompt=question,completion=answer; #1 is a headless file's first.",
        None,
        typed=str,
    )
    max_samples: int | None = option("Take only the first so many rows of each of the data.", None)
    streaming: bool = option("Read the hub's data sets row by row, up to max_samples.", False)
    mixture: str | Path | None = option("YAML of tasks and how they are mixed, in place of data.", None, typed=Path)
    mixing: Mixing = option(
        "How often each of several data comes: by its rows, by a root of them, or by interleave_probs.", "proportional"
    )
    mixing_maximum: int | None = option("Rows that one counts as, at most: FLAN's cap is 3000.", None)
    mixing_temperature: float | None = option("Of mixing by temperature: the root; mT5's is 3.33.", None)
    interleave_probs: list[float] | None = option(
        "Of fixed mixing: a weight for each, numbers with commas.", None, typed=str
    )
    rehearse: float = option("Share of the rows that come from rehearse_data.", 0.0)
    rehearse_data: str | Path | None = option("What is rehearsed against forgetting, as data.", None, typed=Path)
    method: Method = option(
        "What is trained: an adapter (lora, dora, ia3; adapter: a bottleneck behind each sublayer), a soft prompt (prompt, prefix, ptuning,"
        " cartridge), a part of the model (norm, tokens, bitfit), the whole of it (full), or what peft_config says (peft).",
        "lora",
    )
    peft_config: str | Path | None = option(
        "A configuration of PEFT's, of any of its methods, as JSON, for method peft.", None, typed=Path
    )
    init_adapter: str | Path | None = option(
        "Folder of an adapter in PEFT's format, whose values and configuration (r, ...) are what is trained on.",
        None,
        typed=Path,
    )
    r: int = option("Rank of the adapter.", DEFAULT_R)
    lora_alpha: float = option("The update is scaled by lora_alpha / r.", 32)
    lora_dropout: float | None = option(
        "Dropout on the adapter's input. [default: 0.05 for lora; 0 for dora, where it takes a second product with the base]",
        None,
    )
    use_rslora: bool = option("Scale by lora_alpha / sqrt(r).", False)
    init_lora_weights: InitLoraWeights | None = option(
        "How A and B begin, as PEFT has it; olora and pissa take what they begin as out of the base. [default: B of zeros]",
        None,
    )
    layers_to_transform: list[int] | None = option(
        "Train in these blocks only, counted from 0: numbers with commas; of full, those blocks alone.", None, typed=str
    )
    target_modules: str | list[str] = option(  # as PEFT: a str is all-linear or a regular expression
        "all-linear, names with commas (q_proj,v_proj), or a regular expression.", "all-linear", typed=str
    )
    reduction_factor: int = option("The model's width over a bottleneck adapter's.", 16)
    non_linearity: NonLinearity = option("Of a bottleneck adapter.", "swish")
    is_parallel: bool = option("Put bottleneck adapters beside the MLPs, not behind attention and MLPs.", False)
    scaling: float | None = option("What they give is scaled by it. [default: 1, and 4 where they are parallel]", None)
    num_virtual_tokens: int = option("Length of a soft prompt, in tokens.", 20)
    prompt_tuning_init: PromptInit = option(
        "What a prompt begins as: RANDOM numbers, tokens drawn from the vocabulary, or those of a TEXT.", "SAMPLE_VOCAB"
    )
    prompt_tuning_init_text: str | None = option("That text.", None)
    prefix_projection: bool = option("Train a prefix by way of a small network, as Li and Liang 2021.", False)
    encoder_hidden_size: int | None = option("Width of that network, or of ptuning's. [default: the model's]", None)
    token_indices: list[int] | None = option(
        "Tokens whose embeddings are trained: numbers with commas.", None, typed=str
    )
    seed: int = option("For the adapter's first values, the order of the rows, and dropout.", 0)
    epochs: float = option("Times through the data; 0.5 is half of it.", 3)
    max_steps: int | None = option("Optimiser steps, in place of epochs.", None)
    batch_size: int = option("Rows a process takes at once.", 8)
    gradient_accumulation_steps: int = option("Batches an optimiser step.", 1)
    max_tokens: int | None = option(
        "Tokens a process runs at once, padding among them: a step of as many rows is cut into batches of no more, in place of batch_size's.",
        None,
    )
    packing: bool = option(
        "Lay a step's rows end to end, in lines of at most max_length tokens: one at once, or as many as max_tokens holds.",
        False,
    )
    group_by_length: bool = option("Let a step's rows have like lengths.", False)
    max_length: int = option("Tokens a row may have, or each side of an encoder-decoder's.", 512)
    truncation: Truncation = option(
        "What a longer row loses: its prompt's oldest tokens, its completion's end, or all.", "prompt"
    )
    train_on_turns: Turns = option(
        "Which of the assistant's turns count: all, the last, or auto: all where the chat template marks them, else the last.",
        "auto",
    )
    completion_only_loss: bool = option("Count what is answered, or the prompt as well.", True)
    lr: float | None = option(
        "Highest learning rate. [default: 2e-4 for lora, 2e-5 for full, more for what is smaller]", None
    )
    lr_scheduler_type: str = option("As transformers names them: linear, cosine, constant, ...", "linear")
    lr_scheduler_kwargs: str | schedules.Kwargs | None = option(
        "What the schedule is told: name=value with commas (min_lr_rate=0.1), or a JSON object.", None, typed=str
    )
    warmup_ratio: float = option("Part of the steps in which the learning rate rises.", 0.03)  # rounded up
    warmup_steps: int | None = option("Those steps, in place of warmup_ratio.", None)
    optim: Optim = option("What updates the weights, as transformers names it.", "adamw_torch_fused")
    weight_decay: float = option("Part of itself, times the learning rate, that a weight loses each step.", 0.0)
    adam_beta1: float = option("AdamW's, of the gradient's mean.", 0.9)
    adam_beta2: float = option("AdamW's, of its square's mean.", 0.999)
    adam_epsilon: float = option("AdamW's.", 1e-8)
    loraplus_lr_ratio: float | None = option("LoRA+: B's learning rate over A's, 16 say.", None)
    loraplus_lr_embedding: float = option("LoRA+: the learning rate of adapters on embeddings.", 1e-6)
    neftune_noise_alpha: float | None = option("NEFTune: noise on the embeddings, 5 say.", None)
    max_grad_norm: float = option("Longer gradients are cut to this norm. 0: never.", 1.0)
    dtype: TrainingDtype = option(  # "full" computes in it under autocast
        "auto: computes in bfloat16 on a GPU that has it, else in float32, and saves a whole model as its base is stored.",
        "auto",
    )
    attn_implementation: str | None = option(
        "What attention runs by, as transformers names it: eager, sdpa, flash_attention_2, ... [default: the model's]",
        None,
    )
    load_in_4bit: bool = option("Keep the base's linear layers in 4 bits (QLoRA: NF4, double quantisation).", False)
    load_in_8bit: bool = option("Keep the base's linear layers in int8.", False)
    gradient_checkpointing: bool = option("Compute activations twice to save memory.", False)
    fsdp: bool = option("Shard the frozen base over the processes (FSDP2); each has the whole adapter.", False)
    eval_steps: int | None = option("Steps between validations; the last step always has one.", None)
    eval_on_start: bool = option(
        "Measure before the first step, too, as retain_data and eval_samples always do.", False
    )
    eval_batch_size: int = option("Rows a process measures at once.", 8)
    eval_generate: bool = option("Also answer eval_data's prompts: exact match, ROUGE, F1 and accuracy.", False)
    eval_max_new_tokens: int = option("Length of such an answer, at most.", 64)
    eval_samples: int | None = option(
        "Rows of eval_data whose answers are kept in samples.jsonl. [default: 5 with eval_generate, else none]", None
    )
    load_best_model_at_end: bool = option(
        "Keep the checkpoint of the best validation, and leave its adapter or model, not the last step's.", False
    )
    metric_for_best_model: str | None = option(
        "What is best: eval_loss, eval_rouge1, eval_accuracy, retain_loss, ... [default: eval_loss]", None
    )
    greater_is_better: bool | None = option("Whether more of it is better. [default: as its name says]", None)
    early_stopping_patience: int | None = option("Stop after so many validations in a row that were no better.", None)
    early_stopping_threshold: float = option("By how much a validation must be better to count as such.", 0.0)
    save_total_limit: int = option("How many of the newest checkpoints are kept; the best one always is.", 2)
    save_steps: int = option("Steps between checkpoints: what a kill loses at most.", 50)
    resume: bool = option("Go on from the newest checkpoint; without one, start afresh.", False)
    resume_from: int | None = option("Go on from the checkpoint of this step; later ones are removed.", None)
    overwrite: bool = option("Replace what the output folder holds.", False)
    report_to: str | list[str] = option(
        "Where each step's figures go, too, by way of accelerate, with commas: tensorboard, wandb, ...",
        "none",
        typed=str,
    )
    run_name: str | None = option("What the run is called there. [default: the output folder's name]", None)
    accelerate: bool = option(
        "Run LoRA and frozen layers, norms, MLPs and attention by fastlora, or leave them to PEFT, transformers and torch.",
        True,
    )
    pack_budget: int | None = option(
        "Bytes for packed copies of frozen weights on a CPU, 0 for none. [default: 1/16 of its memory]", None
    )
    share_prefix: bool = option(
        "Run once a batch what its rows begin with: an instruction, or examples before a question. Of a causal model.",
        False,
    )
    compile: bool = option("Run the model's layers through torch.compile.", False)

    def __post_init__(self) -> None:
        for name in ("data", "eval_data", "retain_data"):
            setattr(self, name, one_or_several(getattr(self, name)))
        check_fields(self)
        for name in ("model", "output", "target_modules"):
            if not getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)!r} is empty")
        self._check_data()
        check_counting(self.train_on_turns, self.completion_only_loss)
        self._check_method()
        if self.lr is None:
            self.lr = DEFAULT_LR[self.method]
        if self.lora_dropout is None and self.method in OPTIONS_OF["lora_dropout"]:
            self.lora_dropout = 0.0 if self.method == "dora" else 0.05
        self._check_numbers()
        self._check_updates(self.lr)
        self._check_validation()
        if isinstance(self.target_modules, str):
            try:
                re.compile(self.target_modules)
            except re.error as error:
                raise ValueError(f"target_modules={self.target_modules!r}: no regular expression: {error}") from None
        if not 0 < self.epochs <= MOST:
            raise ValueError(f"epochs={shown(self.epochs)}: expected more than 0 and at most {MOST}")
        if self.run_name == "":
            raise ValueError("run_name='' is empty")
        if self.resume_from is not None:
            self.resume = True
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite exclude each other: expected one of them")
        if self.share_prefix and not self.accelerate:
            raise ValueError("share_prefix=True: expected accelerate=True, transformers has nothing like it")
        if self.fsdp and (self.method in WHOLE or self.bits is not None):
            what = f"method={self.method} trains it" if self.method in WHOLE else "this one is quantised"
            raise ValueError(f"fsdp=True shards a frozen base: {what}, expected none of that")
        if self.share_prefix and self.packing:
            raise ValueError(
                "packing and share_prefix exclude each other: what shares runs a batch as one line already, expected max_tokens beside it"
            )
        self.model = str(self.model)
        if Path(self.model).is_dir():
            self.model = str(Path(self.model).resolve())  # the adapter's files name it
        if self.init_adapter is not None:
            self.init_adapter = str(Path(self.init_adapter).resolve())  # a resumed run may begin in another folder
        if self.peft_config is not None:
            self.peft_config = str(Path(self.peft_config).resolve())

    @property
    def files(self) -> list[str]:
        """The sources of `data`, as text."""
        return each(self.data) if self.data is not None else []

    def _check_data(self) -> None:
        if (self.data is None) == (self.mixture is None):
            given = "data" if self.data is None else f"data={shown(self.data)}"
            raise ValueError(f"{given}: expected data or mixture, and not both")
        if self.data is not None:
            check_reading(self.data, self.columns, self.max_samples, self.streaming)
            check_asking(self.data, self.columns)
        elif self.columns is not None or self.max_samples is not None or self.streaming:
            given = next(name for name in ("columns", "max_samples", "streaming") if getattr(self, name))
            raise ValueError(f"{given}={shown(getattr(self, given))}: expected none beside mixture, whose tasks say it")
        check_mixing(self.mixing, self.mixing_maximum, self.mixing_temperature)
        mixed = self.mixing != "proportional" or self.mixing_maximum is not None
        if mixed and len(self.files) < 2:
            name = "mixing" if self.mixing != "proportional" else "mixing_maximum"
            raise ValueError(f"{name}={getattr(self, name)}: expected several data; of a mixture its file says it")
        if (self.mixing == "fixed") != (self.interleave_probs is not None):
            raise ValueError(f"mixing={self.mixing}: expected interleave_probs with fixed, and with no other")
        if not all(is_finite(one) and one > 0 for one in self.interleave_probs or ()):
            raise ValueError(f"interleave_probs={shown(self.interleave_probs)}: expected finite numbers above 0")
        if self.interleave_probs is not None and len(self.interleave_probs) != len(self.files):
            raise ValueError(
                f"interleave_probs={shown(self.interleave_probs)}: expected {len(self.files)}, one a file of data"
            )
        if not 0 <= self.rehearse < 1:
            raise ValueError(f"rehearse={shown(self.rehearse)}: expected a number from 0 to below 1")
        if bool(self.rehearse) != (self.rehearse_data is not None):
            raise ValueError(f"rehearse={self.rehearse}: expected above 0 with rehearse_data, and 0 without")

    def _check_method(self) -> None:
        for name, methods in OPTIONS_OF.items():
            value = getattr(self, name)
            if self.method not in methods and value != type(self).__dataclass_fields__[name].default:
                trains = "trains the whole model" if self.method == "full" else f"has no {name}"
                raise ValueError(f"{name}={shown(value)}: method={self.method} {trains}, expected none")
        if (self.prompt_tuning_init == "TEXT") != (self.prompt_tuning_init_text is not None):
            raise ValueError(
                f"prompt_tuning_init={self.prompt_tuning_init}: expected prompt_tuning_init_text with TEXT, and with no other"
            )
        for method, name in (("tokens", "token_indices"), ("peft", "peft_config")):
            if self.method == method and not getattr(self, name) and self.init_adapter is None:
                raise ValueError(f"{name}: method={method} needs one, got none")
        if self.init_adapter is not None and (self.method in WHOLE or self.peft_config is not None):
            other = f"method={self.method}" if self.method in WHOLE else f"peft_config={self.peft_config}"
            raise ValueError(
                f"init_adapter={self.init_adapter}: expected none beside {other}, it has a method of its own"
            )
        if self.layers_to_transform is not None and not all(number >= 0 for number in self.layers_to_transform or [-1]):
            raise ValueError(f"layers_to_transform={shown(self.layers_to_transform)}: expected blocks, 0 or more")
        if self.init_lora_weights in ("olora", "pissa") and self.bits is not None:
            raise ValueError(
                f"init_lora_weights={self.init_lora_weights}: it changes the base's weights, which are in {self.bits} bits"
            )
        if self.token_indices and not all(0 <= token <= MOST for token in self.token_indices):
            raise ValueError(f"token_indices={shown(self.token_indices)}: expected tokens, 0 or more")
        if self.encoder_hidden_size is not None and self.method == "prefix" and not self.prefix_projection:
            raise ValueError(
                f"encoder_hidden_size={self.encoder_hidden_size}: a prefix has one with prefix_projection only"
            )
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit exclude each other: expected one of them")
        for name in ("load_in_4bit", "load_in_8bit"):
            if getattr(self, name) and self.method in UNQUANTISED:
                raise ValueError(
                    f"{name}=True: method={self.method} takes no quantised base: {UNQUANTISED[self.method]}"
                )

    def _check_updates(self, lr: float) -> None:
        """What updates the weights."""
        if isinstance(self.lr_scheduler_kwargs, str):
            self.lr_scheduler_kwargs = schedules.parsed(self.lr_scheduler_kwargs)
        schedules.check(self.lr_scheduler_type, self.lr_scheduler_kwargs or {}, lr)
        for name in ("adam_beta1", "adam_beta2", "adam_epsilon"):
            value = getattr(self, name)
            if not self.optim.startswith("adamw") and value != type(self).__dataclass_fields__[name].default:
                raise ValueError(f"{name}={shown(value)}: optim={self.optim} has none, expected an AdamW")
        for name in ("adam_epsilon", "loraplus_lr_ratio", "loraplus_lr_embedding", "neftune_noise_alpha"):
            value = getattr(self, name)
            if value is not None and not (is_finite(value) and value > 0):
                raise ValueError(f"{name}={shown(value)}: expected a finite number above 0")
        default = type(self).__dataclass_fields__["loraplus_lr_embedding"].default
        if self.loraplus_lr_ratio is None and self.loraplus_lr_embedding != default:
            raise ValueError(f"loraplus_lr_embedding={self.loraplus_lr_embedding}: expected loraplus_lr_ratio as well")
        if self.neftune_noise_alpha is not None and self.share_prefix:
            raise ValueError("neftune_noise_alpha: expected no share_prefix, what rows share has one noise then")

    def _check_validation(self) -> None:
        for name in ("eval_data", "retain_data"):
            if getattr(self, name) in ("", []):
                raise ValueError(f"{name}={getattr(self, name)!r} is empty")
        measured = [name for name in ("eval_data", "retain_data") if getattr(self, name) is not None]
        for name in () if measured else OF_VALIDATION:
            if (value := getattr(self, name)) != type(self).__dataclass_fields__[name].default:
                raise ValueError(f"{name}={shown(value)}: expected eval_data or retain_data as well")
        for name in ("eval_generate", "eval_samples"):
            if (value := getattr(self, name)) and self.eval_data is None:
                raise ValueError(f"{name}={shown(value)}: expected eval_data as well")
        if self.early_stopping_patience is not None and self.eval_steps is None:
            raise ValueError(
                f"early_stopping_patience={self.early_stopping_patience}: expected eval_steps as well, without them"
                " there is one validation"
            )
        if self.early_stopping_threshold and self.early_stopping_patience is None:
            raise ValueError(
                f"early_stopping_threshold={self.early_stopping_threshold}: expected early_stopping_patience as well"
            )
        if measured and self.best_metric not in (known := self._metrics()):
            more = "" if self.eval_generate else ", and with eval_generate " + ", ".join(SCORES)
            raise ValueError(
                f"metric_for_best_model={shown(self.metric_for_best_model)}: expected one of {', '.join(known)}{more}"
            )

    def _metrics(self) -> list[str]:
        """What a validation measures, counts aside; accuracy only where the completions are labels."""
        losses = [
            name for name in MEASURED if (self.eval_data if name == "eval_loss" else self.retain_data) is not None
        ]
        return [*losses, *(SCORES if self.eval_generate else ())]

    @property
    def best_metric(self) -> str:
        """By what the best of several validations is chosen; as in transformers, a name may come without its `eval_`."""
        name = self.metric_for_best_model or ("retain_loss" if self.eval_data is None else "eval_loss")
        return name if name in (*MEASURED, *SCORES) else f"eval_{name}"

    @property
    def greater_is_best(self) -> bool:
        return self.best_metric in SCORES if self.greater_is_better is None else self.greater_is_better

    @property
    def bits(self) -> int | None:
        """Of an element of the base's linear layers, where they are quantised as they are loaded."""
        return 4 if self.load_in_4bit else 8 if self.load_in_8bit else None

    def _check_numbers(self) -> None:
        counts = (
            *("max_samples", "max_steps", "batch_size", "gradient_accumulation_steps"),
            *("max_tokens", "save_steps", "resume_from"),
            *("eval_steps", "eval_batch_size", "eval_max_new_tokens", "early_stopping_patience", "save_total_limit"),
        )
        allocated = ("r", "reduction_factor", "num_virtual_tokens", "encoder_hidden_size")
        for name in (*counts, *allocated, "max_length"):
            value, least = getattr(self, name), 2 if name == "max_length" else 1
            most = LARGEST_RANK if name in allocated else MOST
            if value is not None and not least <= value <= most:
                what = ", a token of the prompt and one of the completion" if name == "max_length" else ""
                wanted = f"at least {least}{what}" if value < least else f"at most {most}"
                raise ValueError(f"{name}={shown(value)}: expected {wanted}")
        if self.warmup_steps is not None and not 0 <= self.warmup_steps <= MOST:
            raise ValueError(f"warmup_steps={shown(self.warmup_steps)}: expected 0 to {MOST}")
        for name in ("lora_dropout", "warmup_ratio", "adam_beta1", "adam_beta2"):
            if not 0 <= (getattr(self, name) or 0.0) < 1:
                raise ValueError(f"{name}={shown(getattr(self, name))}: expected a number from 0 to below 1")
        for name in ("lr", "lora_alpha", "weight_decay", "max_grad_norm", "early_stopping_threshold"):
            if not (is_finite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name}={shown(getattr(self, name))}: expected a finite number, 0 or more")
        for name in ("lora_alpha", "scaling"):
            value = getattr(self, name)
            if value is not None and not is_number(value):
                raise ValueError(f"{name}={shown(value)}: expected a number that float32 holds")
        if self.eval_samples is not None and not 0 <= self.eval_samples <= MOST:
            raise ValueError(f"eval_samples={shown(self.eval_samples)}: expected 0 to {MOST}")
        if not 0 <= self.seed < SEEDS:
            raise ValueError(f"seed={shown(self.seed)}: expected 0 to {SEEDS - 1}")
        if self.pack_budget is not None and not 0 <= self.pack_budget < 2**63:
            raise ValueError(
                f"pack_budget={shown(self.pack_budget)}: expected a number of bytes, 0 for no packed copies"
            )


def as_train(name: str, *default: Any) -> Any:
    """The option of that name of `fastlora train`, for another command; with another default, if one is given."""
    one = next(one for one in fields(TrainConfig) if one.name == name)
    return option(one.metadata["help"], *(default or (one.default,)), typed=one.metadata["typed"])
