#!/usr/bin/env bash
# `make gpu`: what a machine with a CUDA card has to say, without a network. Nothing is installed, no setting of the card is touched.
#
#   benchmarks/gpu.sh [--out FOLDER] [first | rest | build | test | bare | counters | tune | bench | sanitize | plot] ...
#
# What a card must say first stands alone, for one that is there for minutes, and so does the rest; both by default.
#
#   first        build test bare counters: 200 seconds
#   rest         build tune bench sanitize plot: 490 seconds
#
#   build        the native extension in place, what this machine has, and beside it (for `test`) a build whose kernels do not wait forever
#   test         the device tests, CUDA C++'s smallest first, each piece in a process of its own: FOLDER/tests.json, tests.xml
#   bare         the forward's main kernel, a layer of 4096² and decode, frozen and fastlora alone, as CUDA graphs: FOLDER/DATE-CARD-first.json
#   counters     what Nsight Compute says of each kernel of that layer, where there is an ncu: FOLDER/counters.txt
#   tune         each implementation against plain PyTorch: FOLDER/KIND.json, the table that `bench` lets choose, and that can ship
#   bench        the goals beside every rival, the model, the cost of a call: FOLDER/DATE-CARD-{goals,launch}.json
#   sanitize     every implementation on odd sizes under compute-sanitizer's memcheck and racecheck, where there is one
#   plot         the figures of `bench` as PNG
#
# FOLDER is $OUT, else benchmarks/results. gpu.json there says what became of each part, and which one runs; gpu.log holds all that was printed. A part
# that takes longer than its limit is stopped; what it had found is in its files, which are written as it goes. LIMIT_BENCH=500 changes one.
# FASTLORA_COMMIT is the commit that results name where the checkout was copied without its .git.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
declare -A limits=([build]=70 [test]=70 [bare]=40 [counters]=20 [tune]=90 [bench]=215 [sanitize]=100 [plot]=15)
declare -A several=([first]="build test bare counters" [rest]="build tune bench sanitize plot")
out=${OUT:-benchmarks/results}
if [ "${1:-}" = --out ]; then
  out=${2:?"make gpu: --out: expected a folder"}
  shift 2
