"""Hostile files for whatever reads files: each case is a good file, changed; the reader takes it, or says what is wrong with it.

    python tests/fuzz.py [TARGET ...] [--cases 1000000] [--first 0]

A case is a target and a number: the same number is the same file, on every machine. A reader may return, or raise its own error with a message
that names the file; anything else (another exception, a hang, the death of the process) is a fault, and the case's number is printed.
`tests/test_fuzz.py` runs some thousands of each target; `make fuzz` a million.
"""

import argparse
import gzip
import io
import json
import logging
import os
import random
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

Files = dict[str, bytes]
STEP = 7
Random = random.Random

NASTY: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 10**30, 0.0, -0.0, 0.5, 1e300, -1e300),
    *("", " ", "x", "lora", "0", "../../etc/passwd", "\0", "\ud800", "é" * 50, "[", "(" * 40, ".*", "a" * 3000),
    *([], {}, [[]], [None], {"": None}, [1, "a"], {"a": {"b": {}}}),
]
RAW = (
    *(
        b"",
        b"\0",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"{",
        b"}",
        b"[" * 2000,
        b'{"a":' * 2000,
        b"NaN",
        b"Infinity",
        b"-Infinity",
    ),
    *(b"1" * 5000, b'"', b"\\u0000", b"\\ud800", b"\r\n", b"\n\n", b"null", b"1e999", b"\x80", b"{}", b"[]"),
)


def change_bytes(random: Random, data: bytes) -> bytes:
    """Flip, cut, repeat, overwrite or insert, once or several times."""
    for _ in range(random.choice((1, 1, 1, 2, 5))):
        at = random.randrange(len(data) + 1)
        kind = random.randrange(7)
        if kind == 0 and data:
            at = random.randrange(len(data))
            data = data[:at] + bytes([data[at] ^ 1 << random.randrange(8)]) + data[at + 1 :]
        elif kind == 1:
            data = data[:at]
        elif kind == 2:
            data = data[:at] + data[at + random.randrange(1, 40) :]
        elif kind == 3:
            end = min(len(data), at + random.randrange(1, 40))
            data = data[:at] + data[at:end] * random.randrange(2, 4) + data[end:]
        elif kind == 4:
            new = random.randbytes(random.randrange(1, 9))
            data = data[:at] + new + data[at + len(new) :]
        elif kind == 5:
            data = data[:at] + random.choice(RAW) + data[at:]
        else:
            data = data[:at] + data[at:][::-1]
    return data


def change_value(random: Random, value: Any) -> Any:
    """A JSON value with one place in it changed: replaced, removed, doubled, renamed, or put one level deeper."""
    if isinstance(value, dict) and value and random.random() < 0.85:
        value = dict(value)
        key = random.choice(list(value))
        kind = random.randrange(8)
        if kind == 0:
            del value[key]
        elif kind == 1:
            value[random.choice(("", f"{key}x", str(key).upper(), "base_model.model.model.norm.weight", "\0"))] = value[
                key
            ]
        elif kind == 2:
            value[random.choice(list(value))] = value[key]
        else:
            value[key] = change_value(random, value[key])
        return value
    if isinstance(value, list) and value and random.random() < 0.85:
        value = list(value)
        at = random.randrange(len(value))
        kind = random.randrange(8)
        if kind == 0:
            del value[at]
        elif kind == 1:
            value += value
        else:
            value[at] = change_value(random, value[at])
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool) and random.random() < 0.4:
        return value * random.choice((-1, 0, 2, 3, 1e9, 2**40)) + random.choice((0, 1, -1))
    if isinstance(value, str) and random.random() < 0.4:
        return change_bytes(random, value.encode("utf-8", "surrogatepass")).decode("utf-8", "replace")
    return random.choice([*NASTY, [value], {"x": value}])


