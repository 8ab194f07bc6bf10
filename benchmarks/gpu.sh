#!/usr/bin/env bash
# `make gpu`: what a machine with a CUDA card has to say, without a network and within ten minutes. Nothing is installed.
#
#   benchmarks/gpu.sh [--out FOLDER] [build | test | sanitize | tune | bench | plot] ...
#
#   build      the native extension, in place, and what this machine has
#   test       the device tests
#   sanitize   every implementation on odd sizes under compute-sanitizer's memcheck and racecheck, where there is one
#   tune       each implementation against plain PyTorch: FOLDER/KIND.json, the table that `bench` lets choose, and that can ship
#   bench      the goals and the cost of a call: FOLDER/DATE-CARD-{goals,launch}.json
#   plot       the same as PNG
#
# All parts by default. FOLDER is $OUT, else benchmarks/results; gpu.json there says what became of each part, gpu.log holds all that was
# printed. A part that takes longer than its limit is stopped, and what it had written stays; LIMIT_BENCH=500 changes one.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
declare -A limits=([build]=75 [test]=120 [sanitize]=60 [tune]=75 [bench]=225 [plot]=15) # 570 seconds in all
out=${OUT:-benchmarks/results}
if [ "${1:-}" = --out ]; then
  out=${2:?"make gpu: --out: expected a folder"}
  shift 2
fi
parts=${*:-build test sanitize tune bench plot}
for part in $parts; do
  [ -n "${limits[$part]:-}" ] || { echo "make gpu: unknown part '$part', expected ${!limits[*]}"; exit 2; }
done
"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "make gpu: torch sees no CUDA card"; exit 1; }
mkdir -p "$out"
out=$(cd "$out" && pwd)
exec > >(tee -a "$out/gpu.log") 2>&1
head=$("$PYTHON" -c 'import dataclasses, json, torch; from benchmarks.machine import describe
print(json.dumps(dataclasses.asdict(describe(torch.device("cuda")))))') || exit 1
table="$out/$("$PYTHON" -c 'from fastlora import tuned; print(tuned.kind_of("cuda"))').json"

build() {
  local code=0
  FASTLORA_REQUIRE_NATIVE=1 "$PYTHON" setup.py -q build_ext --inplace || code=$?
  [ "$code" = 0 ] || "$PYTHON" setup.py -q build_ext --inplace || return # the other parts go on with what can be built
  "$PYTHON" -m fastlora env
  return "$code"
}

test_() {
  local many=() # processes, where pytest can have several: a file's tests too, most of whose time is Triton's compiler's
  "$PYTHON" -c 'import xdist' 2>/dev/null && many=(-n 8)
  "$PYTHON" -m pytest -q -p no:cacheprovider "${many[@]}" --junitxml "$out/tests.xml" -k 'cuda or test_kernels' \
    tests/test_lora_linear.py tests/test_multi_lora.py tests/test_prefix_concat.py tests/test_kernels.py tests/test_cuda_card.py
}

sanitize() {
  local tool check
  tool=$(PATH=$PATH:/usr/local/cuda/bin:/usr/local/cuda/compute-sanitizer command -v compute-sanitizer) ||
    { echo "compute-sanitizer was not found: left out"; return 0; }
  for check in memcheck racecheck; do
    echo "-- $check"
    # Without torch's caching allocator, so that each tensor has bounds of its own.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$tool" --tool "$check" --target-processes application-only --error-exitcode 9 \
      "$PYTHON" -m benchmarks.sanitize || return
  done
}

tune() {
  "$PYTHON" -m fastlora tune --device cuda --seconds $((seconds - 20)) --output "$table"
}

bench() {
  local code=3 began=$SECONDS resume=()
  export FASTLORA_TRIAL=0 # what `tune` has measured, and nothing else
  [ -f "$table" ] && export FASTLORA_TABLE=$table
  "$PYTHON" -m benchmarks launch --device cuda --out "$out" || echo "launch: failed"
  while [ "$code" = 3 ]; do # something broke the process: another one goes on without it
    "$PYTHON" -m benchmarks goals --device cuda --out "$out" --seconds $((seconds - 60 - SECONDS + began)) "${resume[@]}"
    code=$?
    resume=(--resume)
  done
  return $code
}

plot() {
  "$PYTHON" -m benchmarks.plot "$out"
}

# Each part is a process of its own, so that it can be stopped with all that it started.
export -f build test_ sanitize tune bench plot
export PYTHON out table
states=() failed=()
for part in $parts; do
  limit=LIMIT_${part^^}
  export seconds=${!limit:-${limits[$part]}}
  echo "== $part, at most $seconds s"
  began=$SECONDS
  timeout --signal INT --kill-after 10 "$seconds" bash -c "${part/#test/test_}"
  code=$?
  case $code in 0) state=done ;; 124 | 137) state="out of time" ;; *) state="failed ($code)" ;; esac
  [ "$code" = 0 ] || failed+=("$part: $state")
  states+=("{\"part\": \"$part\", \"state\": \"$state\", \"seconds\": $((SECONDS - began))}")
  printf '{"machine": %s,\n "command": "benchmarks/gpu.sh %s",\n "parts": [%s]}\n' "$head" "$parts" "$(IFS=,; echo "${states[*]}")" >"$out/gpu.json"
done

echo "== results, in $out"
"$PYTHON" -m benchmarks --readme --device cuda --out "$out"
[ ${#failed[@]} -eq 0 ] || { printf 'make gpu: %s\n' "${failed[@]}"; exit 1; }
