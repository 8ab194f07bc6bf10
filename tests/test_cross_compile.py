"""The Triton kernels, compiled for GPUs that this machine does not have: they fit, spill nothing, use tensor cores, and are no worse than they were.

Run as a program, in a process without Triton's interpreter, this file launches every operator at real sizes on tensors that have no contents, with
a driver that only compiles; it prints what the machine code of each kernel looks like. The tests read that. What it looked like before lies in
compiled_kernels.json, for each version of Triton that it was made with:

    python tests/test_cross_compile.py   compiles for every architecture and writes the table anew
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
MOST_SHARED = 101376  # bytes a block may have on sm_86, sm_89 and sm_120, the least of NVIDIA's cards from sm_80 on
MOST_SHARED_AMD = 65536  # on gfx942
TENSOR_CORES = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}
ROOT = Path(__file__).parent.parent
TABLE = Path(__file__).parent / "compiled_kernels.json"
WORSE = {"registers": 1, "shared": 1, "products": -1}  # which way each figure of the table gets worse

triton = pytest.importorskip("triton", reason="Triton is not installed: there is nothing to compile")


def compile_everything() -> list[dict[str, Any]]:
    """Every kernel for every architecture, one process an architecture."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    runs = [
        subprocess.Popen(
            [sys.executable, __file__, arch],
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


@pytest.fixture(scope="module")
def kernels() -> list[dict[str, Any]]:
    return compile_everything()


def test_every_kernel_was_compiled(kernels):
    defined = set()
    for file in (ROOT / "kernels").glob("*.py"):
        defined |= {
            f"{file.stem}.{name}" for name in re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.MULTILINE)
        }
    for arch in ARCHITECTURES:
        assert {kernel["name"] for kernel in kernels if kernel["arch"] == arch} == defined


def test_nothing_spills(kernels):
    assert [kernel for kernel in kernels if kernel["spilled"] != 0] == []


def test_shared_memory_fits_every_card(kernels):
    most = {arch: MOST_SHARED if arch.startswith("sm") else MOST_SHARED_AMD for arch in ARCHITECTURES}
    assert [kernel for kernel in kernels if not kernel["shared"] <= most[kernel["arch"]]] == []


def test_16_bit_products_run_on_tensor_cores(kernels):
    products = [kernel for kernel in kernels if kernel["dtype"] != "float32" and "BLOCK_R" in kernel["tile"]]
    assert len(products) >= 40
    assert [kernel for kernel in products if not kernel["products"] > 0] == []


def test_tiles_of_64_rows_use_the_tensor_cores_of_hopper(kernels):
    big = [one for one in kernels if one["arch"] == "sm_90" and one["dtype"] != "float32" and "BLOCK_R" in one["tile"]]
    big = [one for one in big if one["tile"]["BLOCK_M"] >= 64]  # smaller ones use those that sm_80 has
    assert len(big) >= 10
    assert [one for one in big if not one["newest"] > 0] == []


def test_float32_products_stay_float32(kernels):
    assert [kernel for kernel in kernels if kernel["dtype"] == "float32" and kernel["tf32"] != 0] == []


def test_loads_of_the_big_operands_are_asynchronous(kernels):
    for kernel in kernels:
        big = kernel["name"].split(".")[1] in ("_linear_kernel", "_linear_back_kernel")
        if big and kernel["arch"].startswith("sm") and "weight" not in kernel["without"]:
            assert kernel["asynchronous_loads"] > 0, kernel


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_kernel_got_worse(kernels, arch):
    table = json.loads(TABLE.read_text())
    if triton.__version__ not in table:
        pytest.skip(f"compiled_kernels.json has the figures of Triton {', '.join(table)}, not of {triton.__version__}")
    known, now = table[triton.__version__][arch], figures(kernels)[arch]
    assert set(now) == set(known), "kernels came or went: write the table anew"
    for name, figure, before, after in (
        (name, figure, known[name][i], now[name][i]) for name in now for i, figure in enumerate(WORSE)
    ):
        assert WORSE[figure] * after <= WORSE[figure] * before, f"{name}: {figure} went from {before} to {after}"


