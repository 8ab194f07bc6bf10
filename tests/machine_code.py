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


def count(piece: list[Instruction], name: str) -> int:
    """How many have a name that begins so."""
    return sum(one.name.startswith(name) for one in piece)
