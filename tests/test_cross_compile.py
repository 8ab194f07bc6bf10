"""The Triton kernels, compiled for GPUs that this machine does not have: they fit, spill nothing, and use tensor cores.

Run as a program, in a process without Triton's interpreter, this file launches every operator at real sizes on tensors that have no contents, with
a driver that only compiles; it prints what the machine code of each kernel looks like. The tests read that.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ARCHITECTURES = (80, 90)
MOST_SHARED = 101376  # bytes a block may have on sm_86, sm_89 and sm_120, the least of all cards from sm_80 on
ROOT = Path(__file__).parent.parent

triton = pytest.importorskip("triton", reason="Triton is not installed: there is nothing to compile")


@pytest.fixture(scope="module")
def kernels() -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    runs = [
        subprocess.Popen(
            [sys.executable, __file__, str(arch)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for arch in ARCHITECTURES
    ]
    outputs = [run.communicate() for run in runs]
    for run, (_, errors) in zip(runs, outputs, strict=True):
        assert run.returncode == 0, errors[-4000:]
    return [json.loads(line) for out, _ in outputs for line in out.splitlines()]


def test_every_kernel_was_compiled(kernels):
    defined = set()
    for file in (ROOT / "kernels").glob("*.py"):
        defined |= {
            f"{file.stem}.{name}" for name in re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.MULTILINE)
        }
    for arch in ARCHITECTURES:
        assert {kernel["name"] for kernel in kernels if kernel["arch"] == arch} == defined


def test_nothing_spills(kernels):
    # Registers that do not fit are spilled to the stack, which nothing else here uses.
    assert [kernel for kernel in kernels if kernel["stack"] != 0] == []


def test_shared_memory_fits_every_card_from_sm_80_on(kernels):
    assert [kernel for kernel in kernels if not kernel["shared"] <= MOST_SHARED] == []


def test_16_bit_products_run_on_tensor_cores(kernels):
    products = [kernel for kernel in kernels if kernel["dtype"] != "float32" and "BLOCK_R" in kernel["tile"]]
    assert len(products) >= 20
    for kernel in products:
        if kernel["arch"] == 90 and kernel["tile"]["BLOCK_M"] >= 64:
            assert kernel["wgmma"] > 0, kernel
        else:
            # wgmma takes 64 rows of its first operand or more; smaller tiles use mma.sync, as all tiles on sm_80 do.
            assert kernel["wgmma"] + kernel["mma"] > 0, kernel


def test_loads_of_the_big_operands_are_asynchronous(kernels):
    for kernel in kernels:
        if kernel["name"] in ("lora_linear._linear_kernel", "lora_linear._linear_back_kernel"):
            assert kernel["asynchronous_loads"] > 0, kernel


def compile_only(arch: int) -> None:
    """From here on Triton specialises and compiles as on a card of that architecture, and launches nothing."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    properties = {"max_shared_mem": 232448, "max_num_regs": 65536, "multiprocessor_count": 132, "warpSize": 32}
    utils = SimpleNamespace(
        get_device_properties=lambda device: properties, load_binary=lambda *args: (0, 0, 0, 0, 1024)
    )
    driver.set_active(
        SimpleNamespace(
            utils=utils,
            # Compiled kernels are kept by device: the architecture stands for the device, so that they are not mixed up.
            get_current_device=lambda: arch,
            get_current_stream=lambda device=0: 0,
            get_current_target=lambda: GPUTarget("cuda", arch, 32),
            launcher_cls=lambda source, metadata: lambda *args, **options: None,
        )
    )


def describe(kernel: Any) -> dict[str, int]:
    """A compiled kernel's registers and bytes of stack a thread, its shared memory, and how many of some instructions it has."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    names = {"wgmma": "wgmma.mma_async", "mma": "mma.sync", "asynchronous_loads": "cp.async."}
    counts = {name: kernel.asm["ptx"].count(instruction) for name, instruction in names.items()}
    return {"registers": int(found[1]), "stack": int(found[2]), "shared": kernel.metadata.shared, **counts}


def launch_everything() -> None:
    """Call every operator, forward and backward, with the dtypes, sizes and options that select each shipped tile."""
    import torch

    from fastlora import ops

    def launch_lora(dtype: torch.dtype, M: int, R: int, dropout_p: float, adapter: torch.dtype) -> None:
        K, N = 4096, 4096
        x, dy, weight, bias = (torch.empty(*shape, dtype=dtype) for shape in ((M, K), (M, N), (N, K), (N,)))
        a, b, seed = (
            torch.empty(R, K, dtype=adapter),
            torch.empty(N, R, dtype=adapter),
            torch.zeros((), dtype=torch.int64),
        )
        y, xa = ops.implementation("lora_linear", "triton")(x, weight, bias, a, b, 1.0, dropout_p, seed)
        ops.implementation("lora_linear_backward", "triton")(
            dy, x, weight, a, b, xa, 1.0, dropout_p, seed, True, True, True
        )

        order, offsets = torch.empty(M, dtype=torch.int64), torch.empty(5, dtype=torch.int64)
        groups = ([a, a], [b, b], [1.0, 1.0], [dropout_p, 0.0], seed, order, offsets)
        ops.implementation("multi_lora", "triton")(x, weight, bias, *groups)
        ops.implementation("multi_lora_backward", "triton")(
            dy, x, weight, *groups[:2], xa, *groups[2:], True, True, True
        )

    for dtype in (torch.bfloat16, torch.float32):
        launch_lora(dtype, 8192, 16, 0.1, torch.float32)
    for M, R, dropout_p in ((8192, 128, 0.1), (64, 16, 0.0), (8, 16, 0.1)):
        launch_lora(torch.float16, M, R, dropout_p, torch.float16)

    B, T, P, D = 8, 512, 100, 4096
    embeds, prompts = torch.empty(B, T, D, dtype=torch.bfloat16), torch.empty(P, D)
    starts, index, numbers = (
        torch.tensor([0, P]),
        torch.zeros(B, dtype=torch.int64),
        torch.zeros(B, T, dtype=torch.int64),
    )
    forward, backward = (
        ops.implementation("prefix_concat", "triton"),
        ops.implementation("prefix_concat_backward", "triton"),
    )
    out, *_, source = forward(prompts, starts, P, index, embeds, None, None, numbers.bool(), numbers, numbers)
    forward(prompts, starts, P, index, None, numbers, embeds[0], numbers, None, None)
    backward(out, source, P, T, True, True)


def main(arch: int) -> None:
    from triton.runtime.jit import JITFunction

    described: dict[str, dict[str, Any]] = {}
    run = JITFunction.run

    def run_and_describe(self: Any, *args: Any, **options: Any) -> Any:
        kernel = run(self, *args, **options)
        if kernel.hash not in described:
            tile = {name: value for name, value in options.items() if name.startswith("BLOCK")}
            name = f"{Path(self.fn.__code__.co_filename).stem}.{self.fn.__name__}"
            dtype = str(args[0].dtype).removeprefix("torch.")
            described[kernel.hash] = {"arch": arch, "name": name, "dtype": dtype, "tile": tile, **describe(kernel)}
        return kernel

    JITFunction.run = run_and_describe
    compile_only(arch)
    launch_everything()
    for kernel in described.values():
        print(json.dumps(kernel))


if __name__ == "__main__":
    main(int(sys.argv[1]))
