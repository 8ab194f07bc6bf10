"""The command line: `fastlora train | compare | sweep | eval | generate | serve | merge | receipt | adapters | bench | tune | env | demo`.

Every command is a thin call of the function of the same name; what is slow to import is imported inside, so that --help
is quick. Exit codes: 0 done, 1 training went wrong, 2 wrong options or data, 130 interrupted. An expected error is one
plain message; FASTLORA_TRACEBACK=1 shows where it came from.
"""

import functools
import inspect
import json
import logging
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, Field, asdict, fields
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperCommand
from typer.main import get_command

from fastlora import __version__
from fastlora.comparison import Comparison
from fastlora.config import CombinationType, Dtype, MajoritySignMethod, TrainConfig
from fastlora.data.rows import Truncation, Turns
from fastlora.options import Given, hint, own_name, read
from fastlora.sweep.jobs import Sweep
from fastlora.typed import shown


def _own_name(name: str) -> str:
    """An option's own name, with dashes, for what is typed after `--`: underscores are dashes, and others' names for it are its own (options.py).

    What is no option, as the value of a choice, stays as it is: typer asks for those, too.
    """
    own = own_name(name, _all_options())
    return own.replace("_", "-") if own in _all_options() else name


@functools.cache
def _all_options() -> frozenset[str]:
    """Of all commands, as they are spelt, with underscores."""
    commands: Any = get_command(app)
    return frozenset(name for one in commands.commands.values() for name in _by_spelling(one))


def _by_spelling(command: Any) -> dict[str, str]:
    """The parameters of a command by how their options are spelt, with underscores."""
    long = {option.opts[0].removeprefix("--").replace("-", "_"): option.name for option in command.params}
    return {spelt: name for spelt, name in long.items() if name not in ("config", "help")}


app = typer.Typer(
    help="Fused kernels for parameter-efficient fine-tuning: train an adapter, measure it, use it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich's tables cut long options off
    context_settings={"help_option_names": ["-h", "--help"], "token_normalize_func": _own_name},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"fastlora {__version__}")
        raise typer.Exit()


def _option(field: Field[Any]) -> Any:
    # What is False unless asked for has no --no-.
    flag = [f"--{field.name.replace('_', '-')}"] if field.default is False else []
    return typer.Option(*flag, help=field.metadata["help"])


class _Command(TyperCommand):
    """Says of an option that there is not which one may have been meant, by whatever program's name, and which may be given several times."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        for option in self.get_params(ctx):
            several: Any = option
            if getattr(option, "multiple", False) and several.metavar is None:
                several.metavar = re.sub(r"^<list\[(.*)\]>$", r"<\1>...", str(several.display_type(ctx)).lower())
        super().format_options(ctx, formatter)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            if hasattr(error, "possibilities"):  # typer does not export its NoSuchOption
                unknown: Any = error
                unknown.message += hint(
                    unknown.option_name, _by_spelling(self), lambda one: f"--{one.replace('_', '-')}"
                )
                unknown.possibilities = None
            raise


OPTIONS = {field.name: _option(field) for field in fields(TrainConfig)}
"""Those of `fastlora train`, some of which other commands have, too."""

OptionalModelOption = Annotated[
    str | None, typer.Option(help="Base model: a folder or a hub id. Without it, the one the adapter names.")
]
DtypeOption = Annotated[Dtype, typer.Option(help="auto: bfloat16 on a GPU that computes in it, else float32.")]
AllowMissingOption = Annotated[
    bool, typer.Option("--allow-missing", help="Take an adapter that lacks tensors: those are as PEFT begins.")
]
AllowNoopOption = Annotated[bool, typer.Option("--allow-noop", help="Take an adapter that changes nothing.")]
NewTokensOption = Annotated[int, typer.Option(min=1, help="Length of an answer, at most.")]
BatchOption = Annotated[int, typer.Option(min=1, help="Rows a batch.")]


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Enter a function as a command whose expected errors end in one plain message and an exit code."""

    name = function.__name__.removesuffix("_")
    messages, handler = logging.getLogger("fastlora"), _Messages()

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        messages.addHandler(handler)
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _say
                function(*args, **kwargs)
        except KeyboardInterrupt as interrupt:
            _fail(name, _as_options(str(interrupt)) or "interrupted", 130)
        except Exception as error:
            code = _exit_code(error)
            if code is None or os.environ.get("FASTLORA_TRACEBACK"):
                raise
            _fail(name, _message(error), code)
        finally:
            messages.removeHandler(handler)

    return app.command(name, cls=_Command, short_help=function.__doc__)(run)  # typer cuts what it takes itself