def change_json(random: Random, data: bytes) -> bytes:
    """JSON with one value changed and, at times, its bytes as well."""
    value = change_value(random, json.loads(data))
    text = json.dumps(value, indent=random.choice((None, 1)))
    if random.random() < 0.1 and "{" in text:  # a key that stands there twice
        text = text.replace("{", '{"r": 1, "entries": [], ', 1)
    changed = text.encode("utf-8", "surrogatepass")
    return change_bytes(random, changed) if random.random() < 0.15 else changed


def change_safetensors(random: Random, data: bytes) -> bytes:
    """Its header changed as JSON, with the right length or a wrong one, or its bytes changed."""
    if random.random() < 0.4:
        return change_bytes(random, data)
    (size,) = struct.unpack("<Q", data[:8])
    header = change_json(random, data[8 : 8 + size])
    told = len(header) if random.random() < 0.8 else random.choice((0, 1, len(header) + 7, 2**32, 2**63, 2**64 - 1))
    return struct.pack("<Q", told) + header + data[8 + size :]


CHANGES: dict[str, Callable[[Random, bytes], bytes]] = {
    ".json": change_json,
    ".safetensors": change_safetensors,
}


def change_files(random: Random, files: Files) -> Files:
    """One file of a folder changed by what its name promises, or by bytes; removed, exchanged or added at times."""
    files = dict(files)
    name = random.choice(list(files))
    kind = random.randrange(20)
    if kind == 0:
        del files[name]
    elif kind == 1:
        files[name] = files[random.choice(list(files))]
    elif kind == 2:
        files[random.choice(("more.bin", ".hidden", "adapter_model.bin", "config.json"))] = random.choice(RAW)
    else:
        change = CHANGES.get(Path(name).suffix, change_bytes)
        files[name] = (change if kind < 17 else change_bytes)(random, files[name])
    return files


class Target(NamedTuple):
    """A reader of files."""

    files: Callable[[], Files]  # good ones
    change: Callable[[Random, Files], Files]
    read: Callable[[Path, Files], None]  # raises an AssertionError where something came back that must not


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder in memory, where there is one: a million cases write a million files. It has a checkpoint's name, which belongs to its content."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as outer:
        folder = Path(outer, f"step-{STEP}")
        folder.mkdir()
        yield folder