fi
parts=()
[ $# -gt 0 ] || set -- first rest
for name in "$@"; do
  [ -n "${limits[$name]:-}${several[$name]:-}" ] || { echo "make gpu: unknown part '$name', expected ${!several[*]} ${!limits[*]}"; exit 2; }
  for part in ${several[$name]:-$name}; do
    [[ " ${parts[*]} " = *" $part "* ]] || parts+=("$part")
  done
done
mkdir -p "$out"
out=$(cd "$out" && pwd)
exec > >(tee -a "$out/gpu.log") 2>&1
# A line each: the machine, and the kind of card that tables go by.
mapfile -t card < <(timeout --kill-after 5 60 "$PYTHON" -c 'import dataclasses, json, torch
torch.cuda.is_available() or exit("make gpu: torch sees no CUDA card")
from benchmarks.machine import this_machine
machine = this_machine(torch.device("cuda"))
print(json.dumps(dataclasses.asdict(machine)), machine.kind, sep="\n")')
[ ${#card[@]} = 2 ] || { echo "make gpu: the card does not answer"; exit 1; }
table="$out/${card[1]}.json"
checked=$PWD/build/checked

build() {
  local code=0 other=
  if [[ " $parts " = *" test "* ]]; then
    FASTLORA_CUDA_CHECKS=1 FASTLORA_REQUIRE_NATIVE=1 "$PYTHON" setup.py -q build --build-lib "$checked" &
    other=$!
  fi
  FASTLORA_REQUIRE_NATIVE=1 "$PYTHON" setup.py -q build_ext --inplace || code=$?
  [ "$code" = 0 ] || "$PYTHON" setup.py -q build_ext --inplace || return # the other parts go on with what can be built
  "$PYTHON" -m fastlora env
  [ -z "$other" ] || wait "$other" || { code=$?; rm -rf "$checked"; } # `test` goes on without
  return "$code"
}

test_() {
  local within=$PWD
  [ ! -d "$checked/fastlora" ] || within=$checked
  "$PYTHON" benchmarks/card_tests.py --out "$out" --within "$within" --seconds $((seconds - 5)) -k 'cuda or test_kernels' \
    tests/test_{cuda_card,lora_linear,lora_linear_shared,multi_lora,multi_lora_shared,prefix_concat,kernels}.py
}

# goals SECONDS LINE_SECONDS ARGUMENT...: where something breaks the process, or hangs, another one goes on without it.
goals() {
  local code=3 began=$SECONDS seconds=$1 line_seconds=$2 resume=()
  while [ "$code" = 3 ] && [ $((seconds - SECONDS + began)) -gt 0 ]; do
    "$PYTHON" -m benchmarks goals --device cuda --out "$out" --seconds $((seconds - SECONDS + began)) --line-seconds "$line_seconds" "${@:3}" "${resume[@]}"
    code=$?
    resume=(--resume)
  done
  return $code
}

bare() {
  FASTLORA_TRIAL=0 goals $((seconds - 10)) 20 --bare
}

counters() {
  local tool
  tool=$(PATH=$PATH:/usr/local/cuda/bin command -v ncu) || { echo "ncu was not found: left out"; return 0; }
  # The clocks are left alone. The last of three calls: three kernels forward, five backward.
  "$tool" --clock-control none --set basic --section MemoryWorkloadAnalysis --section WarpStateStats --section SchedulerStats \
    --kernel-name 'regex:product|side|round_kernel|sum_kernel' --launch-skip 16 --launch-count 8 "$PYTHON" -m benchmarks.probe call >"$out/counters.txt" || return
  grep -E '_kernel|Duration|Throughput' "$out/counters.txt" | head -60
}

tune() {
  "$PYTHON" -m fastlora tune --device cuda --seconds $((seconds - 20)) --output "$table"
}

bench() {
  local code=0
  export FASTLORA_TRIAL=0 # what `tune` has measured, and nothing else
  [ ! -f "$table" ] || export FASTLORA_TABLE=$table
  goals $((seconds - 60)) 75 || code=$?
  timeout --kill-after 5 30 "$PYTHON" -m benchmarks launch --device cuda --out "$out" || echo "launch: failed"
  return $code
}

sanitize() {
  local tool check implementation code=0
  tool=$(PATH=$PATH:/usr/local/cuda/bin:/usr/local/cuda/compute-sanitizer command -v compute-sanitizer) ||
    { echo "compute-sanitizer was not found: left out"; return 0; }
  for implementation in cuda triton; do
    for check in memcheck racecheck; do
      echo "-- $check, $implementation"
      # Without torch's caching allocator, so that each tensor has bounds of its own.
      PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout --signal INT --kill-after 5 $((seconds / 4 - 5)) \
        "$tool" --tool "$check" --target-processes application-only --error-exitcode 9 \
        "$PYTHON" -m benchmarks.probe sanitize cuda "$implementation" || { code=$?; echo "$check, $implementation: failed ($code)"; }
    done
  done
  return $code
}

plot() {
  "$PYTHON" -m benchmarks.plot "$out"
}

# Each part is a process of its own, so that it can be stopped with all that it started.
export -f build test_ goals bare counters tune bench sanitize plot
export PYTHON out table checked
states=() failed=()
# What became of each part so far, and one more.
save() {
  printf '{"machine": %s,\n "command": "benchmarks/gpu.sh %s",\n "parts": [%s]}\n' "${card[0]}" "${parts[*]}" \
    "$(IFS=,; echo "${states[*]}${1:+${states[*]:+,}$1}")" >"$out/gpu.json.new"
  mv "$out/gpu.json.new" "$out/gpu.json"
}
for part in "${parts[@]}"; do
  limit=LIMIT_${part^^}
  seconds=${!limit:-${limits[$part]}}
  echo "== $part, at most $seconds s"
  save "{\"part\": \"$part\", \"state\": \"running\"}"
  began=$SECONDS
  seconds=$seconds parts=${parts[*]} timeout --signal INT --kill-after 10 "$seconds" bash -c "${part/#test/test_}"
  code=$?
  case $code in 0) state=done ;; *) state="failed ($code)" ;; esac
  [ "$code" = 0 ] || [ $((SECONDS - began)) -lt "$seconds" ] || state="out of time"
  [ "$code" = 0 ] || failed+=("$part: $state")
  states+=("{\"part\": \"$part\", \"state\": \"$state\", \"seconds\": $((SECONDS - began))}")
  save
done

echo "== results, in $out"
"$PYTHON" benchmarks/card_summary.py "$out"
[ ${#failed[@]} -eq 0 ] || { printf 'make gpu: %s\n' "${failed[@]}"; exit 1; }