def _read_config(context: typer.Context, path: Path | None) -> Given | None:
    """The options in a file, which a command then needs no more on the command line."""
    if path is None:
        return None
    spelt = _by_spelling(context.command)
    try:
        given = read(path, spelt)
    except (OSError, ValueError) as error:
        _fail(str(context.info_name), _as_options(" ".join(str(error).split())), 2)
    for option in context.command.params:
        if option.name in {spelt[name] for name in given.values}:
            option.required = False
    return given


def configured(function: Callable[..., None]) -> Callable[..., None]:
    """For a command: its options may come from a file, --config; what is typed overrides that."""
    parameters = inspect.signature(function, eval_str=True).parameters.values()
    annotation = Annotated[
        Path | None,
        typer.Option(
            callback=_read_config,
            is_eager=True,
            help="A file of these options, YAML, JSON or TOML; those on the command line override it.",
        ),
    ]
    of_file = inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
    of_context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    keyword = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in parameters]

    @functools.wraps(function)
    def run(*, context: typer.Context, config: Given | None, **typed: Any) -> None:
        if config is None:
            return function(**typed)
        spelt = _by_spelling(context.command)
        own = {spelt[name]: name for name in config.values}
        of_files = {name for name in own if not _is_typed(context, name)}
        try:
            function(**typed | {name: config.values[own[name]] for name in of_files})
        except (TypeError, ValueError) as error:
            name = re.match(r"\w*", str(error))[0]  # type: ignore[index]
            if type(error) not in (TypeError, ValueError) or name not in of_files:
                raise
            raise type(error)(f"{config.where(own[name])}: {error}") from error

    vars(run)["__signature__"] = inspect.Signature([*keyword, of_file, of_context])
    return run


def _is_typed(context: typer.Context, name: str) -> bool:
    """Whether an option stands on the command line."""
    source: Any = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _exit_code(error: Exception) -> int | None:
    """2 for wrong options, data or files, 1 for what went wrong underway; None for what nobody expects, which keeps its traceback."""
    from safetensors import SafetensorError

    from fastlora.choice.measure import is_out_of_memory
    from fastlora.ops import ImplementationError

    expected = (ValueError, TypeError, OSError, ImportError, ImplementationError, SafetensorError)
    # pathlib's RuntimeError, an OSError from Python 3.13 on
    if isinstance(error, expected) or str(error).startswith("Symlink loop"):
        return 2
    ours = type(error).__module__.partition(".")[0] == "fastlora"
    return 1 if ours or is_out_of_memory(error) else None


def _fail(name: str, message: str, code: int) -> None:
    print(f"fastlora {name}: {message}", file=sys.stderr)
    raise typer.Exit(code)


def _message(error: Exception) -> str:
    """The error's own words; hub and file errors spread theirs over many lines, only data errors with reason."""
    from fastlora.choice.measure import is_out_of_memory
    from fastlora.data.examples import DataError

    text = str(error) or type(error).__name__
    if is_out_of_memory(error):
        text = f"out of memory: fewer rows a batch, shorter rows or a smaller r need less ({text})"
    return _as_options(text if isinstance(error, DataError) else " ".join(text.split()))


def _as_options(text: str) -> str:
    """A message of the library, which names its arguments, in the words of the command line: name=True is --name, name=X is --name X."""
    commands: Any = get_command(app)
    options = {option.name: option.opts[0] for one in commands.commands.values() for option in one.params}
    name = f"({'|'.join(options)})"
    text = re.sub(rf"^{name}(?=: )", lambda found: options[found[1]], text)
    text = re.sub(rf"(?<![\w/.-]){name}=True\b", lambda found: options[found[1]], text)
    return re.sub(rf"(?<![\w/.-]){name}=(?=\S)", lambda found: f"{options[found[1]]} ", text)


