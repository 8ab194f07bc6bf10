"""A checkpoint is taken whole or not at all: whatever is wrong with it is an error that names the file and the key."""

import errno
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlora import checkpoint, writing
from fastlora.checkpoint import CheckpointError
from fastlora.choice import table

TRAINING = {
    **{"config": {"r": 4}, "data": "0" * 64, "held_out": "f" * 64, "validations": 2},
    "peft_config": "e" * 64,
    **{"processes": 1, "threads": 2, "device": "cpu"},
}


def state() -> dict[str, Any]:
    parameter = torch.nn.Parameter(torch.ones(2, 3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones(2, 3)
    optimizer.step()
    measured = table.record("lora_linear", torch.float32, 8, "small", False, "cpu", 0.5)
    return {
        "optimizer": optimizer.state_dict(),
        "scheduler": {"last_epoch": 3},
        "scaler": {},
        "rng": [checkpoint.rng_state()],
        "tuned": {"cpu": [list(measured)]},
    }


def save(output: Path, step: int, training: Any = None, content: Any = None) -> Path:
    """A checkpoint whose manifest is right, whatever it holds."""

    def fill(folder: Path) -> None:
        (folder / "adapter_config.json").write_text('{"r": 4}')
        (folder / "adapter_model.safetensors").write_bytes(bytes(range(256)))
        text = training if isinstance(training, str) else json.dumps(training or {"step": step, **TRAINING})
        (folder / "training.json").write_text(text)
        if isinstance(content, bytes):
            (folder / "state.pt").write_bytes(content)
        else:
            torch.save(state() if content is None else content, folder / "state.pt")

    checkpoint.save(output, step, fill)
    return checkpoint.folder(output, step)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("out"), 3)


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoints" / "step-3"))


def test_what_was_written_is_read(saved):
    found = checkpoint.read(saved)
    assert found.training.step == 3 and found.training.config == {"r": 4} and found.folder == saved
    (rng,) = found.state["rng"]
    checkpoint.set_rng_state(rng)
    assert checkpoint.rng_state()["numpy"] == rng["numpy"] and checkpoint.rng_state()["python"] == rng["python"]
    assert set(found.state["optimizer"]["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}


FILES = ["adapter_config.json", "adapter_model.safetensors", "manifest.json", "state.pt", "training.json"]


def test_a_checkpoint_has_these_files(saved):
    assert sorted(path.name for path in saved.iterdir()) == FILES


@pytest.mark.parametrize("name", FILES)
def test_no_flipped_bit_of_any_file_passes(copy, name):
    content = (copy / name).read_bytes()
    draw = random.Random(0)
    places = [0, len(content) - 1, *(draw.randrange(len(content)) for _ in range(60))]
    for place in places:
        flipped = bytearray(content)
        flipped[place] ^= 1 << draw.randrange(8)
        (copy / name).write_bytes(flipped)
        with pytest.raises(CheckpointError, match=rf"step-3/{name}\b"):
            checkpoint.read(copy)
    (copy / name).write_bytes(content)
    checkpoint.read(copy)


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_short_lengthened_emptied_or_missing_is_named(copy, name):
    content = (copy / name).read_bytes()
    for damaged in (content[:-1], content[: len(content) // 2], content + b"\n", content + content, b""):
        (copy / name).write_bytes(damaged)
        with pytest.raises(CheckpointError, match=rf"step-3/{name}\b"):
            checkpoint.read(copy)
    (copy / name).unlink()
    with pytest.raises(CheckpointError, match=rf"step-3/{name} is missing"):
        checkpoint.read(copy)
    os.mkfifo(copy / name)  # reading it would never end
    with pytest.raises(CheckpointError, match=name):
        checkpoint.read(copy)


def test_a_file_too_much_is_named(copy):
    (copy / "folder").mkdir()
    (copy / "folder" / "model.safetensors").write_text("")
    with pytest.raises(CheckpointError, match=r"folder/model.safetensors is none of the checkpoint's files"):
        checkpoint.read(copy)


def test_files_that_are_swapped_or_a_folder_that_is_renamed_are_noticed(copy):
    renamed = copy.rename(copy.with_name("step-4"))
    with pytest.raises(CheckpointError, match=r"training.json: step=3: expected the folder's, step-4"):
        checkpoint.read(renamed)
    (renamed / "training.json").rename(renamed / "x")
    (renamed / "adapter_config.json").rename(renamed / "training.json")
    (renamed / "x").rename(renamed / "adapter_config.json")
    with pytest.raises(CheckpointError, match=r"adapter_config.json is damaged"):
        checkpoint.read(renamed)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 100_000, '{"step": 3}', '{"step": "3", "files": {}}'])
def test_a_manifest_that_is_none_is_named(copy, text):
    (copy / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"step-3/manifest.json"):
        checkpoint.read(copy)


def test_no_folder_is_no_checkpoint(tmp_path):
    for path in (tmp_path / "none", tmp_path / "file"):
        (tmp_path / "file").write_text("")
        with pytest.raises(CheckpointError, match="expected a checkpoint's folder"):
            checkpoint.read(path)


ABSURD = {
    "step of another type": ({"step": "3"}, "step='3': expected int, got str"),
    "step that is a bool": ({"step": True}, "step=True: expected int, got bool"),
    "no step": ({"step": None}, "step=None"),
    "step below 1": ({"step": 0}, "step=0: expected 1 to"),
    "huge step": ({"step": 10**18}, "step=1000000000000000000: expected 1 to 2147483647"),
    "another step": ({"step": 7}, "step=7: expected the folder's, step-3"),
    "no process": ({"processes": 0}, "processes=0: expected 1 to"),
    "processes that are no number": ({"processes": [1]}, "processes="),
    "more processes than generators": ({"processes": 2}, r"state.pt: rng: expected a list of 2"),
    "threads": ({"threads": -1}, "threads=-1"),
    "data": ({"data": "abc"}, "data='abc': expected 64 hexadecimal digits"),
    "held-out data": ({"held_out": "F" * 64}, "held_out='F.*': expected 64 hexadecimal digits"),
    "the file of PEFT's configuration": (
        {"peft_config": "E" * 64},
        "peft_config='E.*': expected 64 hexadecimal digits",
    ),
    "validations below 0": ({"validations": -1}, "validations=-1: expected 0 to 4"),
    "more validations than steps": ({"validations": 5}, "validations=5: expected 0 to 4"),
    "device": ({"device": 0}, "device=0: expected str"),
    "config": ({"config": []}, r"config=\[\]: expected dict"),
    "more": ({"more": 1}, "unknown key 'more'"),
}


@pytest.mark.parametrize("case", ABSURD)
def test_an_absurd_value_in_training_json_names_file_and_key(tmp_path, case):
    change, message = ABSURD[case]
    with pytest.raises(CheckpointError, match=rf"step-3/.*{message}"):
        checkpoint.read(save(tmp_path, 3, {"step": 3, **TRAINING, **change}))


@pytest.mark.parametrize("name", ["step", *TRAINING])
def test_a_key_that_training_json_lacks_is_named(tmp_path, name):
    content = {key: value for key, value in {"step": 3, **TRAINING}.items() if key != name}
    with pytest.raises(CheckpointError, match=f"training.json: no key '{name}'"):
        checkpoint.read(save(tmp_path, 3, content))


@pytest.mark.parametrize("text", [" ", "[]", '{"step": ' + "9" * 5000 + "}", "[" * 100_000, '"\\ud800"', "\x00"])
def test_a_training_json_that_is_none_is_named(tmp_path, text):
    with pytest.raises(CheckpointError, match="step-3/training.json"):
        checkpoint.read(save(tmp_path, 3, text))


def changed(*keys: Any, to: Any) -> dict[str, Any]:
    content = state()
    place = content
    for key in keys[:-1]:
        place = place[key]
    if to is KeyError:
        del place[keys[-1]]
    else:
        place[keys[-1]] = to
    return content


BAD_STATES = {
    "nothing": (b"", "cannot be read"),
    "no archive": (b"PK\x03\x04" + bytes(100), "cannot be read"),
    "a list": ([1], "expected the keys optimizer, rng, scaler, scheduler, tuned"),
    "no optimizer": (changed("optimizer", to=KeyError), "expected the keys"),
    "optimizer": (changed("optimizer", to=[]), "optimizer: expected the keys state, param_groups"),
    "optimizer.state": (changed("optimizer", "state", 0, to={"exp_avg": "3"}), "optimizer.state: expected tensors"),
    "optimizer.param_groups": (changed("optimizer", "param_groups", to={}), "optimizer.param_groups"),
    "scheduler": (changed("scheduler", to=None), "scheduler: expected a state"),
    "rng": (changed("rng", to={}), "rng: expected a list of 1"),
    "rng[0]": (changed("rng", 0, "python", to=KeyError), r"rng\[0\]: expected the keys python"),
    "rng python": (changed("rng", 0, "python", to=(3, (1, 2), None)), r"rng\[0\].python: no state of a generator"),
    "rng numpy": (changed("rng", 0, "numpy", "state", "key", to=[1]), r"rng\[0\].numpy: no state of a generator"),
    "rng numpy, out of bounds": (
        changed("rng", 0, "numpy", "state", "pos", to=10**6),
        r"rng\[0\].numpy: .*pos=1000000",
    ),
    "rng torch": (changed("rng", 0, "torch", to=torch.zeros(5, dtype=torch.uint8)), r"rng\[0\].torch: no state"),
    "rng cuda": (changed("rng", 0, "cuda", to=torch.zeros(5)), r"rng\[0\].cuda: no state of a generator"),
    "tuned": (changed("tuned", to=[]), "tuned: expected measurements by device"),
    "tuned entry": (changed("tuned", "cpu", 0, to=["lora_linear", 3]), "tuned: "),
    "tuned type": (changed("tuned", "cpu", 0, 2, to="8"), "tuned: rows='8': expected int, got str"),
    "tuned value": (changed("tuned", "cpu", 0, 2, to=9), "tuned: rows=9: no measurement has that"),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_a_state_that_cannot_be_used_names_the_key(tmp_path, case):
    content, message = BAD_STATES[case]
    with pytest.raises(CheckpointError, match=rf"step-3/state.pt:? {message}"):
        checkpoint.read(save(tmp_path, 3, content=content))


def test_reading_changes_nothing(saved):
    before = checkpoint.rng_state()
    checkpoint.read(saved)
    after = checkpoint.rng_state()
    assert before["python"] == after["python"] and before["numpy"] == after["numpy"]
    assert torch.equal(before["torch"], after["torch"])


def test_only_names_of_steps_are_steps(tmp_path):
    for name in ("step-7", "step-12", "step-", "step-07", "step-x", "step-²", "step-٣", "step-" + "9" * 200, ".step-5"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert checkpoint.steps(tmp_path) == [7, 12]


def test_the_newest_two_are_kept_and_later_ones_are_cleared(tmp_path):
    for step in (2, 4, 6):
        save(tmp_path, step)
    assert checkpoint.steps(tmp_path) == [4, 6]
    (tmp_path / "checkpoints" / ".unfinished-x").mkdir()
    checkpoint.clear(tmp_path, after=4)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-4"]


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """A power cut leaves a folder called step-N whole: each file is forced, then the manifest, the folder, then the name."""
    events = []
    force, replace = writing.force, os.replace
    monkeypatch.setattr(writing, "force", lambda path: (events.append(Path(path).name), force(path)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append(f"named {Path(b).name}"), replace(a, b)))
    save(tmp_path, 3)
    named = events.index("named step-3")
    for name in FILES:
        assert name in events[:named]
    assert events.index("state.pt") < events.index("manifest.json") < named
    assert events[named - 1].startswith(".unfinished-") and events[named + 1] == "checkpoints"


def test_a_disk_that_fills_up_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    save(tmp_path, 3)

    def fill(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left on device.*unfinished"):
        checkpoint.save(tmp_path, 4, fill)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-3"]
    assert checkpoint.read(checkpoint.folder(tmp_path, 3)).training.step == 3


def test_the_newest_few_are_kept_and_whatever_one_of_them_needs(tmp_path):
    """Each step's best is the last even one up to it: that of a step that may be gone on from stays."""

    def fill(folder: Path) -> None:
        (folder / "training.json").write_text("{}")

    for step in (2, 3, 5, 7):
        checkpoint.save(tmp_path, step, fill, 2, lambda step: [] if step == 7 else [2])
    assert checkpoint.steps(tmp_path) == [2, 5, 7]
    checkpoint.save(tmp_path, 9, fill, 1, lambda step: [5])
    assert checkpoint.steps(tmp_path) == [5, 9]
    checkpoint.save(tmp_path, 11, fill, 3)
    assert checkpoint.steps(tmp_path) == [5, 9, 11]
    checkpoint.save(tmp_path, 12, fill)
    assert checkpoint.steps(tmp_path) == [11, 12]
