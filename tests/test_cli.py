"""The command line: each command does what its function does, and an error is one line and an exit code."""

import importlib.machinery
import inspect
import json
import logging
import shutil
import sys
import warnings
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from training import interrupt_at
from transformers import AutoModelForCausalLM
from typer.main import get_command
from typer.testing import CliRunner

import fastlora
from fastlora import cli, environment
from fastlora.checkpoint import CheckpointError
from fastlora.cli import _module_names, _quiet, app
from fastlora.combine import combine
from fastlora.config import TrainConfig
from fastlora.evaluation import evaluate
from fastlora.generation import generate
from fastlora.merge import merge
from fastlora.models import load_model
from fastlora.ops import ImplementationError
from fastlora.train import TrainingError

OF_TRAIN = ("dry_run", "config")
"""What `fastlora train` has besides TrainConfig's fields: whether to train, and a file of them."""
PROMPT = "The fox sings. What does the fox do?"


@pytest.fixture(scope="module", autouse=True)
def on_cpu():
    with tiny.on_cpu():
        yield


@pytest.fixture(autouse=True)
def as_before():
    """Commands silence transformers, each for a process of its own."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    with warnings.catch_warnings():
        yield
    transformers_logging.set_verbosity(verbosity)
    transformers_logging.enable_progress_bar()


def run(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.output


@pytest.mark.parametrize(
    ("command", "function"),
    [
        (cli.train, TrainConfig),
        (cli.eval_, evaluate),
        (cli.generate, generate),
        (cli.merge, merge),
        (cli.merge, combine),
    ],
)
def test_options_and_defaults_are_the_functions(command, function):
    """All but TrainConfig's stand twice: what has them first takes seconds to import, and --help must not."""
    options, arguments = (inspect.signature(one).parameters for one in (command, function))
    common = [name for name in arguments if name in options]
    assert len(common) >= 4
    assert function is not TrainConfig or [*options] == [*arguments, *OF_TRAIN, "context"]
    for name in common:
        told, own = options[name].default, arguments[name].default
        assert told == own or inspect.Parameter.empty in (told, own), name