class _Messages(logging.Handler):
    """The library's warnings, each as one plain line."""

    def emit(self, record: logging.LogRecord) -> None:
        _say(record.getMessage())


def _say(message: Warning | str, *_: Any, **__: Any) -> None:
    """A message on one line; a warning's without the line of source that raised it."""
    print(_as_options(" ".join(str(message).split())), file=sys.stderr)


def _quiet() -> None:
    """Silence what other packages say while they are imported, and transformers' bars. Warnings stay: that a weight is missing, say."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    # PEFT fears for the merging of tied weights, which `fastlora merge` unties.
    warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
    # And for names such as `lora`, which its own loading takes for parts of keys: fastlora's puts each tensor where it belongs.
    warnings.filterwarnings("ignore", message="Adapter name '.*' should not be contained in the prefix")
    # It asks a norm, which method=norm trains, for a width that it has not.
    warnings.filterwarnings("ignore", message="Unsupported layer type '<class '[^']*Norm'>' encountered")
    logging.disable(logging.WARNING)
    try:
        import peft  # noqa: F401  (brings in bitsandbytes, where there is one)
        import transformers.modeling_utils  # noqa: F401  (and torchao, and kernels)
    finally:
        logging.disable(logging.NOTSET)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def begin_process() -> None:
    """What a process of a command's begins with, to speak as the command does."""
    _quiet()
    warnings.showwarning = _say
    logging.getLogger("fastlora").addHandler(_Messages())


@app.callback()
def fastlora(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Fused kernels for parameter-efficient fine-tuning: train an adapter, measure it, use it."""


def _with_options_of(config: type, *more: inspect.Parameter) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """For a function that takes a dataclass's fields, and more: as typer reads it."""
    parameters, hints = [], get_type_hints(config)
    for field in fields(config):
        kind = field.metadata["typed"] or hints[field.name]
        default = inspect.Parameter.empty if field.default is MISSING else field.default
        annotation = Annotated[kind, _option(field)]  # type: ignore[valid-type]
        parameters.append(
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        )

    def with_options(function: Callable[..., None]) -> Callable[..., None]:
        vars(function)["__signature__"] = inspect.Signature([*parameters, *more])
        return function

    return with_options


DRY_RUN = inspect.Parameter(
    "dry_run",
    inspect.Parameter.KEYWORD_ONLY,
    default=False,
    annotation=Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Only say what would be trained, in how much memory, on what rows; nothing is written."
        ),
    ],
)


@command
@configured
@_with_options_of(TrainConfig, DRY_RUN)
def train(**options: Any) -> None:
    """Train an adapter, a part of a model or the whole of it, on prompts and completions or messages."""
    _quiet()
    from fastlora.planning import Plan, plan
    from fastlora.train import train

    _parse_data(options)
    options["target_modules"] = _module_names(options["target_modules"])
    for name in ("token_indices", "layers_to_transform"):
        options[name] = _numbers(name, options[name], int)
    options["interleave_probs"] = _numbers("interleave_probs", options["interleave_probs"], float)
    dry_run, config = options.pop("dry_run"), TrainConfig(**options)
    result = plan(config) if dry_run else train(config)
    if os.environ.get("RANK", "0") == "0":  # one summary, however many processes torchrun started
        print(result) if isinstance(result, Plan) else _print_values("fastlora train", asdict(result))


def _parse_data(options: dict[str, Any]) -> None:
    """Where rows come from, as the library has it: one source is no list, and columns are a dict."""
    from fastlora.data.examples import parse_columns
    from fastlora.data.sources import one_or_several

    for name in {"data", "eval_data", "test_data", "retain_data"} & options.keys():
        _require_sources(name, options[name])
        options[name] = one_or_several(options[name]) or None
    if isinstance(options["columns"], str):
        options["columns"] = parse_columns(options["columns"])