@contextmanager
def silent() -> Iterator[None]:
    """Without the library's warnings, of which a million cases have many."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def write(folder: Path, files: Files) -> None:
    """Let the folder hold these files and no others."""
    for old in folder.iterdir():
        if old.name not in files:
            old.unlink()
    for name, data in files.items():
        (folder / name).write_bytes(data)


# The table of measurements


def table_files() -> Files:
    entry = {
        "op": "lora_linear",
        "dtype": "bfloat16",
        "rows": 64,
        "size": "small",
        "dropout": False,
        "implementation": "cpu",
    }
    entries = [{**entry, "checked": True, "ratio": 0.5}, {**entry, "rows": 512, "checked": False, "ratio": None}]
    entries.append({**entry, "op": "frozen_linear", "checked": True, "ratio": 1, "way": "packed"})
    return {"table.json": json.dumps({"schema": 1, "kind": "z80", "date": "1976-07-01", "entries": entries}).encode()}


def read_table(folder: Path, files: Files) -> None:
    from fastlora.choice import table

    try:
        found = table._read(folder / "table.json", {"schema": table.SCHEMA})
    except (FileNotFoundError, ValueError) as error:
        assert "table.json" in str(error), error
        return
    table.load_state({"cpu": [list(one) for one in found.values()]})
    for one in found.values():
        assert one.rows in table.ROWS and (one.ratio is None or 0 < one.ratio < float("inf")), one


# Lines of prompts and completions


def examples_files() -> Files:
    turns = [
        ("system", "Be brief."),
        ("user", "2 + 2?"),
        ("assistant", "4"),
        ("user", "And 3?"),
        ("assistant", "7, I think."),
    ]
    messages = [{"role": role, "content": content} for role, content in turns]
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"of": [2, 2.5, None]}}}
    calls = [*messages[:2], {"role": "assistant", "content": None, "tool_calls": [call]}]
    calls += [{"role": "tool", "name": "add", "tool_call_id": "c1", "content": "4"}, {**messages[2], "weight": 1}]
    shared = [
        ("human", "2 + 2?"),
        ("function_call", '{"name": "add", "arguments": {}}'),
        ("observation", "4"),
        ("gpt", "4"),
    ]
    lines: list[Any] = [
        {"prompt": "Summarise: A: hello. B: bonjour, ça va?", "completion": "They greet."},
        {"messages": messages, "source": 7},
        {"prompt": "🙂", "completion": " \n中", "weight": 1.5e3, "tags": [None, True, {"deep": [1]}]},
        {"prompt": messages[:2], "completion": messages[2:]},
        {"messages": calls, "tools": [{"type": "function", "function": {"name": "add", "parameters": {"x": [1]}}}]},
        {"conversations": [{"from": role, "value": value} for role, value in shared], "tools": "[]", "system": "Add."},
        {"instruction": "Add.", "input": "2, 2", "output": "4", "system": "", "history": [["Hello.", "Hello."]]},
        {"text": "All of it."},
    ]
    return {"data.jsonl": b"\n".join(json.dumps(line).encode() for line in lines) + b"\n"}


def change_lines(random: Random, files: Files) -> Files:
    ((name, data),) = files.items()
    if random.random() < 0.3:
        return {name: change_bytes(random, data)}
    lines = data.split(b"\n")
    at = random.randrange(len(lines) - 1)
    lines[at] = change_json(random, lines[at])
    return {name: b"\n".join(lines)}


def read_lines(folder: Path, files: Files) -> None:
    from fastlora.data import examples

    try:
        found = examples.read_examples(folder / "data.jsonl")
    except examples.DataError as error:
        assert all("data.jsonl:" in problem for problem in error.problems), error.problems
        return
    except ValueError as error:
        assert "data.jsonl" in str(error), error
        return
    for one in found:
        last = one.messages[-1] if one.messages else {}
        assert one.completion.strip() or last["tool_calls"], one
        silent_roles = ("tool", "assistant")  # which may say nothing: an answer of a tool, and who calls one
        assert all(message.get("content") or message["role"] in silent_roles for message in one.messages), one
        assert one.turns is None or all(one.messages[turn]["role"] == "assistant" for turn in one.turns), one
        json.dumps([one.prompt, one.completion, one.turn, one.tools], ensure_ascii=False, allow_nan=False).encode(
            "utf-8"
        )


# Tables and documents of rows


def sources_files() -> Files:
    rows = [
        {"prompt": "Sum up, briefly:\nA: hello.", "completion": 'They "greet".'},
        {"prompt": "é", "completion": "b"},
    ]
    table = 'prompt,id,completion\r\n"Sum up, briefly:\nA: hello.",1,"They ""greet""."\r\n\né,2,b\n'
    packed = gzip.compress(b"".join(json.dumps(row).encode() + b"\n" for row in rows), mtime=0)
    return {
        "rows.csv": table.encode(),
        "rows.tsv": 'prompt\tcompletion\n"Sum" up.\tThey greet.\né\tb\n'.encode(),
        "rows.json": json.dumps({"version": 1.5, "data": rows}, indent=1).encode(),
        "list.json": json.dumps([*rows, {"text": "All of it."}]).encode(),
        "rows.jsonl.gz": packed,
    }


def read_sources(folder: Path, files: Files) -> None:
    from fastlora.data import examples

    for name in files:
        try:
            found = examples.read_examples(folder / name)
        except examples.DataError as error:
            assert all(f"{name}:" in problem for problem in error.problems), error.problems
        except ValueError as error:
            assert name in str(error), error
        else:
            assert all(f"{name}:" in one.source and one.completion.strip() for one in found), found


# An adapter's folder


def adapter_files() -> Files:
    import torch
    from peft import LoraConfig
    from safetensors.torch import save

    from fastlora.adapters import CONFIG, WEIGHTS

    config = LoraConfig(
        r=2, lora_alpha=4, target_modules=["q_proj", "lm_head"], modules_to_save=["score"], task_type="CAUSAL_LM"
    )
    plain = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    layers = {"self_attn.q_proj": (6, 4), "lm_head": (9, 4)}
    tensors = {"base_model.model.score.weight": torch.ones(2, 4)}
    for name, (N, K) in layers.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.ones(2, K)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.zeros(N, 2)
    return {CONFIG: json.dumps(plain).encode(), WEIGHTS: save(tensors, {"format": "pt"})}


def prompt_files() -> Files:
    """A soft prompt's folder."""
    import torch
    from peft import PrefixTuningConfig
    from safetensors.torch import save

    from fastlora.adapters import CONFIG, WEIGHTS

    sizes = {"token_dim": 8, "num_layers": 2, "num_attention_heads": 2, "encoder_hidden_size": 8}
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, num_transformer_submodules=1, **sizes)
    tensors = {"prompt_embeddings": torch.ones(3, 32)}
    return {CONFIG: json.dumps(config.to_dict()).encode(), WEIGHTS: save(tensors, {"format": "pt"})}


