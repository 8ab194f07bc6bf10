"""python -m benchmarks.sanitize [DEVICE [IMPLEMENTATION ...]]: each implementation, or those named, once on odd sizes, for compute-sanitizer, under
which all is many times slower.

It imports no more than it needs. Exit code 1: a result is wrong.
"""

import sys
from collections.abc import Collection

import torch

from fastlora import ops
from fastlora.choice import measure, problems

DTYPES = (torch.bfloat16, torch.float32)


def flaws(device: torch.device, wanted: Collection[str] = ()) -> list[str]:
    """What is wrong with the implementations on this device, in sizes that no tile divides, with dropout and a bias. wanted: none for all."""
    found = []
    for operator in problems.operators.values():
        for dtype in DTYPES:
            calls = operator.calls(*measure.ODD_SHAPE, dtype, device, True)
            for one, its_calls in calls.items():
                for name in ops.candidates(one, device, dtype):
                    if wanted and name not in wanted:
                        continue
                    for way in measure.ways(one, name):
                        flaw = measure.find_flaw(one, name, its_calls[0], way)
                        found += [] if flaw is None else [f"{one}, {name} {way}: {flaw}"]
                        print(f"{one}, {name} {way}, {dtype}: ran", flush=True)
    return found


if __name__ == "__main__":
    wrong = flaws(torch.device((sys.argv[1:] or ["cuda"])[0]), sys.argv[2:])
    print("\n".join(wrong))
    sys.exit(bool(wrong))