def _require_sources(name: str, given: Any) -> None:
    """Raise ValueError for data sets as axolotl's files have them, an object with a path and a type each."""
    from fastlora.data.sources import HUB, of_hub

    for one in given if isinstance(given, list) else [given]:
        if isinstance(one, dict):
            path = one.get("path")
            here = f", here {HUB * (of_hub(path) and not os.path.exists(path))}{path}" if isinstance(path, str) else ""
            raise ValueError(
                f"{name}={shown(one)}: expected FILE or {HUB}OWNER/NAME:CONFIG:SPLIT{here}, or a list of such;"
                " what format a row has, its fields say"
            )


def _numbers(name: str, text: Any, kind: Callable[[str], Any]) -> Any:
    """Numbers with commas, as a list; what a file has in their place as it is, but for a single number.

    Raises:
        ValueError: a part is none; the message names the option.
    """
    if not isinstance(text, str):
        return [text] if isinstance(text, int | float) else text
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{name}={text!r}: expected numbers with commas") from None


def _module_names(text: Any) -> Any:
    """As PEFT takes them: all-linear or a regular expression is a str, names are a list. What a file has in their place, as it is."""
    if not isinstance(text, str):
        return text
    if re.search(r"[][*+?(){}|^$\\]", text):  # no module's name has one of these
        return text
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise ValueError(f"target_modules={text!r} has an empty name: expected all-linear or module names with commas")
    return "all-linear" if names in (["all-linear"], ["all"]) else names  # LLaMA-Factory's all


@command
@configured
@_with_options_of(Comparison)
def compare(**options: Any) -> None:
    """Train several methods with one budget each, and tell them apart: quality, forgetting, size, memory, speed."""
    _quiet()
    from fastlora.comparison import compare, failures, rows

    _parse_data(options)
    if isinstance(options["methods"], str):
        options["methods"] = [name.strip() for name in options["methods"].split(",")]
    options["target_modules"] = _module_names(options["target_modules"])
    for name, kind in (("r", int), ("lr", float), ("lr_factors", float), ("token_indices", int)):
        options[name] = _numbers(name, options[name], kind)
    given = Comparison(**options)
    found = list(rows(compare(given, begin_process), failures(given)))
    _print_table([list(row.values()) for row in found], headings=list(found[0]), title="fastlora compare")
    told = ", with its figures on test_data" if given.test_data else ""
    print(
        f"written to {Path(given.output) / 'compare.json'}; of each method's rates the best on eval_data is shown{told}"
    )


@command
@configured
@_with_options_of(Sweep)
def sweep(**options: Any) -> None:
    """Train many LoRA adapters in one run over one frozen base: ranks, rates, seeds, layers; and name the best."""
    _quiet()
    from fastlora.sweep.outcome import best, rows
    from fastlora.sweep.run import sweep

    _parse_data(options)
    for name, kind in (("r", int), ("lr", float), ("lora_alpha", float), ("lora_dropout", float), ("seed", int)):
        options[name] = _numbers(name, options[name], kind)
    if isinstance(options["target_modules"], str):
        options["target_modules"] = [_module_names(one.strip()) for one in options["target_modules"].split(";")]
    given = Sweep(**options)
    outcomes = sweep(given)
    found = rows(outcomes, best(outcomes))
    _print_table([list(row.values()) for row in found], headings=list(found[0]), title="fastlora sweep")
    for data, one in best(outcomes).items():
        print(f"* {one.name} is the best by {data}: {one.output}")
    print(f"written to {Path(given.output) / 'sweep.json'} and sweep.html")