def read_adapter(folder: Path, files: Files) -> None:
    from fastlora import adapters

    try:
        adapter = adapters.read(folder)
    except adapters.AdapterError as error:
        assert error.file.parent == folder and error.file.name in str(error), error
        return
    except FileNotFoundError as error:
        assert adapters.CONFIG not in files or adapters.WEIGHTS not in files, error
        return
    if adapter.config.peft_type == "LORA":
        sizes = [adapter.config.r, *(adapter.config.rank_pattern or {}).values()]
    else:
        sizes = [getattr(adapter.config, name, None) or 1 for name in adapters.SIZES]
    assert all(1 <= size <= adapters.LARGEST_RANK for size in sizes), adapter.config
    for key, tensor in adapter.tensors.items():
        assert tensor.numel() and tensor.is_floating_point() and bool(tensor.isfinite().all()), key
        assert tensor.nbytes <= len(files[adapters.WEIGHTS]), key


# A checkpoint's folder


def checkpoint_files() -> Files:
    import torch

    from fastlora import checkpoint
    from fastlora.choice import table

    weight = torch.nn.Parameter(torch.ones(2, 3))
    optimizer = torch.optim.AdamW([weight])
    weight.square().sum().backward()
    optimizer.step()
    state = {"optimizer": optimizer.state_dict(), "scheduler": {"last_epoch": STEP, "_last_lr": [1e-3]}}
    state |= {"scaler": {}, "rng": [checkpoint.rng_state()], "tuned": table.state()}
    training = {
        "step": STEP,
        "config": {"r": 16, "data": "x"},
        "data": "0" * 64,
        "held_out": "0" * 64,
        "peft_config": "0" * 64,
        "validations": 3,
        "processes": 1,
        "threads": 2,
        "device": "cpu",
    }

    def fill(folder: Path) -> None:
        torch.save(state, folder / "state.pt")
        (folder / "training.json").write_text(json.dumps(training))
        (folder / "adapter_config.json").write_text("{}")

    with tempfile.TemporaryDirectory() as output:
        checkpoint.save(Path(output), STEP, fill)
        return {path.name: path.read_bytes() for path in checkpoint.folder(Path(output), STEP).iterdir()}


def change_checkpoint(random: Random, files: Files, names: Sequence[str] = ("training.json", "state.pt")) -> Files:
    """Mostly bytes that the manifest must betray; at times what a manifest vouches for is nonsense."""
    from fastlora import checkpoint

    if random.random() < 0.8:
        return change_files(random, files)
    name = random.choice(names)
    files = {**files, name: CHANGES.get(Path(name).suffix, change_bytes)(random, files[name])}
    digests = {name: sha256(data).hexdigest() for name, data in files.items() if name != checkpoint.MANIFEST}
    return {**files, checkpoint.MANIFEST: checkpoint._manifest(STEP, digests)}


