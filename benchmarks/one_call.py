"""python -m benchmarks.one_call: lora_linear at 4096², forward and backward in CUDA C++, a few times, for a profiler to look at."""

import torch

from fastlora import ops

ROWS, WIDTH, RANK, CALLS = 8192, 4096, 16, 3


def main(device: torch.device, rows: int = ROWS, width: int = WIDTH) -> None:
    """On bfloat16 with dropout, as a layer trains."""
    torch.manual_seed(0)
    x, dy = (torch.randn(rows, width, device=device, dtype=torch.bfloat16) for _ in range(2))
    weight = torch.randn(width, width, device=device, dtype=torch.bfloat16) * width**-0.5
    lora_a, lora_b = (torch.randn(*shape, device=device) for shape in ((RANK, width), (width, RANK)))
    seed = torch.zeros((), dtype=torch.int64, device=device)
    forward, backward = (ops.implementation(op, "cuda") for op in ("lora_linear", "lora_linear_backward"))
    for _ in range(CALLS):
        _, xa, keep = forward(x, weight, None, lora_a, lora_b, 2.0, 0.1, seed)
        backward(dy, x, weight, lora_a, lora_b, xa, keep, 2.0, 0.1, True, True, True)


if __name__ == "__main__":
    main(torch.device("cuda"))
    torch.cuda.synchronize()
