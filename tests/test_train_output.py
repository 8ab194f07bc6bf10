"""The output folder of a training: nothing in it is replaced unasked, and the base never."""

import shutil
from dataclasses import replace

import pytest
import tiny
from training import a_base, a_config, adapter, assert_same_bits, contents, on_cpu, one_thread, records, some_data  # noqa: F401  (fixtures)

from fastlora import checkpoint, writing
from fastlora.train import TrainingError, train


def test_an_output_with_checkpoints_is_not_overwritten_unasked(config):
    train(config, progress=False)
    first = adapter(config.output)
    with pytest.raises(FileExistsError, match=r"resume=True .*overwrite=True"):
        train(config, progress=False)
    with pytest.raises(ValueError, match=r"lr=0.02: expected 0.01"):
        train(replace(config, resume=True, lr=0.02), progress=False)
    with pytest.raises(ValueError, match="its token rows are not those"):
        train(
            replace(config, resume=True, data=tiny.save_data(config.output / "other.jsonl", 48, seed=5)), progress=False
        )
    assert train(replace(config, resume=True), progress=False).steps == 12
    assert_same_bits(first, adapter(config.output))
    train(replace(config, overwrite=True, seed=1, epochs=1), progress=False)
    assert len(records(config.output)) == 6
    assert [path.name for path in (config.output / "checkpoints").iterdir()] == ["step-6"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("place", [".", "..", "inside"])
def test_the_base_is_never_overwritten(config, tmp_path, place, overwrite):
    base = tiny.save_model(tmp_path / "base" / "model")
    before = contents(tmp_path / "base")
    (tmp_path / "link").symlink_to(base)
    for folder in (base, tmp_path / "link"):
        with pytest.raises(ValueError, match=r"^output=.*: expected a folder apart from model="):
            train(
                replace(config, model=base, method="full", output=folder / place, overwrite=overwrite), progress=False
            )
    assert contents(tmp_path / "base") == before


@pytest.mark.parametrize(
    "held", ["README.md", "adapter_config.json", "config.json", "model.safetensors", "metrics.jsonl", "tokenizer.json"]
)
def test_what_others_have_made_is_not_replaced_unasked(config, held):
    """With no checkpoint beside it nothing of it is this run's to go on from."""
    config.output.mkdir()
    (config.output / held).write_text("not yours")
    (config.output / "notes.txt").write_text("not yours")
    before = contents(config.output)
    with pytest.raises(FileExistsError, match=rf"^output=.* holds {held}: .*overwrite=True"):
        train(config, progress=False)
    if held != "metrics.jsonl":  # all that a run leaves that is killed before its first checkpoint
        with pytest.raises(FileExistsError, match=rf"no checkpoint to resume from, and holds {held}: overwrite=True"):
            train(replace(config, resume=True), progress=False)
    assert contents(config.output) == before
    train(replace(config, overwrite=True, max_steps=1), progress=False)
    assert (config.output / "notes.txt").read_text() == "not yours"
    assert "config.json" not in contents(config.output) and "model.safetensors" not in contents(config.output)


def test_an_adapter_without_its_checkpoints_is_not_replaced_unasked(config):
    train(replace(config, max_steps=1), progress=False)
    shutil.rmtree(config.output / "checkpoints")
    before = contents(config.output)
    for again in (config, replace(config, resume=True)):
        with pytest.raises(FileExistsError, match=r"holds .*adapter_config.json.* and \d more|holds .*README.md"):
            train(again, progress=False)
    assert contents(config.output) == before


@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json", "adapter_config.json", "checkpoints"])
def test_what_cannot_be_replaced_is_named_before_anything_is_trained(config, name):
    config.output.mkdir()
    if name == "checkpoints":
        (config.output / name).write_text("not yours")
    else:
        (config.output / name).mkdir()
    with pytest.raises(OSError, match=rf"^output=.*: {name} is a (file|folder) there, expected a .* or nothing"):
        train(replace(config, overwrite=True), progress=False)
    assert [path.name for path in config.output.iterdir()] == [name]


def test_data_that_training_would_replace_is_refused(config):
    config.output.mkdir()
    data = tiny.save_data(config.output / "metrics.jsonl", 8)
    before = data.read_bytes()
    with pytest.raises(ValueError, match="^data=.*: expected another place or name"):
        train(replace(config, data=data, overwrite=True), progress=False)
    assert data.read_bytes() == before


def test_what_a_run_leaves_that_went_wrong_at_once_is_in_nobodys_way(config):
    with pytest.raises(TrainingError):
        train(replace(config, lora_alpha=0), progress=False)
    left = contents(config.output)
    assert left.keys() == {"metrics.jsonl", "config.yaml"} and not left["metrics.jsonl"]
    assert train(replace(config, max_steps=1), progress=False).steps == 1


def test_a_second_training_into_one_folder_is_refused_at_the_start(config):
    train(replace(config, max_steps=1), progress=False)
    before = contents(config.output)
    for options in ({"overwrite": True}, {"resume": True}, {}):
        with writing.locked(config.output):  # as another process holds it while it trains
            with pytest.raises(BlockingIOError, match=r"^output=.*: another process writes into this folder"):
                train(replace(config, max_steps=1, **options), progress=False)
    assert contents(config.output) == before


def test_training_holds_its_folder(config, monkeypatch):
    def hold(*_: object) -> None:
        with writing.locked(config.output):
            raise AssertionError("two hold the folder")

    monkeypatch.setattr(checkpoint, "save", hold)
    with pytest.raises(TrainingError, match="the checkpoint cannot be written: .*another process writes"):
        train(replace(config, max_steps=1), progress=False)
