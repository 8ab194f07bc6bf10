#!/usr/bin/env bash
# `make gpu`: on a machine with a CUDA card, without a network: build, run the tests on the card, run the benchmarks.
# Nothing is installed: the extension is built in place. benchmarks/gpu.sh build | test | bench runs one part.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
parts=${*:-build test bench}
failed=()

"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "make gpu: torch sees no CUDA card"; exit 1; }

for part in $parts; do
  echo "== $part"
  case $part in
    build) "$PYTHON" setup.py -q build_ext --inplace ;;
    test)
      "$PYTHON" -m pytest -q -p no:cacheprovider \
        tests/test_lora_linear.py tests/test_multi_lora.py tests/test_prefix_concat.py tests/test_kernels.py tests/test_peft.py
      ;;
    bench) "$PYTHON" -m benchmarks --device cuda --json --no-gate ;;  # part test is the gate
    *) echo "make gpu: unknown part '$part', expected build, test or bench"; exit 2 ;;
  esac || failed+=("$part")
done

[ ${#failed[@]} -eq 0 ] || { echo "make gpu: failed: ${failed[*]}"; exit 1; }
