"""Races in the CUDA C++ kernels, and whether each barrier, fence, wait and release in them is needed.

    python tests/races.py [TEXT ...]

Runs the small calls of emulated_races.cpp on an emulated card that knows what comes before what (emulated_order.h): a race ends a call, whichever
order the threads happened to run in. Then every place in csrc/cuda that orders memory accesses is changed in turn (those whose name contains a TEXT,
if there are some): it orders nothing, is left out, or is weaker by one. Each of these mutants is to be found, by a race, a hang or another result;
one that is not is named, and either the kernel does not need that place, or no call shows what for. EXPLAINED says why some stay.
"""

import ctypes
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import emulated

SOURCES = sorted((emulated.ROOT / "csrc/cuda").glob("*.cu*"))
# What orders something, or counts towards it, in the words of launch.h and ptx.cuh. A vote orders nothing. Nor does let_next_launch_begin.
ORDERING = (
    "__syncthreads", "__syncthreads_or", "__syncwarp", "__threadfence", "wait_for_launch_before",
    "commit_copies", "wait_copies", "init_barrier", "publish_barriers", "arrive", "arrive_expecting", "wait_barrier",
    "begin_products", "commit_products", "wait_products",
)  # fmt: skip
COUNTING = ("wait_copies", "wait_products", "init_barrier")  # which can be weaker by one
OTHERS = ("ptx.cuh", "launch.h")  # where they are defined
EXPLAINED = {
    "product_sm90.cuh: __syncwarp();  // who does not ask waits here": "paces the warp; orders nothing",
}


CODE = re.compile(r" \[\+(0x[0-9a-f]+)\]")  # where an access is, in what the card says


def without_code(said: str) -> str:
    return CODE.sub("", said)


class Site(NamedTuple):
    file: str
    line: int
    name: str
    text: str  # of the line

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.name}"


class Mutant(NamedTuple):
    site: Site
    weaker: bool

    def __str__(self) -> str:
        return f"{self.site}{', weaker by one' if self.weaker else ''}"


def sites() -> list[Site]:
    """Every place in csrc/cuda that orders memory accesses."""
    call = re.compile(rf"\b({'|'.join(ORDERING)})(?:<[\w ]+(?:[-+] \d+)?>)?\(")
    found = []
    for path in SOURCES:
        if path.name in OTHERS:
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            found += [Site(path.name, number, name, line.strip()) for name in call.findall(line.partition("//")[0])]
    return found


def mutants() -> list[Mutant]:
    every = sites()
    return [Mutant(site, False) for site in every] + [Mutant(site, True) for site in every if site.name in COUNTING]


def explained(mutant: Mutant) -> str | None:
    """Why the place stays although nothing shows that it is needed."""
    return EXPLAINED.get(f"{mutant.site.file}: {mutant.site.text}")


class Card:
    """The emulated card that knows what comes before what, and the calls that run on it."""

    def __init__(self) -> None:
        kernels = [path for path in SOURCES if path.suffix == ".cu"]
        plain = [emulated.ROOT / "tests" / name for name in ("emulated_order.cpp", "emulated_races.cpp")]
        self.path = emulated.build([*kernels, *plain], emulated.ORDER, plain)
        self.library = ctypes.CDLL(str(self.path))
        for function in (self.library.race_scenario, self.library.race_run, self.library.order_reached):
            function.restype = ctypes.c_char_p
        self.calls: list[str] = []
        while name := self.library.race_scenario(len(self.calls)):
            self.calls.append(name.decode())

    def run(self, call: str, mutant: Mutant | None = None, descending: bool = False) -> tuple[str, int]:
        """What went wrong, if something did, and what was written, in a number."""
        site = mutant.site if mutant else Site("", 0, "", "")
        self.library.order_change(site.file.encode(), site.line, site.name.encode(), bool(mutant and mutant.weaker))
        written = ctypes.c_uint64()
        said = self.library.race_run(self.calls.index(call), descending, ctypes.byref(written)).decode()
        return self._with_lines(said), written.value

    def reached(self) -> set[str]:
        """The sites that were reached since the last time, as they are shown."""
        return set(self.library.order_reached().decode().splitlines())

    def _with_lines(self, said: str) -> str:
        """The places in the code as file and line, where there is an addr2line."""

        def line_of(found: re.Match[str]) -> str:
            try:
                command = ["addr2line", "-e", str(self.path), found[1]]
                at = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            except (OSError, subprocess.CalledProcessError):
                return found[0]
            return f" ({Path(at.split()[0]).name})"

        return CODE.sub(line_of, said)


class Calls:
    """The calls as they are: what each reaches and writes, found once."""

    def __init__(self, card: Card) -> None:
        self.card = card
        self.written: dict[str, int] = {}
        self.reaching: dict[str, list[str]] = {}
        card.reached()
        for call in card.calls:
            said, self.written[call] = card.run(call)
            assert not said, f"{call}: {said}"
            for site in card.reached():
                self.reaching.setdefault(site, []).append(call)

    def find(self, mutant: Mutant) -> str | None:
        """How the mutant is found: the call, and what goes wrong in it."""
        for call in self.reaching[str(mutant.site)]:
            said, written = self.card.run(call, mutant)
            if said or written != self.written[call]:
                return f"{call}: {said or 'another result'}"
        return None


def main() -> int:
    calls = Calls(Card())
    missed = 0
    for mutant in mutants():
        if sys.argv[1:] and not any(text in str(mutant) for text in sys.argv[1:]):
            continue
        found = calls.find(mutant)
        print(f"{mutant}: {found or explained(mutant) or 'NOT FOUND'}", flush=True)
        missed += not found and not explained(mutant)
    return min(missed, 1)


if __name__ == "__main__":
    sys.exit(main())
