"""python benchmarks/card_summary.py FOLDER: what `make gpu` has left there, in a few lines. It reads files and imports nothing else."""

import json
import sys
from pathlib import Path
from typing import Any

MOST_TESTS = 12  # of those that did not pass, by name


def read(path: Path) -> Any:
    """None where there is no such file, or no whole one."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def lines_of_tests(content: Any) -> list[str]:
    bad = [
        (test, one) for test, one in content["tests"].items() if one["outcome"] not in ("passed", "skipped", "not run")
    ]
    counts = ", ".join(f"{count} {outcome}" for outcome, count in content["counts"].items())
    lines = [f"tests: {counts}", *(f"  cannot be listed: {file}" for file in content["unlisted"])]
    lines += [f"  {one['outcome']}: {test}" for test, one in bad[:MOST_TESTS]]
    return lines + ([f"  and {len(bad) - MOST_TESTS} more"] if len(bad) > MOST_TESTS else [])


def line_of_goal(row: Any) -> str:
    values = {"fastlora": row["ours"], **({} if row["peft"] is None else {"peft": row["peft"]}), **row["rivals"]}
    shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
    goal = "" if row["goal"] is None else f" (goal {'at least' if row['at_least'] else 'at most'} {row['goal']:g})"
    frozen = row["seconds"].get("frozen")
    beside = "" if frozen is None else f", frozen {1e6 * frozen:.1f} us"
    return f"  {row['what']}{goal}: {shown} {row['unit']}; runs {row['implementation'] or 'by choice'}{beside}"


def summary(folder: Path) -> list[str]:
    whole = read(folder / "gpu.json")
    if whole is None:
        return [f"{folder} holds no gpu.json"]
    machine = whole["machine"]
    lines = [f"{machine['name']}, {machine['date']}, commit {machine['commit']}, {whole['command']}"]
    lines += [f"{one['part']}: {one['state']}, {one.get('seconds', '?')} s" for one in whole["parts"]]
    tests = read(folder / "tests.json")
    lines += [] if tests is None else lines_of_tests(tests)
    for path in sorted([*folder.glob("*-first.json"), *folder.glob("*-goals.json")]):
        content = read(path)
        if content and content["machine"]["device"] == "cuda" and content["machine"]["name"] == machine["name"]:
            lines += [f"{path.name}:", *map(line_of_goal, content["rows"])]
            lines += [f"  not timed: {name}" for name in content["failed"]]
    return lines


if __name__ == "__main__":
    print("\n".join(summary(Path(sys.argv[1]))))
