"""A trained adapter, merged into its base or kept beside it, in folders that vLLM serves.

python examples/merge_and_serve.py                     trains a small adapter first, on a CPU in seconds
python examples/merge_and_serve.py path/to/adapter     a folder in PEFT's format

It needs no vLLM: it prepares the folders and prints the commands that load them.
"""

import argparse
import shlex
from pathlib import Path

from fastlora import adapters
from fastlora.config import TrainConfig
from fastlora.demo import BASE_MODEL
from fastlora.demo.tasks import generate, write_jsonl
from fastlora.merge import MergeReport, merge
from fastlora.train import train

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM's --max-lora-rank takes


def main(arguments: list[str] | None = None) -> tuple[MergeReport, list[str]]:
    """Merge an adapter; returns what rounding cost, and the commands that serve the merged model and the adapter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", nargs="?", type=Path, help="else one is trained")
    parser.add_argument("--output", type=Path, default=Path("merge-output"))
    options = parser.parse_args(arguments)

    adapter = options.adapter or options.output / "adapter"
    if options.adapter is None:
        options.output.mkdir(parents=True, exist_ok=True)
        data = options.output / "train.jsonl"
        write_jsonl(generate("summarization", 64, seed=0), data)
        train(TrainConfig(BASE_MODEL, data=data, output=adapter, max_steps=10, batch_size=4, lr=3e-3, overwrite=True))

    # As `fastlora merge --adapter ADAPTER --output MERGED --overwrite`. The base is the one that the adapter names.
    report = merge(None, adapter, options.output / "merged", overwrite=True)
    print(f"{report.layers} layers in {report.dtype}; rounding lost {report.update_relative_error:.1%} of the update")

    read = adapters.read(adapter)  # checks every tensor
    rank = max(tensor.shape[0] for name, tensor in read.tensors.items() if "lora_A" in name)
    beside = ["--enable-lora", "--max-lora-rank", str(min(one for one in RANKS if one >= rank))]
    beside += ["--lora-modules", f"{adapter.name}={adapter}"]
    commands = [shlex.join(["vllm", "serve", *what]) for what in ([report.output], [str(read.base), *beside])]
    print("the merged model:", commands[0], "the adapter beside its base:", commands[1], sep="\n")
    return report, commands


if __name__ == "__main__":
    main()
