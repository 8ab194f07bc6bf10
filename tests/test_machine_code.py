"""The machine code of the Hopper kernel: how many instructions stand between its products, and that nothing touches what these are at work on.

The budgets, benchmarks.model.COUNTS, are of the nvcc that cuda_resources.json names, in instructions a thread: what `python -m benchmarks model`
reckons the kernel's time from.
"""

import re
import subprocess
from itertools import pairwise
from pathlib import Path

import machine_code
import pytest
import test_cuda_compile as compiled
from machine_code import Instruction, count

from fastlora.benchmarks.model import COUNTS

TARGET = "sm_90a"
KERNEL = "product_sm90_kernel"
AHEAD = 40  # between a load of the mask and who reads it, the wait for a product aside
folder, reports = compiled.folder, compiled.reports


def kernels(folder: Path, reports: dict[str, str], file: str, kernel: str = KERNEL) -> dict[str, list[Instruction]]:
    """The instructions for Hopper of each kernel of a file, the product's if not told, by its template arguments."""
    if compiled.release() != "13.0":
        pytest.skip(f"nvcc {compiled.release()} orders instructions otherwise than 13.0, which the budgets are of")
    if (program := compiled.cuobjdump()) is None:
        pytest.skip("no cuobjdump: neither Triton nor CUDA's own is installed")
    assert reports[file]
    found = {}
    for body in compiled.functions(program, TARGET, folder / file):
        mangled, _, code = body.partition("\n")
        name = subprocess.run(["c++filt", mangled.strip()], check=True, capture_output=True, text=True).stdout
        if kernel in name:
            found[re.sub(r"fastlora::", "", name.split("(")[0])] = machine_code.instructions(code)
    assert found
    return found


FILES = ("lora_linear.cu", "multi_lora.cu")


@pytest.mark.parametrize("file", FILES)
def test_the_main_loop_is_short_and_waits_once(folder: Path, reports: dict[str, str], file: str) -> None:
    for name, code in kernels(folder, reports, file).items():
        pieces = list(machine_code.blocks(code))
        [loop] = [i for i, piece in enumerate(pieces) if count(piece, "HGMMA.64x256x16") == 4]
        assert len(pieces[loop]) <= COUNTS.loop, name
        assert count(pieces[loop], "WARPGROUP.DEPBAR") == 1, name
        assert not count(pieces[loop], "LD"), name  # what it multiplies with comes by the copy engine


@pytest.mark.parametrize("file", FILES)
def test_nothing_touches_sums_that_are_at_work(folder: Path, reports: dict[str, str], file: str) -> None:
    """Between a product and the wait for all of them, in the order in which they stand: no register of its sums is named."""
    for name, code in kernels(folder, reports, file).items():
        for i, one in enumerate(code):
            if one.kind != "HGMMA":
                continue
            sums = set(one.sums())
            for later in code[i + 1 :]:
                if later.name == "WARPGROUP.DEPBAR.LE" and later.operands.endswith("0x0"):
                    break
                if later.kind != "HGMMA":
                    assert not later.registers() & sums, (name, one, later)


@pytest.mark.parametrize("file", FILES)
def test_memory_is_read_as_what_it_is(folder: Path, reports: dict[str, str], file: str) -> None:
    """No load that must first find out which memory it is of, and none by the path for constants, which sees no flag's release."""
    for name, code in kernels(folder, reports, file).items():
        assert [one for one in code if one.kind == "LD" or "CONSTANT" in one.name] == [], name


def test_an_epilogue_is_short(folder: Path, reports: dict[str, str]) -> None:
    """The pieces that write a whole tile's 16 rows of 32 columns in a lane's 16 bytes each."""
    for name, code in kernels(folder, reports, "lora_linear.cu").items():
        if "OneAdapter, false" not in name:  # a backward's is in pieces, a branch a row
            continue
        whole = [
            piece for piece in machine_code.blocks(code) if count(piece, "SHFL") >= 42 and count(piece, "STG.E.128")
        ]
        with_bias = [piece for piece in whole if count(piece, "LDG.E.U16")]
        without = [piece for piece in whole if not count(piece, "LDG")]
        assert len(with_bias) == len(without) == 1, (name, [len(piece) for piece in whole])
        assert len(without[0]) <= COUNTS.epilogue and len(with_bias[0]) <= COUNTS.with_bias, (
            name,
            len(without[0]),
            len(with_bias[0]),
        )


def test_a_masked_rank_step_is_short_and_asks_early(folder: Path, reports: dict[str, str]) -> None:
    for name, code in kernels(folder, reports, "lora_linear.cu").items():
        if "OneAdapter, true" not in name:
            continue
        products = [i for i, one in enumerate(code) if one.name.startswith("HGMMA.64x64x16")]
        assert len(products) == 4, name
        for begin, end in pairwise(products):
            assert end - begin <= COUNTS.masked, (name, end - begin)
        loads = [i for i in range(products[0] - COUNTS.masked, products[-1]) if code[i].name == "LDG.E.64"]
        assert len(loads) >= 6, name  # two rows of each but the first, whose bits may be asked for earlier yet
        for i in loads:
            bits = int(re.match(r"R(\d+)", code[i].operands)[1])  # type: ignore[index]
            near = [one for one in code[i + 1 : i + AHEAD] if {bits, bits + 1} & one.registers()]
            assert near == [], (name, code[i], near)


def test_thin_products_are_short(folder: Path, reports: dict[str, str]) -> None:
    """The loops over a step of x aᵀ, in which its mask may be drawn, and of pᵀ x, by how many products they have."""
    budgets = {
        "16": {16: COUNTS.shrink_16, 8: COUNTS.gradient_16},
        "64": {32: COUNTS.shrink_64, 16: COUNTS.gradient_64},
    }
    for name, code in kernels(folder, reports, "lora_linear.cu", "side_kernel").items():
        budget = budgets[name[-3:-1]]
        loops = {count(loop, "HMMA"): loop for loop in machine_code.loops(code, "HMMA")}
        assert loops.keys() == budget.keys(), name
        for products, loop in loops.items():
            assert len(loop) <= budget[products] and count(loop, "BAR") == (name[-3:-1] == "64"), (name, len(loop))


def test_the_reading_sees_what_it_is_for() -> None:
    text = """
        /*0000*/              @!P0 BRA 0x40 ;                                      /* 0x0 */
        /*0010*/                   HGMMA.64x64x16.F32.BF16 R152, gdesc[UR20].tnspB, R152, UP0, gsb0 ;
        /*0020*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0030*/               @P5 FFMA R29, R157, UR27, R29 ;
        /*0040*/                   EXIT ;
    """
    code = machine_code.instructions(text)
    assert [one.kind for one in code] == ["BRA", "HGMMA", "WARPGROUP", "FFMA", "EXIT"]
    assert [len(piece) for piece in machine_code.blocks(code)] == [1, 3, 1]
    assert code[1].sums() == range(152, 184) and code[3].registers() == {29, 157}
    again = machine_code.instructions(text.replace("@!P0 BRA 0x40", "NOP").replace("EXIT", "BRA 0x10"))
    assert [len(loop) for loop in machine_code.loops(again, "HGMMA")] == [4]
    assert list(machine_code.loops(again, "HMMA")) == []