def read_checkpoint(folder: Path, files: Files) -> None:
    from fastlora import checkpoint

    try:
        found = checkpoint.read(folder)
    except checkpoint.CheckpointError as error:
        assert str(folder) in str(error), error
        return
    digests = {name: sha256(data).hexdigest() for name, data in files.items() if name != checkpoint.MANIFEST}
    assert files[checkpoint.MANIFEST] == checkpoint._manifest(STEP, digests), "a change that no one vouches for"
    assert found.training.step == STEP and set(found.state) == checkpoint.STATE


# What an optimiser, its schedule and a float16 loss's scale were


@cache
def training_by(optim: str) -> Any:
    from fastlora.config import TrainConfig

    return TrainConfig(model="m", data="d", output="o", optim=optim)  # type: ignore[arg-type]


def updates(optim: str) -> tuple[Any, dict[str, Any], Any, Any, Any]:
    """A training of two weights: its options, weights, optimiser, schedule and scale."""
    import torch

    from fastlora import optimisers

    config = training_by(optim)
    trained = {name: torch.nn.Parameter(torch.ones(shape)) for name, shape in (("a", (2, 3)), ("b", (3,)))}
    optimizer = optimisers.build(config, None, trained.values())
    scaler = optimisers.scaler(torch.device("cpu"), torch.float16, trained)
    return config, trained, optimizer, optimisers.scheduler(config, optimizer, 9), scaler


def update(trained: dict[str, Any], optimizer: Any, scheduler: Any, scaler: Any) -> None:
    scaler.scale(sum(one.square().sum() for one in trained.values())).backward()
    scaler.step(optimizer)
    scaler.update()
    scheduler.step()
    optimizer.zero_grad()


@cache
def optimiser_files() -> Files:
    import torch

    files = {}
    for optim in ("adamw_torch_fused", "adafactor"):
        _, *parts = updates(optim)
        for _ in range(STEP):
            update(*parts)
        names = zip(("optimizer", "scheduler", "scaler"), parts[1:], strict=True)
        file = io.BytesIO()
        torch.save({name: one.state_dict() for name, one in names}, file)
        files[f"{optim}.pt"] = file.getvalue()
    return files


def change_optimiser(random: Random, files: Files) -> Files:
    """A value of a state, most often; a tensor's place gets one that it must not hold."""
    import torch

    name = random.choice(list(files))
    if random.random() < 0.1:
        return {**files, name: change_bytes(random, files[name])}
    state = torch.load(io.BytesIO(files[name]), weights_only=True)
    if random.random() < 0.4:
        kept = random.choice(list(state["optimizer"]["state"].values()))
        shape = random.choice(((), (1,), (2,), (3,), (2, 3), (3, 2), (0,), (1, 2, 3)))
        value = torch.full(shape, random.choice((0.0, -1.0, 1.0, float("nan"), float("inf"), 1e38)))
        kept[random.choice(list(kept))] = value.to(random.choice((torch.float32, torch.float64, torch.int64)))
    else:
        state = change_value(random, state)
    file = io.BytesIO()
    torch.save(state, file)
    return {**files, name: file.getvalue()}


def read_optimiser(folder: Path, files: Files) -> None:
    from fastlora import checkpoint, optimisers

    good = optimiser_files()
    for name in [name for name in files if files[name] != good[name]] or files:  # the others would be read as ever
        config, *parts = updates(name.removesuffix(".pt"))
        trained, optimizer, scheduler, scaler = parts
        path, before = folder / name, repr((optimizer.state_dict(), scheduler.state_dict()))
        try:
            state = checkpoint.load_state(path, "optimizer", "scheduler", "scaler")
            checkpoint.check_course(f"{path}", state)
            optimisers.load_state(path, state, STEP, trained, optimizer, scheduler, config.optim)
        except checkpoint.CheckpointError as error:
            assert str(path) in str(error), error
            assert repr((optimizer.state_dict(), scheduler.state_dict())) == before
            continue
        try:
            optimisers.load_scaler(path, state["scaler"], scaler)
        except checkpoint.CheckpointError as error:
            assert str(path) in str(error), error
        update(*parts)  # it goes on