@command
@configured
def eval_(
    data: Annotated[list[str], typer.Option(help="Rows, as of train.")],
    columns: Annotated[str | None, OPTIONS["columns"]] = None,
    model: OptionalModelOption = None,
    adapter: Annotated[
        Path | None, typer.Option(help="Adapter folder; without one the base model is measured.")
    ] = None,
    batch_size: BatchOption = 8,
    max_length: Annotated[int, OPTIONS["max_length"]] = 512,
    truncation: Annotated[Truncation, OPTIONS["truncation"]] = "prompt",
    train_on_turns: Annotated[Turns, OPTIONS["train_on_turns"]] = "auto",
    completion_only_loss: Annotated[bool, OPTIONS["completion_only_loss"]] = True,
    max_new_tokens: NewTokensOption = 64,
    generations: Annotated[
        bool, typer.Option(help="Also let the model answer: exact match, ROUGE, F1, accuracy.")
    ] = True,
    limit: Annotated[int | None, typer.Option(min=1, help="Take only the first so many rows.")] = None,
    dtype: DtypeOption = "auto",
    allow_missing: AllowMissingOption = False,
    allow_noop: AllowNoopOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object in place of the table.")] = False,
) -> None:
    """Held-out loss, perplexity, exact match, ROUGE, F1 and accuracy."""
    _quiet()
    from fastlora.data.examples import parse_columns, read_examples
    from fastlora.data.sources import each
    from fastlora.data.tasks import check_asking, is_task
    from fastlora.evaluation import evaluate
    from fastlora.models import load_model

    named = parse_columns(columns) if isinstance(columns, str) else columns  # a file has a mapping
    check_asking(data, named)
    # Bad lines are reported before anything is loaded, but for a task's, which the tokenizer counts.
    rows: Any = data if any(map(is_task, each(data))) else read_examples(data, columns=named)
    loaded, tokenizer = load_model(
        model,
        {"default": adapter} if adapter else {},
        dtype=dtype,
        allow_missing=allow_missing,
        allow_noop=allow_noop,
    )
    result = evaluate(
        loaded,
        tokenizer,
        rows,
        columns=named,
        batch_size=batch_size,
        max_length=max_length,
        truncation=truncation,
        train_on_turns=train_on_turns,
        completion_only_loss=completion_only_loss,
        max_new_tokens=max_new_tokens,
        generations=generations,
        limit=limit,
    )
    if generations and result.rouge1 is None:
        print("ROUGE was not measured: the package rouge-score is missing (pip install rouge-score)", file=sys.stderr)
    if as_json:
        print(json.dumps(asdict(result)))
    else:
        _print_values("fastlora eval", {**asdict(result), "rows": f"{result.rows:,}, the same for every figure"})


@command
def generate(
    prompt: Annotated[list[str] | None, typer.Option(help="Text to answer; may be given several times.")] = None,
    data: Annotated[list[str] | None, typer.Option(help="Take the prompts of these rows; a task's YAML, too.")] = None,
    columns: Annotated[str | None, OPTIONS["columns"]] = None,
    model: OptionalModelOption = None,
    adapter: Annotated[
        list[str] | None, typer.Option(help="Adapter folder, or name=folder; may be given several times.")
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            help="Send each prompt through the chat template, as the user's message. [default: where training did]"
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="What the system's message before it says, with --chat.")] = None,
    max_new_tokens: NewTokensOption = 64,
    temperature: Annotated[float, typer.Option(help="Of the tokens' chances; 0: the likeliest is taken.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens of this chance together.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Draw from so many likeliest tokens; 0: from all.")] = 0,
    num_beams: Annotated[int, typer.Option(help="Answers that are followed at once.")] = 1,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: what has been said is less likely.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the tokens that are drawn.")] = 0,
    max_length: Annotated[
        int | None,
        typer.Option(
            help="Tokens of a prompt and its answer; the prompt's oldest go. [default: the model's positions]"
        ),
    ] = None,
    batch_size: BatchOption = 8,
    dtype: DtypeOption = "auto",
    allow_missing: AllowMissingOption = False,
    allow_noop: AllowNoopOption = False,
) -> None:
    """Answers; with several adapters, each one's, swapped on one base."""
    _quiet()
    from fastlora.data.examples import Prompt, parse_columns
    from fastlora.data.rows import row_length
    from fastlora.data.tasks import read_rows
    from fastlora.generation import Sampling, generate
    from fastlora.models import load_model, positions
    from fastlora.summary import is_of_chat

    sampling = Sampling(temperature, top_p, top_k, num_beams, repetition_penalty, seed)
    if bool(prompt) == bool(data):
        raise ValueError("expected either --prompt or --data")
    if columns is not None and not data:
        raise ValueError(f"columns={columns!r}: expected data, a prompt has none")
    named = None if columns is None else parse_columns(columns)
    adapters = _named_adapters(adapter or [])
    loaded, tokenizer = load_model(model, adapters, dtype=dtype, allow_missing=allow_missing, allow_noop=allow_noop)
    prompts: list[Prompt] = list(prompt or [])
    if data:
        length = row_length(tokenizer, loaded.config.is_encoder_decoder)
        examples = read_rows(data, columns=named, length=length, max_tokens=max_length or positions(loaded))
        if any(example.tools or example.prompt == "" for example in examples):
            raise ValueError(
                "data: rows of plain text have no prompt, and those with tools are for training and eval alone"
            )
        prompts = [example.prompt for example in examples]
    if chat is None:
        trained_on = [is_of_chat(folder) for folder in (adapters.values() if adapters else [Path(model or "")])]
        chat = any(trained_on)
        if chat and not all(trained_on):
            raise ValueError(
                "chat: some of the adapters were trained on conversations, and some not: expected --chat or --no-chat"
            )
        if chat and any(isinstance(text, str) for text in prompts):
            _say("trained on conversations: each prompt is a user's message (--no-chat: as it is)")
    if system is not None and not chat:
        raise ValueError(f"system={system!r}: expected chat as well, a bare prompt has no system's message")
    if chat:
        before = [] if system is None else [{"role": "system", "content": system}]
        prompts = [[*before, {"role": "user", "content": text}] if isinstance(text, str) else text for text in prompts]
    names: list[str | None] = [*adapters] or [None]
    answers = [
        generate(
            loaded,
            tokenizer,
            prompts,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            max_length=max_length,
            adapter_name=name,
            sampling=sampling,
        )
        for name in names
    ]
    for position, text in enumerate(prompts):
        print(f"> {text if isinstance(text, str) else text[-1].get('content', '')}")
        for name, texts in zip(names, answers, strict=True):
            print(f"{name}: {texts[position].strip()}" if name else texts[position].strip())


