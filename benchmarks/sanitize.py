"""python -m benchmarks.sanitize: every implementation once on odd sizes, for compute-sanitizer, under which all is many times slower.

It imports no more than it needs. Exit code 1: a result is wrong.
"""

import sys

import torch

from fastlora import measure, ops

DTYPES = (torch.bfloat16, torch.float32)


def flaws(device: torch.device) -> list[str]:
    """What is wrong with the implementations on this device, in sizes that no tile divides, with dropout and a bias."""
    found = []
    for make in measure.PROBLEMS.values():
        for dtype in DTYPES:
            calls = make(*measure.ODD_SHAPE, dtype, device, True)
            for one, its_calls in calls.items():
                for name in ops.candidates(one, device, dtype):
                    for way in measure.ways(one, name):
                        flaw = measure.find_flaw(one, name, its_calls[0], way)
                        found += [] if flaw is None else [f"{one}, {name} {way}: {flaw}"]
                        print(f"{one}, {name} {way}, {dtype}: ran", flush=True)
    return found


if __name__ == "__main__":
    wrong = flaws(torch.device(sys.argv[1] if len(sys.argv) > 1 else "cuda"))
    print("\n".join(wrong))
    sys.exit(bool(wrong))