# What a training tells of its validations


def validation_files() -> Files:
    lines: list[Any] = [
        {"step": 0, "eval_loss": 2.5, "eval_tokens": 40, "retain_loss": 1.5, "retain_tokens": 7, "forgetting": 0.0},
        {"step": 4, "eval_loss": 1.5, "eval_tokens": 40, "eval_rouge1": 0.25, "eval_exact_match": 0, "eval_f1": 1.0},
        {"step": 5, "eval_loss": 1.25, "eval_tokens": 40, "eval_accuracy": 0.5, "note": [1]},
    ]
    return {"validation.jsonl": b"\n".join(json.dumps(line).encode() for line in lines) + b"\n"}


def read_validation(folder: Path, files: Files) -> None:
    from fastlora import metrics

    try:
        found = metrics.read_validations(folder)
    except ValueError as error:
        assert "validation.jsonl:" in str(error), error
        return
    steps = [one["step"] for one in found]
    assert all(type(step) is int for step in steps) and steps == sorted(set(steps)), steps
    for one in found:
        assert all(0 <= one[name] <= 1 for name in metrics.SCORES if name in one), one
        assert all(abs(one[name]) < float("inf") for name in metrics.MEASURED if name in one), one


def samples_files() -> Files:
    chat = [{"role": "user", "content": "2 + 2?"}]
    lines: list[Any] = [
        {"step": 0, "source": "data.jsonl:3", "prompt": "A?", "reference": "B.", "answer": ""},
        {"step": 0, "source": "data.jsonl:4", "prompt": chat, "reference": "4", "answer": "\u00e7a va"},
        {"step": 4, "source": "data.jsonl:3", "prompt": "A?", "reference": "B.", "answer": "B.", "note": 1},
    ]
    return {"samples.jsonl": b"\n".join(json.dumps(line).encode() for line in lines) + b"\n"}


def read_samples(folder: Path, files: Files) -> None:
    from fastlora import metrics

    try:
        found = metrics.read_samples(folder)
    except ValueError as error:
        assert "samples.jsonl:" in str(error), error
        return
    for one in found:
        assert type(one["step"]) is int and one["step"] >= 0 and isinstance(one["answer"], str), one


# A sweep's jobs, and its checkpoint


def jobs_files() -> Files:
    text = "- name: one\n  r: 4\n  lr: 1e-3\n  target_modules: [q_proj, v_proj]\n- {lr: 2.5e-4, seed: 3, use_rslora: true, max_steps: 7}\n"
    return {"jobs.yaml": text.encode()}


def change_jobs(random: Random, files: Files) -> Files:
    """Bytes, or a value: JSON is YAML."""
    ((name, data),) = files.items()
    if random.random() < 0.5:
        return {name: change_bytes(random, data)}
    jobs = [
        {"name": "one", "r": 4, "lr": 1e-3, "data": "x", "target_modules": ["q_proj"]},
        {"eval_data": "y", "use_rslora": True},
    ]
    return {name: change_json(random, json.dumps(jobs).encode())}


def read_jobs(folder: Path, files: Files) -> None:
    from fastlora.sweep import Sweep, jobs_of

    try:
        jobs = jobs_of(Sweep(model="m", data="d", eval_data="e", output="o", jobs=folder / "jobs.yaml"))
    except (TypeError, ValueError) as error:
        assert "jobs.yaml" in str(error), error
        return
    assert jobs and len({job.name for job in jobs}) == len(jobs)
    for job in jobs:
        assert job.folder.parent == Path("o/jobs") and job.config.method == "lora" and job.config.r >= 1, job


# A mixture's file, and a task's


