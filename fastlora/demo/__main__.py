"""``python -m fastlora.demo --output DIR``"""

import argparse
from pathlib import Path

from transformers.utils import logging

from fastlora.demo import main

parser = argparse.ArgumentParser(prog="python -m fastlora.demo", description="Adapt the base model to summarisation.")
parser.add_argument("--output", type=Path, default=Path("demo"), help="the folder to write to")
options = parser.parse_args()
logging.disable_progress_bar()
main(options.output)