def test_an_option_of_training_is_its_field():
    command = get_command(app).commands["train"]
    own, more = command.params[: -len(OF_TRAIN)], command.params[-len(OF_TRAIN) :]
    assert [option.name for option in more] == [*OF_TRAIN]
    for field, option in zip(fields(TrainConfig), own, strict=True):
        assert (option.name, option.help) == (field.name, field.metadata["help"])
        spelt = f"--{field.name.replace('_', '-')}"
        assert option.opts == [spelt] and option.required == (field.default is MISSING)
        no = field.default is True or field.name == "greater_is_better"  # whose None is neither
        assert option.secondary_opts == [f"--no{spelt[1:]}"] * no, "what is off needs no --no-"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A base in model/, its data, and two adapters: truth/ says what the animal does, lies/ always that it eats."""
    folder = tmp_path_factory.mktemp("cli")
    tiny.save_model(folder / "model")
    tiny.save_data(folder / "truth.jsonl", 64)
    lies = [{**row, "completion": " It eats."} for row in tiny.rows(64)]
    (folder / "lies.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lies))
    for name in ("truth", "lies"):
        run(
            *("train", "--model", folder / "model", "--data", folder / f"{name}.jsonl", "--output", folder / name),
            *("--method", "lora", "--r", 8, "--lora-alpha", 16, "--lora-dropout", 0, "--target-modules", "all-linear"),
            *("--seed", 0, "--epochs", 12, "--batch-size", 8, "--lr", 1e-2, "--max-length", 128, "--save-steps", 40),
        )
    return folder


def test_train_writes_the_adapter_and_prints_a_summary(folder):
    config = json.loads((folder / "truth" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 16)
    assert config["base_model_name_or_path"] == str(folder / "model")
    assert len((folder / "truth" / "metrics.jsonl").read_text().splitlines()) == 96
    output = run(
        "train",
        "--model",
        folder / "model",
        "--data",
        folder / "truth.jsonl",
        "--output",
        folder / "short",
        "--max-steps",
        2,
    )
    assert "steps" in output and "implementations" in output


def test_eval_measures_base_and_adapter(folder):
    measured = {}
    for name, options in {"base": ("--model", folder / "model"), "truth": ("--adapter", folder / "truth")}.items():
        output = run("eval", *options, "--data", folder / "truth.jsonl", "--max-new-tokens", 8, "--json")
        measured[name] = json.loads(output.splitlines()[-1])
    assert measured["truth"]["loss"] < measured["base"]["loss"] / 2
    assert measured["truth"]["exact_match"] > measured["base"]["exact_match"]
    table = run(
        "eval", "--adapter", folder / "truth", "--data", folder / "truth.jsonl", "--no-generations", "--limit", 3
    )
    assert "perplexity" in table and "rouge1" not in table
    assert "3, the same for every figure" in table


def test_a_receipt_tells_what_an_adapter_changes_and_fails_where_that_is_nothing(folder, tmp_path):
    table = run("receipt", "--adapter", folder / "truth", "--adapter", f"liar={folder / 'lies'}")
    assert "adapter 'truth': LORA, float32: changes 14 of 14 layers" in table and "adapter 'liar'" in table
    found = json.loads(run("receipt", "--adapter", folder / "truth", "--json"))
    assert found["adapters"][0]["source"]["folder"] == str(folder / "truth")
    idle = Path(shutil.copytree(folder / "truth", tmp_path / "idle"))
    values = load_file(idle / "adapter_model.safetensors")
    save_file({key: value * ("lora_A" in key) for key, value in values.items()}, idle / "adapter_model.safetensors")
    for command in ("receipt", "generate", "merge"):
        more = {"generate": ("--prompt", PROMPT), "merge": ("--output", tmp_path / "merged")}.get(command, ())
        output = run(command, "--adapter", idle, *more, code=2)
        assert "changes nothing" in output and "--allow-noop takes it" in output
        run(command, "--adapter", idle, "--allow-noop", *more)


def test_several_adapters_are_merged_into_one(folder, tmp_path):
    both = ("merge", "--adapter", folder / "truth", "--adapter", folder / "lies", "--output", tmp_path / "both")
    assert "--combination-type: several adapters" in run(*both, code=2)
    assert "--weights []: expected 2 numbers" in run(*both, "--combination-type", "cat", code=2)
    told = run(*both, "--combination-type", "cat", "--weights", "0.5,0.5")
    assert "sum_relative_error" in told and "model.layers.1.mlp.down_proj" in told
    assert json.loads((tmp_path / "both" / "adapter_config.json").read_text())["r"] == 16
    assert run("generate", "--adapter", tmp_path / "both", "--prompt", PROMPT).splitlines()[-1]
    alone = ("merge", "--adapter", folder / "truth", "--output", tmp_path / "one")
    assert "--density 0.5: expected --combination-type" in run(*alone, "--density", 0.5, code=2)
    assert "--dtype bfloat16" in run(*both, "--combination-type", "cat", "--dtype", "bfloat16", code=2)


def test_generate_swaps_between_adapters_on_one_base(folder):
    options = ("--prompt", PROMPT, "--max-new-tokens", 8)
    output = run("generate", "--adapter", folder / "truth", "--adapter", f"liar={folder / 'lies'}", *options)
    assert output.splitlines()[-3:] == [f"> {PROMPT}", "truth: It sings.", "liar: It eats."]


def test_swapping_leaves_the_model_as_it_was(folder):
    model, tokenizer = load_model(None, {"truth": folder / "truth", "lies": folder / "lies"})
    model.set_adapter("lies")
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    model.train()
    alone, _ = load_model(str(folder / "model"))
    answers = {
        name: generate(model, tokenizer, [PROMPT, "The cat runs."], max_new_tokens=4, adapter_name=name)
        for name in ("truth", "__base__", None)
    }
    assert answers["truth"][0].startswith(" It sings") and answers[None][0].startswith(" It eats")
    assert answers["__base__"] == generate(alone, tokenizer, [PROMPT, "The cat runs."], max_new_tokens=4)
    assert model.active_adapters == ["lies"] and model.training
    assert trainable == [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    with pytest.raises(ValueError, match="'other': expected __base__ or one of truth, lies"):
        generate(model, tokenizer, [PROMPT], adapter_name="other")


def test_padding_changes_no_answer(folder):
    model, tokenizer = load_model(None, {"truth": folder / "truth"})
    prompts = [row["prompt"] for row in tiny.rows(5, seed=4)] + ["The cat", "The owl hides. " * 3]
    apart = generate(model, tokenizer, prompts, max_new_tokens=6, batch_size=1)
    assert len(set(apart)) > 2
    assert generate(model, tokenizer, prompts, max_new_tokens=6, batch_size=4) == apart


def test_generate_reads_prompts_and_chats(folder):
    data = tiny.save_data(folder / "two.jsonl", 2, seed=3)
    output = run("generate", "--adapter", folder / "truth", "--data", data, "--max-new-tokens", 8)
    assert [line.startswith("> The") for line in output.splitlines()[-4:]] == [True, False, True, False]
    assert run("generate", "--adapter", folder / "truth", "--prompt", PROMPT, "--chat", "--max-new-tokens", 2)


def test_merge_folds_the_adapter_in_and_reports_the_error(folder):
    tokens = torch.randint(5, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    beside, _ = load_model(None, {"truth": folder / "truth"})
    for dtype in ("float32", "bfloat16"):
        output = run("merge", "--adapter", folder / "truth", "--output", folder / dtype, "--dtype", dtype)
        report = {words[0]: words[-1] for words in map(str.split, output.splitlines()) if words}
        assert report["dtype"] == dtype and report["layers"] == "14"
        bound = {"float32": 2.0**-24, "bfloat16": 2.0**-8}[dtype]
        assert 0 < float(report["weight_relative_error"]) <= bound
        merged = AutoModelForCausalLM.from_pretrained(folder / dtype)
        assert str(merged.dtype) == f"torch.{dtype}"
        with torch.no_grad():
            expected, got = beside(input_ids=tokens).logits, merged(input_ids=tokens).logits.float()
        assert (expected - got).norm() <= {"float32": 1e-5, "bfloat16": 0.05}[dtype] * expected.norm()
    assert "--overwrite" in run("merge", "--adapter", folder / "truth", "--output", folder / "float32", code=2)


def test_env_says_what_is_here(folder):
    output = run("env")
    assert all(name in output for name in ("python", "cpu", "gpu", torch.__version__, "reference", "triton", "cuda"))


ERRORS = {
    "no such data": ("train --model {model} --data {none}.jsonl --output {none}", "--data: there is no file"),
    "bad option": ("train --model {model} --data {data} --output {none} --r 0", "--r 0: expected at least 1"),
    "unknown modules": (
        "train --model {model} --data {data} --output {none} --target-modules nope",
        "--target-modules: no module is called 'nope'; there are ",
    ),
    "modules that are no layers": (
        "train --model {model} --data {data} --output {none} --target-modules mlp",
        "--target-modules ['mlp']: ",
    ),
    "no such model": ("eval --model {none} --data {data}", "--model: there is no folder"),
    "an adapter as the base": ("eval --model {adapter} --data {data}", "base model; it is used as --adapter {adapter}"),
    "training on an adapter": ("train --model {adapter} --data {data} --output {none}", "it is used as --adapter"),
    "generating with an adapter": ("generate --model {adapter} --prompt a", "it is used as --adapter {adapter}"),
    "a base as the adapter": (
        "merge --adapter {model} --output {none}",
        "it holds a model, and is used as --model {model}",
    ),
    "no adapter": ("merge --adapter {none} --output {none}", "there is no such folder"),
    "another width": (
        "generate --adapter {adapter} --model {wide} --prompt a",
        "layers.0.mlp.down_proj.lora_B.weight: got shape [32, 8], the model has room for [48, 8]",
    ),
    "a foreign key": (
        "eval --adapter {foreign} --data {data}",
        "none of this adapter's on this model: base_model.model.model.norm",
    ),
    "a foreign key, merging": ("merge --adapter {foreign} --output {none}", "none of this adapter's on this model"),
    "half an adapter": (
        "generate --adapter a={half} --prompt a",
        "are missing: base_model.model.model.layers.0.mlp.down_proj",
    ),
    "what to do about half an adapter": ("generate --adapter a={half} --prompt a", "(--allow-missing leaves them"),
    "no config": ("generate --model {bare} --prompt a", "there is no config.json"),
    "more tokens than rows": ("generate --model {talkative} --prompt a", "tokens and the embedding"),
    "a base that is gone": (
        "generate --adapter {orphan} --prompt a",
        "no such folder any more: name the base as --model FOLDER",
    ),
    "merging into the adapter": (
        "merge --adapter {adapter} --output {adapter} --overwrite",
        "apart from --adapter ",
    ),
    "merging into the base": ("merge --adapter {adapter} --output {model} --overwrite", "apart from --model "),
    "merging into another adapter": (
        "merge --adapter {adapter} --output {half}",
        "already (adapter_config.json): --overwrite",
    ),
    "no prompt": ("generate --model {model}", "expected either --prompt or --data"),
    "one name twice": (
        "generate --adapter {adapter} --adapter {adapter} --prompt a",
        "two adapters are called 'truth'",
    ),
    "a name that torch has": ("generate --adapter {half} --prompt a", "adapter name 'half': torch's modules have"),
    "an empty prompt": (
        "generate --model {model} --prompt= --max-length 1",
        "leaves nothing to the prompt: max_length is 1",
    ),
    "a folder as data": (
        "eval --model {model} --data {model}",
        "config.json: expected a list of rows, or an object with one, got 0",
    ),
    "no row is short enough": (
        "eval --model {model} --data {data} --max-length 8 --truncation drop",
        "--max-length 8 with --truncation 'drop' drops every one of the 64 rows",
    ),
    "too short for any row": ("train --model {model} --data {data} --output {none} --max-length 1", "--max-length 1: "),
    "nothing to load": ("generate --prompt a", "no base model was named"),
    "no such schedule": (
        "train --model {model} --data {data} --output {none} --lr-scheduler-type reduce_lr_on_plateau",
        "expected one of linear, cosine, ",
    ),
    "one name of two": (
        "train --model {model} --data {data} --output {none} --target-modules q_proj,foo_proj",
        "no module is called 'foo_proj'; there are q_proj, ",
    ),
    "an empty name": (
        "train --model {model} --data {data} --output {none} --target-modules q_proj,,v_proj",
        "has an empty name",
    ),
    "a bad expression": (
        "train --model {model} --data {data} --output {none} --target-modules (q_proj",
        "--target-modules '(q_proj': no regular expression",
    ),
    "the base as output": ("train --model {model} --data {data} --output {model} --overwrite", "apart from --model "),
    "a link to itself as output": ("train --model {model} --data {data} --output {loop}", "loop"),
    "a link to itself as adapter": ("generate --adapter {loop} --prompt a", "loop"),
    "a file as output": ("train --model {model} --data {data} --output {data}", "expected a folder, "),
    "no such step": (
        "train --model {model} --data {data} --output {adapter} --resume-from 7",
        "--resume-from 7: expected the step of a checkpoint",
    ),
    "no such device": ("tune --device tpu", "--device 'tpu': expected cpu or cuda"),
    "no time": ("tune --seconds nan", "--seconds nan: expected 0 or more"),
    "a demo over others' files": ("demo --output {others}", "holds lora, no demo's: expected a folder of its own"),
    "a demo into a file": ("demo --output {data}", "expected a folder, "),
    "output in use": ("train --model {model} --data {data} --output {adapter}", "--resume goes on"),
}


@pytest.fixture(scope="module")
def names(folder, tmp_path_factory) -> dict[str, Path]:
    """Folders by what is wrong with them."""
    wrong = tmp_path_factory.mktemp("wrong")
    tiny.save_model(wrong / "wide", hidden_size=48)
    shutil.copytree(folder / "model", wrong / "bare").joinpath("config.json").unlink()
    shutil.copytree(folder / "model", wrong / "talkative")
    words = tiny.tokenizer()
    words.add_tokens(["<more>"])
    words.save_pretrained(wrong / "talkative")
    for name in ("foreign", "half", "orphan"):
        shutil.copytree(folder / "truth", wrong / name, ignore=shutil.ignore_patterns("checkpoints"))
    tensors = load_file(folder / "truth" / "adapter_model.safetensors")
    norm = {"base_model.model.model.norm.weight": torch.zeros(32)}
    save_file({**tensors, **norm}, wrong / "foreign" / "adapter_model.safetensors")
    half = {key: tensor for key, tensor in tensors.items() if "lora_A" in key}
    save_file(half, wrong / "half" / "adapter_model.safetensors")
    (wrong / "others" / "lora").mkdir(parents=True)
    (wrong / "loop").symlink_to(wrong / "loop")
    (wrong / "others" / "lora" / "README.md").write_text("not yours")
    config = wrong / "orphan" / "adapter_config.json"
    config.write_text(config.read_text().replace(str(folder / "model"), str(folder / "gone")))
    return {
        **{path.name: path for path in wrong.iterdir()},
        "model": folder / "model",
        "data": folder / "truth.jsonl",
        "adapter": folder / "truth",
        "none": folder / "none",
    }


@pytest.mark.parametrize("case", ERRORS)
def test_an_error_is_one_line_and_exit_code_2(names, case):
    words, message = ERRORS[case]
    lines = run(*(word.format(**names) for word in words.split()), code=2).splitlines()
    assert lines[-1].startswith(f"fastlora {words.split()[0]}: ") and message.format(**names) in lines[-1]
    assert len(lines) == 1


def test_half_an_adapter_where_that_is_allowed(names):
    options = ("--prompt", PROMPT, "--max-new-tokens", 2, "--allow-missing")
    told = [
        CliRunner().invoke(app, ["generate", *map(str, (*which, *options))])
        for which in (("--adapter", f"a={names['half']}"), ("--model", names["model"]))
    ]
    answers = [one.stdout.splitlines()[-1] for one in told]
    assert answers[0].removeprefix("a: ") == answers[1], "A without B changes nothing"
    warned = f"--adapter {names['half']}: adapter_model.safetensors: 14 of 28 tensors are missing: "
    assert told[0].stderr.startswith(warned) and told[0].stderr.count("\n") == 1 and not told[1].stderr


def test_the_version_is_told(folder):
    assert run("--version") == f"fastlora {fastlora.__version__}\n"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ImplementationError("FASTLORA_IMPL='x': expected one of reference"), 2),
        (SafetensorError("Error while deserializing header"), 2),
        (torch.OutOfMemoryError("CUDA out of memory."), 1),
        (MemoryError("no more"), 1),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), 1),
        (TrainingError("step 1: the loss is nan"), 1),
        (CheckpointError("step-3/state.pt is damaged; resume_from=2 goes on, overwrite=True starts again"), 2),
    ],
)
def test_every_expected_error_is_one_line(monkeypatch, error, code):
    def fail() -> None:
        raise error

    monkeypatch.setattr(environment, "all_findings", fail)
    output = run("env", code=code)
    assert output.startswith("fastlora env: ") and output.count("\n") == 1
    assert "=True" not in output and "resume_from" not in output
    assert not isinstance(error, CheckpointError) or "--resume-from 2 goes on, --overwrite starts" in output


def test_a_warning_is_one_line_without_the_source_that_raised_it(monkeypatch):
    def warn() -> list:
        warnings.warn("fastlora: of two\nlines; allow_missing=True", stacklevel=1)
        logging.getLogger("fastlora").warning("max_length=%d: merge with\ndtype=float32", 3)
        return []

    monkeypatch.setattr(environment, "all_findings", warn)
    before = warnings.showwarning
    told = "fastlora: of two lines; --allow-missing\n--max-length 3: merge with --dtype float32\n"
    assert CliRunner().invoke(app, ["env"]).stderr == told
    assert warnings.showwarning is before and not logging.getLogger("fastlora").handlers


def test_an_error_that_nobody_expects_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(environment, "all_findings", lambda: 1 / 0)
    assert isinstance(CliRunner().invoke(app, ["env"]).exception, ZeroDivisionError)


class Noisy:
    """Stands in for transformers' models, which bring in torchao where there is one, which says what it could not load."""

    def find_spec(self, name: str, *_: object) -> object:
        return importlib.machinery.ModuleSpec(name, self) if name == "transformers.modeling_utils" else None

    def create_module(self, spec: object) -> None:
        pass

    def exec_module(self, module: object) -> None:
        logging.getLogger("torchao").warning("noise")


