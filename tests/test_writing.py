"""What is written stands whole, only what belongs to a run is replaced, and no two runs write into one folder."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from full_disk import disk_of
from safetensors.torch import save_file

from fastlora import writing


def files(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def fill(content: dict[str, str]):
    def write(folder: Path) -> None:
        for name, text in content.items():
            (folder / name).write_text(text)

    return write


def test_a_new_result_leaves_nothing_of_the_old_one_that_would_be_loaded_with_it(tmp_path):
    """An adapter beside a model's files is applied to that model; a shard or index of an older save is loaded for the new."""
    mine = {"notes.txt": "mine", "other.safetensors": "mine"}
    old = {"config.json": "old", "model-00001-of-00002.safetensors": "old", "model.safetensors.index.json": "old"}
    fill({**mine, **old, "generation_config.json": "old", "README.md": "old"})(tmp_path)
    new = {"adapter_config.json": "new", "adapter_model.safetensors": "new", "README.md": "new"}
    writing.publish(tmp_path, fill(new))
    assert files(tmp_path) == {**mine, **new}


def test_a_tokenizers_folder_is_replaced_and_other_folders_are_left_alone(tmp_path):
    def write(text: str, *names: str):
        def write_files(folder: Path) -> None:
            for name in names:
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_text(text)

        return write_files

    write("mine", "tokenizer_of_mine/notes.txt")(tmp_path)
    for text in ("old", "new"):
        writing.publish(tmp_path, write(text, "config.json", f"additional_chat_templates/{text}.jinja"))
    kept = {"tokenizer_of_mine/notes.txt": "mine", "config.json": "new"}
    assert files(tmp_path) == {**kept, "additional_chat_templates/new.jinja": "new"}
    writing.publish(tmp_path, write("newest", "config.json"))
    assert files(tmp_path) == {**kept, "config.json": "newest"}


def test_a_kill_while_publishing_leaves_no_mixture(tmp_path, monkeypatch):
    old = {"adapter_config.json": "old", "adapter_model.safetensors": "old"}
    new = {"adapter_config.json": "new", "adapter_model.safetensors": "new", "README.md": "new"}
    calls = [0]
    real = {name: getattr(os, name) for name in ("replace", "unlink", "rmdir")}

    def after(name: str, last: int):
        def call(*args, **kwargs):
            calls[0] += 1
            if calls[0] > last:
                raise KeyboardInterrupt
            return real[name](*args, **kwargs)

        return call

    for last in range(10):
        folder = tmp_path / str(last)
        folder.mkdir()
        fill(old)(folder)
        calls[0] = 0
        with monkeypatch.context() as patch:
            for name in real:
                patch.setattr(os, name, after(name, last))
            try:
                writing.publish(folder, fill(new))
            except KeyboardInterrupt:
                pass
        found = {name: text for name, text in files(folder).items() if "/" not in name}
        if "adapter_config.json" in found:  # what makes a loader take the folder for an adapter
            assert len({found[name] for name in old}) == 1, (last, found)
    assert calls[0] <= last and found == new, "the last try was killed, too: try later kills"


@pytest.mark.parametrize("how", ["python", "torch", "safetensors"])
def test_a_full_disk_is_an_os_error_and_leaves_the_old_file(tmp_path, how):
    tensors = {"a": torch.zeros(2**16)}

    def write(folder: Path) -> None:
        if how == "python":
            (folder / "weights").write_bytes(bytes(2**18))
        elif how == "torch":
            with (folder / "weights").open("wb") as file:
                torch.save(tensors, file)
        else:
            save_file(tensors, folder / "weights")

    (tmp_path / "weights").write_text("old")
    with disk_of(2**14), pytest.raises(OSError, match="File too large") as caught:
        writing.publish(tmp_path, write)
    assert caught.value.errno == errno.EFBIG and caught.value.filename
    assert files(tmp_path) == {"weights": "old"}
    with disk_of(2**14), pytest.raises(OSError, match="File too large"):
        writing.whole(tmp_path / "weights", bytes(2**18))
    assert files(tmp_path) == {"weights": "old"}


def test_other_errors_are_left_as_they_are(tmp_path):
    def write(folder: Path) -> None:
        raise RuntimeError("no such thing")

    with pytest.raises(RuntimeError, match="no such thing"):
        writing.publish(tmp_path, write)
    assert files(tmp_path) == {}


HOLD = """
import sys, time
from pathlib import Path
from fastlora import writing
with writing.locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_folder_is_held_by_one_process_until_it_ends_however(tmp_path):
    folder = tmp_path / "new" / "out"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError, match=r"output=.*out: another process writes into this folder"):
            with writing.locked(folder):
                pass
    finally:
        holder.kill()
        holder.wait()
    with writing.locked(folder):
        (folder / "file").write_text("kept")
    assert (folder / "file").exists()


def test_a_folder_that_was_made_and_not_used_goes_again(tmp_path):
    with pytest.raises(ZeroDivisionError), writing.locked(tmp_path / "a" / "b"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["file", "file/below"])
def test_an_output_that_is_a_file_is_named(tmp_path, path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match=r"^output=.*: expected a folder, .*file is a file"):
        with writing.locked(tmp_path / path):
            pass


def test_the_base_models_folder_is_never_an_output(tmp_path, monkeypatch):
    base = tmp_path / "models" / "base"
    base.mkdir(parents=True)
    (tmp_path / "link").symlink_to(base)
    (tmp_path / "around").symlink_to(base.parent)
    monkeypatch.chdir(base)
    outputs = [base, base / ".", base / "out", base / "new" / "out", base.parent, tmp_path]
    outputs += [tmp_path / "link", tmp_path / "link" / "out", tmp_path / "around", tmp_path / "around" / "base"]
    for output in (*outputs, Path("."), Path("out"), Path(".."), Path("../base")):
        for model in (base, tmp_path / "link", tmp_path / "around" / "base", Path(".")):
            with pytest.raises(ValueError, match=r"^output=.*: expected a folder apart from model="):
                writing.require_apart(output, model=model)
    for output in (tmp_path / "models" / "base2", tmp_path / "out", Path("../out")):
        writing.require_apart(output, model=base)


def test_an_output_does_not_take_a_hub_models_name(tmp_path, monkeypatch):
    """transformers would take the folder for the model, the next time."""
    monkeypatch.chdir(tmp_path)
    for output in ("gpt2", "gpt2/out"):
        with pytest.raises(ValueError, match="apart from model=gpt2, "):
            writing.require_apart(Path(output), model="gpt2")
    for output in (".", "out", "gpt2-out"):
        writing.require_apart(Path(output), model="gpt2")


def test_what_a_training_replaces_is_known_by_name(tmp_path):
    fill({"notes.txt": "", "train.jsonl": "", "log": "", ".lock": ""})(tmp_path)
    assert writing.results(tmp_path) == []
    names = [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "config.json",
        "loss.png",
        "metrics.jsonl",
    ]
    names += ["model-00001-of-00002.safetensors", "summary.json", "tokenizer.json"]
    fill(dict.fromkeys(names, ""))(tmp_path)
    assert writing.results(tmp_path) == sorted(names)