def figures(kernels: list[dict[str, Any]]) -> dict[str, dict[str, list[int]]]:
    """By architecture and kernel: the figures of WORSE, the worst where it was compiled several times over for arguments of other kinds."""
    found: dict[str, dict[str, list[int]]] = {arch: {} for arch in ARCHITECTURES}
    for kernel in kernels:
        tile = " ".join(f"{option.removeprefix('BLOCK_')}{value}" for option, value in kernel["tile"].items())
        without = f" without {', '.join(kernel['without'])}" if kernel["without"] else ""
        name = f"{kernel['name']} {kernel['dtype']} {tile}{without}"
        before = found[kernel["arch"]].get(name)
        here = [kernel[figure] for figure in WORSE]
        if before:
            here = [worst * max(worst * a, worst * b) for worst, a, b in zip(WORSE.values(), before, here, strict=True)]
        found[kernel["arch"]][name] = here
    return {arch: dict(sorted(named.items())) for arch, named in found.items()}


def write_table() -> None:
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    table[triton.__version__] = figures(compile_everything())
    text = json.dumps(table, indent=1, sort_keys=True)
    TABLE.write_text(re.sub(r"\[\s+(\d+),\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2, \3]", text) + "\n")


def compile_only(arch: str) -> None:
    """From here on Triton specialises and compiles as on a card of that architecture, and launches nothing."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    nvidia = arch.startswith("sm_")
    torch.version.hip = None if nvidia else "compiled for only"
    target = GPUTarget("cuda", int(arch[3:]), 32) if nvidia else GPUTarget("hip", arch, 64)
    most = 232448 if nvidia else MOST_SHARED_AMD
    properties = {"max_shared_mem": most, "max_num_regs": 65536, "multiprocessor_count": 132, "warpSize": 32}
    utils = SimpleNamespace(
        get_device_properties=lambda device: properties, load_binary=lambda *args: (0, 0, 0, 0, 1024)
    )
    driver.set_active(
        SimpleNamespace(
            utils=utils,
            get_current_device=lambda: 0,
            get_current_stream=lambda device=0: 0,
            get_current_target=lambda: target,
            launcher_cls=lambda source, metadata: lambda *args, **options: None,
        )
    )


def describe(kernel: Any, arch: str) -> dict[str, int]:
    """A compiled kernel's registers and spilled ones (bytes of stack, or registers), its shared memory, and how many of some instructions it has."""
    shared = {"shared": kernel.metadata.shared}
    if not arch.startswith("sm_"):
        code = kernel.asm["amdgcn"]
        counts = {name: re.search(rf"\.{name}:\s+(\d+)", code) for name in ("vgpr_count", "vgpr_spill_count")}
        registers, spilled = (int(count[1]) if count else -1 for count in counts.values())
        products = code.count(TENSOR_CORES[arch])
        tf32 = code.count("xf32")
        return {
            "registers": registers,
            "spilled": spilled,
            **shared,
            "products": products,
            "newest": products,
            "tf32": tf32,
        }
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    # Registers that do not fit are spilled to the stack, which nothing else here uses.
    use = {"registers": int(found[1]), "spilled": int(found[2]), **shared}
    newest, oldest = (kernel.asm["ptx"].count(TENSOR_CORES[one]) for one in (arch, "sm_80"))
    others = {"asynchronous_loads": kernel.asm["ptx"].count("cp.async."), "tf32": kernel.asm["ptx"].count("tf32")}
    return {**use, "products": max(newest, oldest), "newest": newest, **others}


