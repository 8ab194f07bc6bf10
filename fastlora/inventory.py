"""What a folder of adapters holds, one a line: what each is, whether it is whole, whether it fits a model, and whether it changes anything there."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState

from fastlora import adapters, receipts
from fastlora.adapters import Adapter, AdapterError
from fastlora.models import load_base, resolve_dtype

NAME = "inventory"


@dataclass(frozen=True)
class Item:
    """An adapter's folder. What is not known is None: of a damaged file, or, without a model, of what only a model tells."""

    name: str
    folder: str
    method: str | None = None  # PEFT's name, and what it is beside: DoRA, rsLoRA, lora_bias
    r: tuple[int, ...] = ()  # the ranks in the file
    targets: str | None = None  # the modules that it is for; of a soft prompt, how many tokens
    bytes: int | None = None  # of its tensors in the file
    hashes: Mapping[str, str] = field(default_factory=dict)  # SHA-256, by file name
    base: str | None = None  # that it was trained on
    fits: bool | None = None
    changes: bool | None = None  # whether the model computes anything else with it
    change: float | None = None  # ‖W' - W‖ / ‖W‖ over all layers, where it is known
    problem: str | None = None

    @property
    def is_sound(self) -> bool:
        return self.problem is None


def inventory(folder: str | Path, model: str | None = None, *, dtype: str = "stored") -> Iterator[Item]:
    """An Item of each adapter in a folder, as soon as it is known: nothing is served, merged or trained of one that has a problem.

    Args:
        folder: with an adapter's in each of its folders, whose names are theirs.
        model: a base, by folder or hub id. None: the files are checked alone, and told to change nothing only where no base could change that.
        dtype: the base's, as `load_model` takes it.

    Raises:
        FileNotFoundError, OSError: there is no such folder or model.
        ValueError: the folder is an adapter's own, or has none in it; the model's files are damaged.
    """
    folders = adapters.folders_in(folder, "folder")
    if model is None:
        yield from (_looked_at(name, at, _by_itself) for name, at in folders.items())
        return
    chosen, device = resolve_dtype(dtype, PartialState().device), PartialState().device
    base: Any = None

    def on_the_model(read: Adapter) -> tuple[bool, float | None]:
        nonlocal base
        base = load_base(model, chosen, device) if base is None else base
        mine, base = base, None  # until it is sure to be as it was
        adapters.check(read, mine)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what loading says of an adapter, it says when somebody loads it to use it
            loaded = adapters.load(mine, {NAME: read}, allow_noop=True)
            [found] = receipts.receipt(loaded).adapters
            if _leaves_the_base(read):
                base = loaded.get_base_model() if read.config.is_prompt_learning else loaded.unload()
        return not found.changes_nothing, found.change

    yield from (_looked_at(name, at, on_the_model) for name, at in folders.items())


Look = Callable[[Adapter], tuple[bool | None, float | None]]  # whether it changes something, and by how much


def _looked_at(name: str, folder: Path, look: Look) -> Item:
    try:
        read = adapters.read(folder)
    except (OSError, AdapterError) as error:
        return Item(name, str(folder), problem=_words(error, folder))
    told = _told(name, read)
    try:
        changes, change = look(read)
    except AdapterError as error:
        return Item(**told, fits=False, problem=_words(error, folder))
    fits = None if look is _by_itself else True
    problem = "changes nothing" if changes is False else None
    return Item(**told, fits=fits, changes=changes, change=change, problem=problem)


def _words(error: Exception, folder: Path) -> str:
    return str(error).removeprefix(f"adapter={folder}: ")


def _by_itself(read: Adapter) -> tuple[bool | None, float | None]:
    try:
        adapters.require_a_change(read, read.tensors, {})
    except AdapterError:
        return False, None
    return None, None


def _told(name: str, read: Adapter) -> dict[str, Any]:
    config = read.config
    marks = {"use_dora": "DoRA", "use_rslora": "rsLoRA", "lora_bias": "lora_bias"}
    kinds = [mark for key, mark in marks.items() if getattr(config, key, False)]
    names = getattr(config, "target_modules", None)
    targets = names if isinstance(names, str) else " ".join(sorted(names)) if names else None
    if config.is_prompt_learning:
        targets = f"{config.num_virtual_tokens} tokens"
    return {
        "name": name,
        "folder": str(read.folder),
        "method": ", ".join([config.peft_type.value, *kinds]),
        "r": tuple(sorted(adapters.ranks(read))),
        "targets": targets,
        "bytes": sum(tensor.nbytes for tensor in read.tensors.values()),
        "hashes": read.hashes,
        "base": read.base,
    }


def _leaves_the_base(read: Adapter) -> bool:
    """Whether PEFT hands the base out again as it was before this adapter."""
    config = read.config
    if getattr(config, "modules_to_save", None) or getattr(config, "trainable_token_indices", None):
        return False
    try:
        adapters.require_an_untouched_base(read)
    except AdapterError:
        return False
    return config.is_prompt_learning or config.peft_type in ("LORA", "IA3")