@command
def serve(
    model: Annotated[str, typer.Option(help="Base model: a folder or a hub id.")],
    adapters: Annotated[
        Path | None,
        typer.Option(help="Folder of adapter folders, each served by its own name. [default: the base alone]"),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="On 127.0.0.1; 0: any that is free.")] = 8000,
    max_rows: Annotated[int, typer.Option(min=1, help="Answers under way at once.")] = 32,
    max_length: Annotated[
        int | None, typer.Option(min=8, help="Tokens of a prompt and its answer. [default: the model's, up to 2048]")
    ] = None,
    max_queue: Annotated[int, typer.Option(min=1, help="Requests that may wait.")] = 64,
    max_body_bytes: Annotated[int, typer.Option(min=1, help="Of a request.")] = 1 << 20,
    max_adapter_bytes: Annotated[
        int | None,
        typer.Option(min=1, help="Of the adapters in memory, each read when asked for. [default: all are, and stay]"),
    ] = None,
    dtype: DtypeOption = "auto",
    allow_missing: AllowMissingOption = False,
    allow_noop: AllowNoopOption = False,
) -> None:
    """Serve a base and its adapters behind OpenAI's interface on this machine, to try them: `model` names the adapter."""
    _quiet()
    from fastlora.serving.server import require_web, serve

    require_web()
    serve(
        model,
        adapters,
        port=port,
        max_rows=max_rows,
        max_length=max_length,
        max_queue=max_queue,
        max_body_bytes=max_body_bytes,
        max_adapter_bytes=max_adapter_bytes,
        dtype=dtype,
        allow_missing=allow_missing,
        allow_noop=allow_noop,
        say=functools.partial(print, flush=True),
    )


def _named_adapters(arguments: list[str]) -> dict[str, Path]:
    """Folders by name: `name=folder`, or a folder whose own name serves."""
    adapters: dict[str, Path] = {}
    for argument in arguments:
        name, separator, folder = argument.partition("=")
        path = Path(folder if separator and not Path(argument).exists() else argument)
        if path == Path(argument):
            name = path.resolve().name.replace(".", "_")  # PEFT's adapter names have no dots
        if name in adapters:
            raise ValueError(f"two adapters are called {name!r}: name them, --adapter NAME=FOLDER")
        adapters[name] = path
    return adapters