def launch_everything() -> None:
    """Call every operator, forward and backward, with the dtypes, sizes and options that select each shipped tile."""
    import torch

    from fastlora import ops
    from fastlora.choice import table

    def run(op: str, *args: Any) -> Any:
        return ops.implementation(op, "triton")(*args)

    def launch_lora(
        dtype: torch.dtype, M: int, R: int, dropout_p: float, adapter: torch.dtype, backward: bool = True
    ) -> None:
        K, N = 4096, 4096
        x, dy, weight, bias = (torch.empty(*shape, dtype=dtype) for shape in ((M, K), (M, N), (N, K), (N,)))
        a, b = torch.empty(R, K, dtype=adapter), torch.empty(N, R, dtype=adapter)
        order, offsets = torch.empty(M, dtype=torch.int64), torch.empty(5, dtype=torch.int64)
        launch("lora_linear", x, [dy], [weight], [bias], [a], [b], [dropout_p], None, None, backward)
        launch("multi_lora", x, [dy], [weight], [bias], [a, a], [b, b], [dropout_p, 0.0], order, offsets, backward)

    def launch(
        case: str, x: Any, dy: Any, weight: Any, bias: Any, a: Any, b: Any, p: Any, order: Any, offsets: Any,
        backward: bool = True,
    ) -> None:  # fmt: skip
        seed, scale = torch.zeros(len(weight), dtype=torch.int64), [1.0] * len(a)
        _, xa, keep = run(case, x, weight, bias, a, b, scale, p, seed, order, offsets)
        if backward:
            numbers = scale, p, order, offsets
            run(f"{case}_backward", dy, x, weight, a, b, xa, keep, *numbers, True, True, True)

    def launch_shared(dtype: torch.dtype, M: int, R: int, widths: tuple[int, ...]) -> None:
        """The query, key and value of grouped attention."""
        K, G = 4096, len(widths)
        x, a = torch.empty(M, K, dtype=dtype), [torch.empty(R, K)] * G
        dy, weight, b = ([torch.empty(*shape) for shape in shapes] for shapes in zip(
            *(((M, N), (N, K), (N, R)) for N in widths), strict=True))  # fmt: skip
        dy, weight = ([one.to(dtype) for one in each] for each in (dy, weight))
        bias = [None] * G
        launch("lora_linear_shared", x, dy, weight, bias, a, b, [0.1] * G, None, None)
        order, offsets = torch.empty(M, dtype=torch.int64), torch.empty(5, dtype=torch.int64)
        every = [one for one in a for _ in range(2)], [one for one in b for _ in range(2)]
        launch("multi_lora_shared", x, dy, weight, bias, *every, [0.1] * 2 * G, order, offsets)

    # Products need no hands: kernels are compiled for them, and nothing is computed.
    torch.nn.functional.linear = lambda x, weight, bias=None: x.new_empty(x.shape[0], weight.shape[0])
    torch.mm = lambda left, right, out: out

    launch_lora(torch.bfloat16, 8192, 16, 0.1, torch.float32)
    launch_lora(torch.float32, 8192, 64, 0.1, torch.float32)
    launch_lora(torch.float16, 8192, 128, 0.1, torch.float16)
    launch_lora(torch.bfloat16, 8192, 128, 0.1, torch.float32, backward=False)
    launch_lora(torch.float16, 64, 16, 0.0, torch.float16)
    launch_lora(torch.bfloat16, 32, 16, 0.0, torch.bfloat16, backward=False)
    launch_shared(torch.bfloat16, 8192, 16, (4096, 1024, 1024))
    launch_shared(torch.bfloat16, 32, 16, (4096, 1024, 1024))
    table.forced_way = "library"
    launch_lora(torch.bfloat16, 8192, 16, 0.1, torch.float32)
    launch_lora(torch.float32, 8192, 64, 0.1, torch.float32)

    B, T, P, D = 8, 512, 100, 4096
    embeds, prompts = torch.empty(B, T, D, dtype=torch.bfloat16), torch.empty(P, D)
    starts, index, numbers = (
        torch.tensor([0, P]),
        torch.zeros(B, dtype=torch.int64),
        torch.zeros(B, T, dtype=torch.int64),
    )
    out, *_, source = run(
        "prefix_concat", prompts, starts, P, index, embeds, None, None, numbers.bool(), numbers, numbers
    )
    run("prefix_concat", prompts, starts, P, index, None, numbers, embeds[0], numbers, None, None)
    run("prefix_concat_backward", out, source, P, T, True, True)


def described(arch: str) -> Iterator[dict[str, Any]]:
    from triton.runtime.jit import JITFunction

    seen: dict[str, dict[str, Any]] = {}
    run = JITFunction.run

    def run_and_describe(self: Any, *args: Any, **options: Any) -> Any:
        kernel = run(self, *args, **options)
        if kernel.hash not in seen:
            tile = {name: value for name, value in options.items() if name.startswith(("BLOCK", "LAYERS"))}
            name = f"{Path(self.fn.__code__.co_filename).stem}.{self.fn.__name__}"
            values = dict(zip(self.arg_names, args, strict=False))
            of = args[0] if args[0] is not None else values["dx_ptr"]
            without = [argument.split("_ptr")[0] for argument, value in values.items() if value is None]
            dtype = str((of[0] if isinstance(of, tuple) else of).dtype).removeprefix("torch.")
            what = {"arch": arch, "name": name, "dtype": dtype, "tile": tile, "without": without}
            seen[kernel.hash] = {**what, **describe(kernel, arch)}
        return kernel

    JITFunction.run = run_and_describe
    compile_only(arch)
    launch_everything()
    return iter(seen.values())


if __name__ == "__main__":
    if len(sys.argv) == 1:
        write_table()
    for architecture in sys.argv[1:]:
        for kernel in described(architecture):
            print(json.dumps(kernel))
