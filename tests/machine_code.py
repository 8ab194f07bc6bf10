"""CUDA machine code as cuobjdump prints it: instructions, and the pieces of a kernel between branches."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
TARGET = re.compile(r"0x([0-9a-f]+)\s*$")


@dataclass(frozen=True)
class Instruction:
    address: int
    name: str  # with its modifiers: HGMMA.64x256x16.F32.BF16
    operands: str

    @property
    def kind(self) -> str:
        return self.name.partition(".")[0]

    def registers(self) -> set[int]:
        """The vector registers that it names, those of a product's sums aside."""
        return {int(number) for number in re.findall(r"\bR(\d+)\b", self.operands)}

    def sums(self) -> range:
        """The registers that a product of tensor cores adds to."""
        first = re.match(r"R(\d+)", self.operands)
        shape = re.search(r"64x(\d+)x16", self.name)
        if self.kind != "HGMMA" or not first or not shape:
            raise ValueError(f"{self}: expected HGMMA.64xNx16")
        return range(int(first[1]), int(first[1]) + int(shape[1]) // 2)


def instructions(body: str) -> list[Instruction]:
    """Those of one kernel, from what `cuobjdump -sass` prints behind its name."""
    return [Instruction(int(at, 16), name, operands) for at, _, name, operands in INSTRUCTION.findall(body)]


def blocks(code: list[Instruction]) -> Iterator[list[Instruction]]:
    """Pieces that are entered at their first instruction only, and left at their last."""
    branches = [one for one in code if one.kind == "BRA"]
    begins = {int(found[1], 16) for one in branches if (found := TARGET.search(one.operands))}
    begins |= {one.address + 16 for one in branches}
    piece: list[Instruction] = []
    for one in code:
        if one.address in begins and piece:
            yield piece
            piece = []
        piece.append(one)
    yield piece


def loops(code: list[Instruction], kind: str) -> Iterator[list[Instruction]]:
    """Those that have an instruction of this kind and no loop that has one: from where a branch goes back to, to the branch."""
    place = {one.address: i for i, one in enumerate(code)}
    spans = []
    for i, one in enumerate(code):
        found = TARGET.search(one.operands) if one.kind == "BRA" else None
        begin = place[int(found[1], 16)] if found else i + 1
        if begin <= i and any(inside.kind == kind for inside in code[begin:i]):
            spans.append((begin, i))
    for begin, end in spans:
        if not any((begin, end) != (b, e) and begin <= b and e <= end for b, e in spans):
            yield code[begin : end + 1]


def count(piece: list[Instruction], name: str) -> int:
    """How many have a name that begins so."""
    return sum(one.name.startswith(name) for one in piece)