@command
def merge(
    adapter: Annotated[list[Path], typer.Option(help="Adapter folder; several are made into one adapter.")],
    output: Annotated[Path, typer.Option(help="Folder for the merged model, or of several adapters the combined one.")],
    model: OptionalModelOption = None,
    dtype: Annotated[Dtype, typer.Option(help="auto: as the base is stored.")] = "auto",
    weights: Annotated[str | None, typer.Option(help="Of several adapters: a number each, with commas.")] = None,
    combination_type: Annotated[
        CombinationType | None, typer.Option(help="How several are combined; the names are PEFT's.")
    ] = None,
    density: Annotated[
        float | None, typer.Option(help="Share of values that ties, dare_* and magnitude_prune keep.")
    ] = None,
    svd_rank: Annotated[
        int | None, typer.Option(help="Rank of an svd's result. [default: the adapters' largest]")
    ] = None,
    majority_sign_method: Annotated[MajoritySignMethod, typer.Option(help="Of ties: who elects a sign.")] = "total",
    seed: Annotated[int, typer.Option(help="Of what dare_* drops.")] = 0,
    overwrite: Annotated[bool, OPTIONS["overwrite"]] = False,
    allow_missing: AllowMissingOption = False,
    allow_noop: AllowNoopOption = False,
) -> None:
    """Fold an adapter into its base's weights, and report what rounding cost; or make several adapters into one."""
    _quiet()
    allowed = {"overwrite": overwrite, "allow_missing": allow_missing, "allow_noop": allow_noop}
    if combination_type is None:
        if len(adapter) > 1:
            raise ValueError("combination_type: several adapters are combined by one of cat, svd, linear, ties, ...")
        for name, value in {"weights": weights, "density": density, "svd_rank": svd_rank}.items():
            if value is not None:
                raise ValueError(f"{name}={value}: expected combination_type={get_args(CombinationType)[0]} or another")
        from fastlora.merge import merge

        _print_values("fastlora merge", asdict(merge(model, adapter[0], output, dtype=dtype, **allowed)))
        return
    from fastlora.combine import combine

    if dtype != "auto":
        raise ValueError(f"dtype={dtype}: a combined adapter is float32, expected auto")
    report = combine(
        model,
        adapter,
        output,
        weights=[] if weights is None else _numbers("weights", weights, float),
        combination_type=combination_type,
        density=density,
        svd_rank=svd_rank,
        majority_sign_method=majority_sign_method,
        seed=seed,
        **allowed,
    )
    found = asdict(report)
    _print_table([(name, _shown(error)) for name, error in found.pop("layer_errors").items()], ("layer", "error"))
    _print_values("fastlora merge", found)


@command
def receipt(
    adapter: Annotated[list[str], typer.Option(help="Adapter folder, or name=folder; may be given several times.")],
    model: OptionalModelOption = None,
    dtype: Annotated[Dtype, typer.Option(help="auto: as the base is stored.")] = "auto",
    allow_missing: AllowMissingOption = False,
    allow_noop: AllowNoopOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object in place of the table.")] = False,
) -> None:
    """What each adapter changes, layer by layer, and by how much; one that changes nothing ends in an error."""
    _quiet()
    from fastlora.models import load_model
    from fastlora.receipts import receipt

    chosen = "stored" if dtype == "auto" else dtype
    loaded, _ = load_model(
        model, _named_adapters(adapter), dtype=chosen, accelerate=False, allow_missing=allow_missing, allow_noop=True
    )
    found = receipt(loaded)
    print(json.dumps(asdict(found)) if as_json else found)
    idle = [one.name for one in found.adapters if one.changes_nothing]
    if idle and not allow_noop:
        raise ValueError(f"adapter={idle[0]} changes nothing (allow_noop=True takes it)")