def test_other_packages_are_silent_while_they_are_imported_and_heard_afterwards(monkeypatch, caplog):
    monkeypatch.setattr(transformers, "modeling_utils", transformers.modeling_utils)  # set anew by the import below
    monkeypatch.delitem(sys.modules, "transformers.modeling_utils")
    monkeypatch.setattr(sys, "meta_path", [Noisy(), *sys.meta_path])
    _quiet()
    assert isinstance(sys.modules["transformers.modeling_utils"].__loader__, Noisy)
    assert transformers.utils.logging.get_verbosity() <= logging.WARNING  # that a base lacks weights is heard
    logging.getLogger("torchao").warning("heard")
    logging.getLogger("fastlora").warning("ours")
    assert [record.message for record in caplog.records] == ["heard", "ours"]


def test_target_modules_are_names_with_commas_or_a_regular_expression():
    assert _module_names("all-linear") == "all-linear" and _module_names("q_proj") == ["q_proj"]
    assert _module_names(" q_proj, all-linear ") == ["q_proj", "all-linear"]
    assert _module_names(r".*\.(q|v)_proj") == r".*\.(q|v)_proj"


def test_bad_lines_are_listed(folder):
    bad = folder / "bad.jsonl"
    bad.write_text('{"prompt": "a"}\n{"completion": "b"}\n')
    output = run("train", "--model", folder / "model", "--data", bad, "--output", folder / "none", code=2)
    assert output.splitlines()[-3:] == [
        "fastlora train: 2 bad lines in the data:",
        f"{bad}:1: no field 'completion': there are 'prompt'",
        f"{bad}:2: no field 'prompt': there are 'completion'",
    ]


def test_training_that_goes_wrong_exits_1(folder):
    options = (
        "--model",
        folder / "model",
        "--data",
        folder / "truth.jsonl",
        "--output",
        folder / "wrong",
        "--lora-alpha",
        0,
    )
    assert "no gradient reached" in run("train", *options, code=1)


def test_an_interrupt_saves_and_exits_130(folder):
    metrics = folder / "interrupted" / "metrics.jsonl"
    thread = interrupt_at(metrics, 3)
    options = ("--model", folder / "model", "--data", folder / "truth.jsonl", "--output", metrics.parent)
    output = run("train", *options, "--max-steps", 300, code=130)
    thread.join()
    assert "stopped after step" in output and "--resume" in output
    assert list((metrics.parent / "checkpoints").glob("step-*"))
