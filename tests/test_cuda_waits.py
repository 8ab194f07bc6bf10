"""Where a thread of a CUDA C++ kernel waits in vain it says for what: the same words on the emulated card and in a build for tests on a real one."""

import ctypes
import subprocess
from collections.abc import Iterator
from pathlib import Path

import emulated
import pytest
import test_cuda_compile
import torch
from bounds import make_layer
from test_cuda_lora_linear import CUDA, SCALE

pytestmark = pytest.mark.skipif(not emulated.available(), reason="needs a C++20 compiler")


@pytest.fixture(scope="module")
def card() -> ctypes.CDLL:
    return emulated.load()


@pytest.fixture
def hopper(card: ctypes.CDLL) -> Iterator[ctypes.CDLL]:
    card.emulated_capability(90)
    yield card
    card.emulated_capability(80)
    card.emulated_lose_box(-1)


CHECKED = """
#include "cuda/product_launch.cuh"
using namespace fastlora;
template __global__ void fastlora::product_sm90_kernel<__half, OneAdapter, false, false>(const __grid_constant__ sm90::Task<__half, OneAdapter>);
"""


def test_a_build_for_tests_looks_at_the_clock(tmp_path: Path) -> None:
    """And is the same kernel otherwise: no stack, no tensor cores that wait for one another. (test_cuda_compile: other builds do not look.)"""
    if isinstance(why := test_cuda_compile.read_setup()["find_cuda"](), str):
        pytest.skip(f"nvcc is not installed, or not wanted: {why}")
    if (program := test_cuda_compile.cuobjdump()) is None:
        pytest.skip("no cuobjdump: neither Triton nor CUDA's own is installed")
    (tmp_path / "one.cu").write_text(CHECKED)
    flags = [
        *test_cuda_compile.read_setup()["CUDA_FLAGS"],
        f"-I{emulated.ROOT / 'csrc'}",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-Xptxas=-v",
    ]
    command = [test_cuda_compile.nvcc(), *flags, "-DFASTLORA_CUDA_CHECKS", "-cubin", "one.cu", "-o", "one.cubin"]
    done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert test_cuda_compile.read_usage(done.stderr)[1] == []
    code = subprocess.run([program, "-sass", "one.cubin"], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert "GLOBALTIMER" in code.stdout


def run() -> torch.Tensor:
    x, weight, bias, lora_a, lora_b, _ = (tensor.detach() for tensor in make_layer(140, 72, 264, 4, torch.bfloat16))
    forward, _ = CUDA
    return forward(x, [weight], [bias], [lora_a], [lora_b], [SCALE], [0.0], None, None, None)[0][0]


@pytest.mark.parametrize("lost", [0, 5, 13])
def test_a_box_that_never_arrives(hopper: ctypes.CDLL, lost: int) -> None:
    """Four tiles, each of two steps and one rank step, each of a box of either operand, on two multiprocessors one after the other."""
    hopper.emulated_lose_box(lost)
    words = r"waited in vain for (?:the boxes of a stage|a stage's consumers), stage [0-3], tile [0-3] \(block [01],0,0, thread \d+,0,0\)"
    with pytest.raises(RuntimeError, match=words):
        run()
    assert run().isfinite().all()