@command
def adapters(
    folder: Annotated[Path, typer.Argument(help="Folder of adapter folders.")],
    model: Annotated[
        str | None, typer.Option(help="Base model: a folder or a hub id. Without it, only the files are checked.")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="auto: as the base is stored.")] = "auto",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object a line in place of the table.")
    ] = False,
) -> None:
    """What a folder of adapters holds: method, rank, size, hash, whether each fits a model and changes anything; exit code 1 where one does not."""
    _quiet()
    from fastlora.inventory import inventory

    found = []
    for one in inventory(folder, model, dtype="stored" if dtype == "auto" else dtype):
        found.append(one)
        if as_json:
            print(json.dumps(asdict(one)), flush=True)
    if not as_json:
        headings = ("adapter", "method", "r", "targets", "bytes", "sha256", "fits", "changes", "‖W'-W‖/‖W‖")
        _print_table([_row_of(one) for one in found], headings)
    problems = [one for one in found if not one.is_sound]
    for one in problems:
        print(f"{one.name}: {one.problem}", file=sys.stderr)
    if problems:
        raise typer.Exit(1)


def _row_of(one: Any) -> list[str]:
    ranks = " to ".join(dict.fromkeys(str(rank) for rank in (min(one.r), max(one.r)))) if one.r else ""
    told = {None: "", True: "yes", False: "no"}
    hashed = next((value[:12] for name, value in one.hashes.items() if name.endswith(".safetensors")), "")
    size = "" if one.bytes is None else f"{one.bytes:,}"
    change = "" if one.change is None else f"{one.change:.3g}"
    return [
        one.name,
        one.method or "",
        ranks,
        one.targets or "",
        size,
        hashed,
        told[one.fits],
        told[one.changes],
        change,
    ]


BENCH = "Test and time the operators: fastlora bench [OPERATOR ...] [--json] (the same as python -m benchmarks)."


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
    help=BENCH,
    short_help=BENCH,
)
def bench(context: typer.Context) -> None:
    from fastlora.benchmarks import __main__ as benchmarks

    raise typer.Exit(benchmarks.main(context.args) or 0)


@command
def tune(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    output: Annotated[
        Path | None, typer.Option(help="Write a table to ship, in place of this machine's cache.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="Begin no measurement after so many seconds.")] = math.inf,
) -> None:
    """Check every implementation on this machine and time it: what is slower than plain PyTorch is not used."""
    from fastlora.choice.trial import tune_machine

    if not seconds >= 0:
        raise ValueError(f"seconds={seconds}: expected 0 or more")
    path, found = tune_machine(device, output, seconds=seconds)
    rows = []
    for one in sorted(found):
        verdict = "failed its check" if one.ratio is None else f"{one.ratio:.2f}"
        dropout = "yes" if one.dropout else "no"
        rows.append((one.op, one.dtype, one.size, str(one.rows), dropout, one.implementation, verdict))
    headings = ("operator", "dtype", "weight", "rows", "dropout", "implementation", "of plain PyTorch's time")
    _print_table(rows, headings)
    print(f"written to {path}" if path else "not kept")


@command
def env() -> None:
    """What this machine has, what it lacks, and what that costs."""
    from fastlora.environment import all_findings

    rows, part = [], ""
    for finding in all_findings():
        mark = "yes" if finding.present else "no"
        rows.append((finding.part if finding.part != part else "", finding.name, mark, finding.detail))
        part = finding.part
    _print_table(rows)


@command
def demo(output: Annotated[Path, typer.Option(help="Folder for report.html and the adapters.")] = Path("demo")) -> None:
    """Adapt the embedded base model to dialogue summarisation, and report what came out."""
    _quiet()
    from fastlora import demo

    demo.main(output, begin=begin_process)


def _print_values(title: str, values: dict[str, Any]) -> None:
    _print_table([(name, _shown(value)) for name, value in values.items() if value not in (None, {})], title=title)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, dict):
        if any(isinstance(one, dict) for one in value.values()):  # each task's rows and loss
            return "; ".join(
                f"{name}: {_shown({key: _shown(x) for key, x in one.items()})}" for name, one in value.items()
            )
        return ", ".join(f"{_shown(count)} {name}" for name, count in value.items())
    return str(value)


def _print_table(rows: Iterable[Sequence[str]], headings: Sequence[str] = (), title: str | None = None) -> None:
    table = Table(*headings, title=title, title_justify="left", show_header=bool(headings), box=None)
    for row in rows:
        table.add_row(*row)
    # Where nobody looks (a pipe, a log) rich would cut lines at 80 columns.
    Console(width=None if sys.stdout.isatty() else 200, markup=False, highlight=False).print(table)


def main() -> None:
    app()
