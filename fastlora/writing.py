"""Writing that neither a kill, a full disk nor a second run can spoil.

Everything is written under another name, forced to disk and then renamed: what stands under its own name is the old or
the new, whole. A folder that a run writes into is locked, and only what belongs to it is replaced.
"""

import errno
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

UNFINISHED = ".unfinished-"
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}
LOCK = ".lock"
HEADS = ("adapter_config.json", "config.json")
"""What makes a folder an adapter or a model for those who load it: the first to go, and the last to come."""
TEMPLATES = "additional_chat_templates"
"""The one folder among the files of a model: its tokenizer's, where that has several chat templates."""
MODEL = (
    *("model*.safetensors", "pytorch_model*.bin", "*model*.index.json", "adapter_model.*", "generation_config.json"),
    *("tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*"),
    TEMPLATES,
)
"""What belongs to a head: a new adapter or model leaves nothing of the old one, which would be loaded along with it."""
RESULTS = (
    *HEADS,
    *MODEL,
    "*.safetensors",
    "*.model",
    "README.md",
    "summary.json",
    "metrics.jsonl",
    "loss.png",
    "report.html",
    "config.yaml",
    "validation.jsonl",
    "samples.jsonl",
)
"""What a training may write into its output folder, checkpoints aside."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold an output folder for this process alone; it is made where there is none, and removed again if it stays empty.

    The lock ends with the process, however that ends.

    Raises:
        BlockingIOError: another process holds it.
        NotADirectoryError: it, or what it is to be made in, is a file.
        PermissionError, OSError: it cannot be made, or not be written into.
    """
    there = _there(folder)
    if not there.is_dir():
        raise NotADirectoryError(f"output={folder}: expected a folder, {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"output={folder}: {there} may not be written to")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    lock = FileLock(folder / LOCK)
    try:
        make(folder)
        lock.acquire(timeout=0)
    except Timeout:
        raise BlockingIOError(
            f"output={folder}: another process writes into this folder: expected a folder of its own"
        ) from None
    except NotImplementedError:
        warnings.warn(f"fastlora: {folder} lies on a file system without locks: start no second run", stacklevel=2)
    except OSError as error:
        raise type(error)(f"output={folder}: the folder cannot be written into: {error}") from None
    try:
        yield
    finally:
        # While it is held. Who has opened it meanwhile gets a lock on no file: filelock, from 3.24 on, sees that and tries again.
        (folder / LOCK).unlink(missing_ok=True)
        lock.release()
        for path in made:
            try:
                path.rmdir()
            except OSError:
                break


def _there(path: Path) -> Path:
    """What there is of a path: itself, or the folder nearest around it."""
    return next(one for one in (path, *path.absolute().parents) if one.exists())


def make(folder: Path) -> None:
    """Make a folder and those around it, each entered on the disk."""
    if not folder.is_dir():
        make(folder.parent)
        folder.mkdir(exist_ok=True)
        force(folder.parent)


def require_apart(output: Path, **sources: str | Path) -> None:
    """
    sources: what is read, by the names of the arguments that say so: model, adapter.

    Raises:
        ValueError: OUTPUT is the folder of a source, by whatever name, or lies in it or around it.
    """
    for name, source in sources.items():
        folder = Path(source)
        # A hub id is no folder: one of that name would be taken for it.
        if _is_one_of(folder, output) or (folder.is_dir() and _is_one_of(output, folder)):
            raise ValueError(
                f"output={output}: expected a folder apart from {name}={source}, which nothing may overwrite"
            )


def _is_one_of(folder: Path, path: Path) -> bool:
    """Whether a folder is a path or lies around it, by name and by what the disk says: links and mounts give it many names."""
    path, name = path.resolve(), folder.resolve()
    around = (path, *path.parents)
    return name in around or any(one.exists() and folder.exists() and one.samefile(folder) for one in around)


def require_files(output: Path) -> None:
    """
    Raises:
        IsADirectoryError: in OUTPUT a folder stands in the place of a file that is to be written.
    """
    for name in results(output):
        if name != TEMPLATES and name in RESULTS and (output / name).is_dir():
            raise IsADirectoryError(f"output={output}: {name} is a folder there, expected a file or nothing")


def results(folder: Path) -> list[str]:
    """The names in a folder that a training would replace."""
    return sorted({path.name for pattern in RESULTS for path in folder.glob(pattern)})


def whole(path: Path, content: bytes) -> None:
    """Write one file, whole or not at all."""
    scratch = path.with_name(f"{UNFINISHED}{path.name}.{os.getpid()}")  # others may write the same file
    with plain_errors(path):
        try:
            scratch.write_bytes(content)
            force(scratch)
            os.replace(scratch, path)
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise
    force(path.parent)


def filled(parent: Path, fill: Callable[[Path], None]) -> Path:
    """A folder under a name of no meaning, with the files that `fill` writes into it, all on the disk."""
    make(parent)
    scratch = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=parent))
    scratch.chmod(0o755)  # mkdtemp lets only the owner in
    with plain_errors(scratch):
        try:
            fill(scratch)
            for path in (*scratch.rglob("*"), scratch):
                force(path)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)  # a full disk has no room for half a result
            raise
    return scratch


def publish(folder: Path, fill: Callable[[Path], None]) -> None:
    """Put the adapter or model that `fill` writes into a locked folder, in place of the one that is there.

    A kill in between leaves a folder that nothing takes for an adapter or a model, never one of old and new files. Where `fill` fails, all is
    as it was.
    """
    scratch = filled(folder, fill)
    new = {path.name for path in scratch.iterdir()}
    for name in HEADS:
        (folder / name).unlink(missing_ok=True)
    force(folder)
    for old in {path for pattern in MODEL for path in folder.glob(pattern) if path.name not in new}:
        if old.name == TEMPLATES or not old.is_dir():  # other folders are somebody else's
            remove(old)
    for name in sorted(new, key=lambda name: (name in HEADS, name)):
        if name == TEMPLATES and (folder / name).is_dir():
            remove(folder / name)
        os.replace(scratch / name, folder / name)
    scratch.rmdir()
    force(folder)


def remove(path: Path) -> None:
    """Remove a folder under another name, so that a kill never leaves half of it under its own."""
    if path.is_dir() and not path.name.startswith(UNFINISHED):
        path = path.rename(path.with_name(UNFINISHED + path.name))
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def free(path: Path) -> str:
    """For people: how much room there is on the disk that a path lies on."""
    try:
        return f"{shutil.disk_usage(_there(path)).free / 1e9:,.1f} GB free"
    except OSError:
        return "its disk is gone"


def force(path: Path) -> None:
    """Have what was written to a file, or the names in a folder, on the disk: a power cut keeps them."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def plain_errors(path: Path) -> Iterator[None]:
    """What Python, torch and safetensors make of a write that the disk refused, as one OSError that names the file or its folder."""
    try:
        yield
    except Exception as error:
        number = _errno(error)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), getattr(error, "filename", None) or str(path)) from error


def _errno(error: BaseException | None) -> int | None:
    """The reason of the disk's in an error or in those behind it."""
    while error is not None:
        told = re.search(r"\(os error (\d+)\)", str(error))  # Rust's words for errno
        number = error.errno if isinstance(error, OSError) else int(told[1]) if told else None
        if number in DISK:
            return number
        error = error.__cause__ or error.__context__
    return None
