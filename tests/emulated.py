"""csrc/cuda compiled for this CPU: `load` registers its operators for CPU tensors, under their names on a card, `<op>_cuda`.

How a card is emulated: emulated_cuda.h. What cannot be seen so: how fast a kernel is, and what only the hardware knows (tensor cores'
last bits, limits that ptxas reports: test_cuda_compile.py). Its memory's order between threads is seen by what is built with ORDER (races.py).
"""

import ctypes
import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fastlora import native

ROOT = Path(__file__).parent.parent
FLAGS = (
    "-std=c++20 -O1 -g1 -fPIC -fvisibility=hidden -fno-strict-aliasing -ffp-contract=off -U_FORTIFY_SOURCE "
    "-DFASTLORA_EMULATED -DTORCH_TARGET_VERSION=0x020b000000000000ULL"
).split()
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=all".split()
# A card that knows what comes before what (emulated_order.h): the compiler calls it for each access, by what it has for ThreadSanitizer.
ORDER = (
    "-DFASTLORA_ORDER -fsanitize=thread --param tsan-instrument-func-entry-exit=0 --param tsan-distinguish-volatile=1"
).split()
COMPILER = shlex.split(os.environ.get("CXX", "g++"))


def available() -> bool:
    return shutil.which(COMPILER[0]) is not None


def can_order() -> bool:
    """Whether the compiler is GCC, whose options ORDER are."""
    if not available():
        return False
    said = subprocess.run([*COMPILER, "--version"], check=True, capture_output=True, text=True).stdout
    return "Free Software Foundation" in said


def build(sources: Sequence[Path], more: Sequence[str] = (), without: Sequence[Path] = ()) -> Path:
    """A library of the sources, compiled if what it is made of has changed; several processes may ask at once.

    more: flags; `without` are the sources that are compiled with their definitions only, and for speed.
    """
    folder, flags = Path(torch.__file__).parent, SANITIZERS if os.environ.get("FASTLORA_SANITIZE") == "1" else []
    headers = [*(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cuh"), *(ROOT / "tests").glob("*.h")]
    include = [f"-isystem{folder / 'include'}", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests'}"]
    command = [*COMPILER, *FLAGS, *flags, *include]
    contents = b"".join(path.read_bytes() for path in sorted([*sources, *headers]))
    key = hashlib.sha256(" ".join([*command, *more, torch.__version__]).encode() + contents).hexdigest()[:16]
    place = ROOT / "build" / "emulated"
    place.mkdir(parents=True, exist_ok=True)
    library = place / f"{key}.so"
    with open(place / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if library.exists():
            return library
        objects = [place / f"{key}_{source.name}.o" for source in sources]
        plain = [*(flag for flag in more if flag.startswith("-D")), "-O3"]
        compilers = [
            subprocess.Popen(
                [*command, *(plain if source in without else more), "-x", "c++", "-c", str(source), "-o", str(output)]
            )
            for source, output in zip(sources, objects, strict=True)
        ]
        failed = [one.args for one in compilers if one.wait() != 0]
        assert not failed, failed
        link = [*COMPILER, *flags, "-shared", *map(str, objects), f"-L{folder / 'lib'}", "-ltorch_cpu", "-o"]
        subprocess.run([*link, str(library.with_suffix(".new"))], check=True)
        library.with_suffix(".new").rename(library)
        for output in objects:
            output.unlink()
    return library


def load() -> ctypes.CDLL:
    """Load the operators into this process; the library's `emulated_descending(1)` turns the order of the threads round."""
    path = str(build([path for end in ("cu", "cpp") for path in sorted((ROOT / "csrc/cuda").glob(f"*.{end}"))]))
    torch.ops.load_library(path)
    return ctypes.CDLL(path)


def operators() -> dict[tuple[str, str], Callable[..., Any]]:
    """What the library registered, as `ops.implementations` has it."""
    return native.functions("cuda", "CPU")