MIXED: dict[str, Any] = {
    "mixing": "temperature",
    "mixing_temperature": 2.0,
    "mixing_maximum": 3000,
    "tasks": [
        "task.yaml",
        "plain.jsonl",
        {
            "name": "own",
            "data": "rows.jsonl",
            "templates": [{"input": "{text}", "target": "{label}"}],
            "max_samples": 2,
        },
    ],
}
TASK: dict[str, Any] = {
    "name": "notes",
    "cluster": "sentiment",
    "data": "rows.jsonl",
    "columns": {"what": "text", "who": "of.who"},
    "templates": [
        {"name": "a", "input": "{who}: {what} {{x}}\n{options}", "target": "{label}"},
        {"input": "{text}?", "target": "It is {label}."},
    ],
    "inverted": [{"input": "{label}!", "target": "{text}"}],
    "options": ["good", "bad"],
    "few_shot_share": 0.5,
    "inverted_share": 0.2,
    "options_share": 0.5,
    "shots": [1, 2],
    "max_characters": 60,
}


def mixture_files() -> Files:
    rows = [{"text": f"note {i}", "label": ("good", "bad")[i % 2], "of": {"who": "Ann"}} for i in range(4)]
    return {
        "mixture.yaml": json.dumps(MIXED).encode(),
        "task.yaml": json.dumps(TASK).encode(),
        "rows.jsonl": "\n".join(map(json.dumps, rows)).encode(),
        "plain.jsonl": b'{"prompt": "a", "completion": "b"}\n' * 2,
    }


def change_mixture(random: Random, files: Files) -> Files:
    """Bytes, or a value: JSON is YAML."""
    name = random.choice(("mixture.yaml", "task.yaml", "task.yaml", "rows.jsonl"))
    if name == "rows.jsonl":
        return {**files, **change_lines(random, {name: files[name] + b"\n"})}
    return {**files, name: (change_json if random.random() < 0.8 else change_bytes)(random, files[name])}


def read_mixture(folder: Path, files: Files) -> None:
    from fastlora import Mixture

    try:
        mixture = Mixture.read(folder / "mixture.yaml")
    except FileNotFoundError as error:
        assert "there is no file" in str(error), error
        return
    except (TypeError, ValueError) as error:
        assert "mixture.yaml: " in str(error), error
        return
    try:
        examples = mixture.examples(seed=1)
    except (OSError, ValueError):  # the rows are bad, or elsewhere
        return
    assert all(one.completion.strip() for one in examples)  # plain text has no prompt
    order = mixture.order([one.task for one in examples], 1)
    assert set(order.draws(0, 50)) <= set(range(len(examples))) and len(order.draws(10**6, 10**6 + 3)) == 3


def sweep_files() -> Files:
    import torch

    from fastlora import checkpoint
    from fastlora.choice import table

    weight = torch.nn.Parameter(torch.ones(2, 3))
    optimizer = torch.optim.AdamW([weight])
    weight.square().sum().backward()
    optimizer.step()
    own = {"optimizer": optimizer.state_dict(), "scheduler": {"last_epoch": STEP, "_last_lr": [1e-3]}}
    state = {"jobs": {"one": own}, "rng": [checkpoint.rng_state()], "tuned": table.state()}
    jobs = {
        "one": {"status": "running", "reason": "", "step": STEP, "evaluations": [[3, 1.5]]},
        "two": {"status": "halved", "reason": "step 3: last", "step": 3, "evaluations": [[3, 2.5]]},
    }
    content = {
        "step": STEP,
        "seconds": 1.5,
        "setup": {"jobs": {"one": {"r": 4}, "two": {}}, "threads": 2},
        "jobs": jobs,
    }

    def fill(folder: Path) -> None:
        torch.save(state, folder / "state.pt")
        (folder / "sweep.json").write_text(json.dumps(content))

    with tempfile.TemporaryDirectory() as output:
        checkpoint.save(Path(output), STEP, fill)
        return {path.name: path.read_bytes() for path in checkpoint.folder(Path(output), STEP).iterdir()}


