"""python -m benchmarks.probe call | sanitize [DEVICE [IMPLEMENTATION ...]]: a few calls for a tool that looks at kernels, and little else imported.

call       lora_linear at 4096², forward and backward in CUDA C++, three times: for a profiler
sanitize   each implementation, or those named, once on odd sizes: for compute-sanitizer, under which all is many times slower; exit code 1 where a
           result is wrong
"""

import sys
from collections.abc import Callable, Collection

import torch

from fastlora import functional, ops
from fastlora.choice import measure, problems

ROWS, WIDTH, RANK, CALLS = 8192, 4096, 16, 3
DTYPES = (torch.bfloat16, torch.float32)
Shape = tuple[int, int, int]
Say = Callable[[str], object]


def call(device: torch.device, rows: int = ROWS, width: int = WIDTH) -> None:
    """In bfloat16 with dropout, as a layer trains."""
    torch.manual_seed(0)
    x, dy = (torch.randn(rows, width, device=device, dtype=torch.bfloat16) for _ in range(2))
    weight = torch.randn(width, width, device=device, dtype=torch.bfloat16) * width**-0.5
    lora_a, lora_b = (torch.randn(*shape, device=device) for shape in ((RANK, width), (width, RANK)))
    leaves = [one.requires_grad_() for one in (x, lora_a, lora_b)]
    for _ in range(CALLS):
        torch.autograd.grad(functional.lora_linear(x, weight, None, lora_a, lora_b, 2.0, dropout_p=0.1), leaves, dy)


def flaws(
    device: torch.device, wanted: Collection[str] = (), of: str = "", shape: Shape = measure.ODD_SHAPE, say: Say = lambda _: None
) -> list[str]:  # fmt: skip
    """What is wrong with the implementations on this device, in sizes that no tile divides, with dropout and a bias. wanted: none for all.

    of: one operator, if not all. shape: M, K, N. say: told what ran.
    """
    found = []
    for operator in [of] if of else problems.operators:
        for dtype in DTYPES:
            calls = problems.operators[operator].calls(*shape, dtype, device, True)
            for one, its_calls in calls.items():
                for name in ops.candidates(one, device, dtype):
                    if wanted and name not in wanted:
                        continue
                    for way in measure.ways(one, name):
                        flaw = measure.find_flaw(one, name, its_calls[0], way)
                        found += [] if flaw is None else [f"{one}, {name} {way}: {flaw}"]
                        say(f"{one}, {name} {way}, {dtype}: ran")
    return found


def main(what: str, device: str = "cuda", *names: str) -> int:
    """Returns the exit code."""
    if what == "call":
        ops.forced = "cuda"
        call(torch.device(device))
        torch.cuda.synchronize()
        return 0
    wrong = flaws(torch.device(device), names, say=lambda text: print(text, flush=True))
    print("\n".join(wrong))
    return int(bool(wrong))


if __name__ == "__main__":
    if sys.argv[1:2] not in (["call"], ["sanitize"]):
        sys.exit("usage: python -m benchmarks.probe call | sanitize [DEVICE [IMPLEMENTATION ...]]")
    sys.exit(main(*sys.argv[1:]))
