"""memory.py: what torch keeps for products of ever new numbers of rows is bounded, unless the environment says otherwise."""

import os
import subprocess
import sys

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model

import fastlora
from fastlora.frozen import packed
from fastlora.memory import PRODUCT_CACHES, SHAPES_KEPT, bound_product_caches

GROWTH = """
import ctypes
import sys

import torch
from fastlora.memory import bound_product_caches

class Heap(ctypes.Structure):  # glibc's mallinfo2
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks used fordblks keepcost".split()]

heap = ctypes.CDLL(None).mallinfo2
heap.restype = Heap
if sys.argv[1] == "bounded":
    bound_product_caches()
layer = torch.nn.Linear(64, 96, dtype=torch.bfloat16)
with torch.no_grad():
    for rows in range(10, 10 + int(sys.argv[2])):
        layer(torch.zeros(rows, 64, dtype=torch.bfloat16))
print(heap().used)
"""


@pytest.fixture
def unset(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in PRODUCT_CACHES:
        monkeypatch.setenv(name, "")  # so that it is put back, whatever sets it meanwhile
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.skipif(
    not packed.suits_onednn(torch.bfloat16), reason="torch's 16-bit products are not oneDNN's on this CPU"
)
@pytest.mark.usefixtures("unset")
def test_many_shapes_take_no_more_than_some() -> None:
    def used(way: str, shapes: int) -> int:
        run = subprocess.run(
            [sys.executable, "-c", GROWTH, way, str(shapes)], capture_output=True, text=True, check=True
        )
        return int(run.stdout)

    some, many, unbounded = (
        used("bounded", 2 * SHAPES_KEPT),
        used("bounded", 4 * SHAPES_KEPT),
        used("plain", 4 * SHAPES_KEPT),
    )
    each = (unbounded - some) / (2 * SHAPES_KEPT)
    assert unbounded > some
    assert many - some < each * SHAPES_KEPT / 2


@pytest.mark.usefixtures("unset")
def test_accelerate_bounds_them() -> None:
    fastlora.accelerate(get_peft_model(tiny.llama(), LoraConfig(target_modules=["q_proj"])))
    assert [os.environ[name] for name in PRODUCT_CACHES] == [str(SHAPES_KEPT)] * 2


def test_the_users_own_numbers_stay(unset: pytest.MonkeyPatch) -> None:
    unset.setenv(PRODUCT_CACHES[0], "7")
    bound_product_caches()
    assert [os.environ[name] for name in PRODUCT_CACHES] == ["7", str(SHAPES_KEPT)]