def read_sweep(folder: Path, files: Files) -> None:
    from fastlora import checkpoint
    from fastlora.sweep import saved

    try:
        found = saved.read(folder)
    except checkpoint.CheckpointError as error:
        assert str(folder) in str(error), error
        return
    assert found.step == STEP and all(one.step <= STEP for one in found.jobs.values())
    try:
        saved.require_same(found, {"jobs": {"one": {"r": 4}}, "threads": 2})
    except ValueError as error:
        assert str(folder) in str(error), error


# Options from a file


def options_files() -> Files:
    yaml = "model: m\nlearning-rate: 1e-3\ntarget_modules: [q_proj, v_proj]\nmax_steps: null\n"
    toml = 'model = "m"\nlr = 1e-3\n"target-modules" = ["q_proj"]\nresume = true\n'
    return {"run.yaml": yaml.encode(), "run.toml": toml.encode(), "run.json": b'{"model": "m", "lr": 1e-3, "r": 4}'}


def read_options(folder: Path, files: Files) -> None:
    from dataclasses import fields

    from fastlora import options
    from fastlora.config import TrainConfig

    known = [field.name for field in fields(TrainConfig)]
    for name in files:
        try:
            given = options.read(folder / name, known)
        except ValueError as error:
            assert name in str(error), error
            continue
        assert given.values.keys() <= set(known) and given.lines.keys() <= given.values.keys(), given
        try:
            TrainConfig(**{"model": "m", "data": "d", "output": "o", **given.values})
        except OSError:  # the name of a model's folder is too long
            continue
        except (TypeError, ValueError) as error:
            assert len(str(error)) < 1000, error


TARGETS: dict[str, Target] = {
    "table": Target(table_files, change_files, read_table),
    "examples": Target(examples_files, change_lines, read_lines),
    "sources": Target(sources_files, change_files, read_sources),
    "adapter": Target(adapter_files, change_files, read_adapter),
    "prompt": Target(prompt_files, change_files, read_adapter),
    "checkpoint": Target(checkpoint_files, change_checkpoint, read_checkpoint),
    "optimiser": Target(optimiser_files, change_optimiser, read_optimiser),
    "validation": Target(validation_files, change_lines, read_validation),
    "samples": Target(samples_files, change_lines, read_samples),
    "jobs": Target(jobs_files, change_jobs, read_jobs),
    "options": Target(options_files, change_files, read_options),
    "mixture": Target(mixture_files, change_mixture, read_mixture),
    "sweep": Target(sweep_files, partial(change_checkpoint, names=("sweep.json", "state.pt")), read_sweep),
}


def run(name: str, cases: range) -> None:
    """Every case of a target in turn.

    Raises:
        AssertionError: a case is a fault; the message says which.
    """
    target = TARGETS[name]
    good = target.files()
    with scratch() as folder, silent():
        write(folder, good)
        target.read(folder, good)
        for case in cases:
            files = target.change(Random(f"{name} {case}"), good)
            write(folder, files)
            try:
                target.read(folder, files)
            except Exception as fault:
                raise AssertionError(f"python tests/fuzz.py {name} --first {case} --cases 1: {fault!r}") from fault


def main() -> None:
    parser = argparse.ArgumentParser(description="Hostile files for whatever reads files.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--cases", type=int, default=1_000_000)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    unknown = [name for name in options.targets if name not in TARGETS]
    if unknown:  # argparse's own choices refuse that there is none
        parser.error(f"TARGET: got {unknown[0]!r}, expected {', '.join(TARGETS)}")
    for name in options.targets or TARGETS:
        began = time.perf_counter()
        for start in range(options.first, options.first + options.cases, 10_000):
            run(name, range(start, min(start + 10_000, options.first + options.cases)))
            seconds = time.perf_counter() - began
            done = min(start + 10_000, options.first + options.cases) - options.first
            print(f"{name}: {done} cases, {seconds:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
