"""`python -m benchmarks.kills`: trainings that are killed at random moments end, resumed, with the bits of one that was not."""

import os
import re
import subprocess
import sys
from pathlib import Path


def test_killed_and_resumed() -> None:
    """KILLS: how many of each method."""
    kills = os.environ.get("KILLS", "1")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.kills", "--kills", kills],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600 + 60 * int(kills),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = re.findall(r"^(\w+): (\d+) of (\d+) bit-identical \(.*\d+ s\)$", done.stdout, re.MULTILINE)
    assert lines == [("lora", kills, kills), ("full", kills, kills)]
