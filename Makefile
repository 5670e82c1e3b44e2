# `make demo` and `make test` set up everything they need in $(VENV). Any of these may be given on the command line.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
OUT ?= out
PYTEST ?=
WORKERS ?= logical
BENCH ?= --quick
TRAIN ?=
TRITON ?= 3.9.0
TRANSFORMERS ?= 5.24.0
PEFT ?= 0.18.1
KERNELS ?= 0.17.2
AOT ?=

# pip installs without bytecode, which the first import writes for all later processes
unexport PYTHONDONTWRITEBYTECODE
export PATH := $(abspath $(VENV))/bin:$(PATH)
PIP := $(VENV)/bin/python -m pip install --quiet --no-compile --disable-pip-version-check
READY := $(VENV)/.ready$(COMPACTER_KERNELS_NATIVE)-$(COMPACTER_KERNELS_CUDA)-$(subst /,-,$(TORCH))

# by pytest-xdist, on the machine's cores (WORKERS=0: in one process); one thread each, as more would wait for one another
PARALLEL := -n $(WORKERS) --maxprocesses 4 --dist worksteal
TESTS := OMP_NUM_THREADS=1 python -m pytest $(PARALLEL)

INTERPRETER := build/triton-$(TRITON)
EXECUTED := build/cuda_on_cpu
LATER := build/transformers-$(TRANSFORMERS)
EARLIER := build/peft-$(PEFT)
HUB := build/kernels-$(KERNELS)
PEFT_TESTS := tests/test_peft_core.py tests/test_peft_errors.py

.PHONY: ready demo test core-tests instruction-sets transformers peft interpret hub-kernel aot cuda-on-cpu ptxas docs \
	lint native-check thread-check arm-check clang-check loops-check reliability clean

# installed, with the native part as COMPACTER_KERNELS_NATIVE asks, and its CUDA part as COMPACTER_KERNELS_CUDA does:
# 0 without, 1 required, unset what this machine can build and run (setup.py)
$(READY): pyproject.toml setup.py CMakeLists.txt requirements.txt $(shell find csrc -type f)
	@rm -f $(VENV)/.ready*
	$(VENV)/bin/python -m pip --version 2> /dev/null || \
		{ find -L $(VENV)/bin -type l -exec rm {} + 2> /dev/null; $(PYTHON) -m venv $(VENV); }  # links that lead nowhere
	$(PIP) '$(TORCH)'
	$(PIP) --constraint requirements.txt --editable '.[dev]'
	@python -c 'import compacter_kernels as ck; print(ck.available_impls())'
	@touch '$@'

ready: $(READY)

demo: $(READY)
	compacter-kernels info
	compacter-kernels compare
	compacter-kernels bench $(BENCH) --out $(OUT)/bench
	compacter-kernels train $(TRAIN) --out $(OUT)/train

test: $(READY)
	$(TESTS) $(PYTEST)

# the tests of failures, each with many more inputs than `make test` tries, which differ from run to run
reliability: $(READY)
	COMPACTER_NIGHTLY=1 $(TESTS) -m failure $(PYTEST)

# what needs torch, numpy and the tools of the tests alone, in the environment that is active
CORE := $(patsubst %,tests/test_%.py,agreement autograd bank_function chain compacter_adapter family formula nonfinite phm_linear)
core-tests:
	$(TESTS) -m 'not slow' $(CORE) $(PYTEST)

# the cpu kernels once more under each instruction set of this machine, narrower than the one that `make test` runs
instruction-sets: $(READY)
	OMP_NUM_THREADS=1 python tests/instruction_sets.py $(PARALLEL)

# beside the environment, and before it on the path
$(INTERPRETER): | $(READY)
	$(PIP) --no-deps --target $@ triton==$(TRITON)

# with the trainers that examples/trainers has scripts for; --no-deps leaves torch as it is
$(LATER): | $(READY)
	$(PIP) --target $@.part transformers==$(TRANSFORMERS) pydantic==2.14.4
	$(PIP) --no-deps --target $@.part trl==1.16.0 lightning==2.6.6 pytorch-lightning==2.6.6 \
		lightning-utilities==0.15.3 torchmetrics==1.9.0
	mv $@.part $@

# whole models under another version of transformers than the pinned one, which `adapters` needs
transformers: $(READY) $(LATER)
	PYTHONPATH=$(LATER) $(TESTS) -W ignore -rN tests/test_inject.py tests/test_inject_options.py tests/test_trainers.py \
		$(PEFT_TESTS)

$(EARLIER): | $(READY)
	$(PIP) --no-deps --target $@ peft==$(PEFT)

# the methods of peft, and patches of it, under the oldest version that is supported
peft: $(READY) $(EARLIER)
	PYTHONPATH=$(EARLIER) $(TESTS) -W ignore -rN -m 'not slow' $(PEFT_TESTS) tests/test_patch_lokr.py

# the Triton kernels on the CPU, in Triton's interpreter: the contract's tests, each through impl="triton",
# without the largest sizes
interpret: $(READY) $(INTERPRETER)
	TRITON_INTERPRET=1 PYTHONPATH=$(INTERPRETER) $(TESTS) -W ignore -rN -k 'triton and not (1000 or 1024 or 3072)' \
		tests/test_agreement.py tests/test_nonfinite.py tests/test_out.py tests/test_memory.py tests/test_determinism.py \
		tests/test_triton_functions.py tests/test_triton_tune.py tests/test_triton_bank.py tests/test_family.py \
		tests/test_bank_function.py

# without sigstore and its many packages, which a kernel from a folder does not need
$(HUB): | $(READY)
	$(PIP) --no-deps --target $@ kernels==$(KERNELS) huggingface-hub==1.33.0

# the Hub kernel, loaded by the package `kernels`, also in Triton's interpreter
hub-kernel: $(READY) $(INTERPRETER) $(HUB)
	TRITON_INTERPRET=1 PYTHONPATH=$(INTERPRETER):$(HUB) $(TESTS) -W ignore -rN tests/test_hub_kernel.py

# the Triton kernels, each configuration compiled for each architecture: no spills, no memory that the device lacks
aot: $(READY) $(INTERPRETER)
	PYTHONPATH=$(INTERPRETER) $(TESTS) -W ignore tests/test_triton_launch.py tests/test_triton_sums.py
	PYTHONPATH=$(INTERPRETER) python -W ignore benchmarks/aot_report.py $(AOT)

# the CUDA kernels on the CPU (tests/cuda_on_cpu): the contract's tests, each through impl="cuda"; then every instance on
# every device under the address and undefined-behaviour sanitizers, which the plain build need not repeat
SANITIZED := every_instance or every_device or unaligned
cuda-on-cpu: $(READY)
	cmake -S . -B $(EXECUTED) -G Ninja -DCOMPACTER_CUDA_ON_CPU=ON -DPython_EXECUTABLE=$$(command -v python) \
		-DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG=
	cmake --build $(EXECUTED)
	CUDA_ON_CPU=$(EXECUTED) $(TESTS) -rN -k 'cuda and not (1000 or $(SANITIZED))' \
		--deselect tests/test_bank_function.py::test_compiled tests/test_cuda_kernels.py tests/test_cuda_family.py \
		tests/test_cuda_sanitize.py tests/test_bank_function.py tests/test_agreement.py tests/test_nonfinite.py \
		tests/test_out.py tests/test_memory.py tests/test_determinism.py tests/test_strides.py tests/test_autograd.py \
		tests/test_compile.py tests/test_ops.py tests/test_training.py
	settings=$$(python tests/cuda_on_cpu/build.py $(EXECUTED) $(EXECUTED)/sanitized sanitized) && \
		eval "$$settings $(TESTS) -rN -k '$(SANITIZED)' tests/test_cuda_kernels.py tests/test_cuda_family.py"

# the CUDA kernels, compiled by nvcc for each architecture: no spills, no stack
ptxas: $(READY)
	python benchmarks/ptxas_report.py

# the site, in build/site; a warning, as of a link that leads nowhere, is an error
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet

lint: $(READY) docs
	ruff check .
	ruff format --check .
	mypy
	zizmor --offline --quiet .github

# the C++ kernels alone, under the address and undefined-behaviour sanitizers
native-check: $(READY)
	cmake -S . -B build/sanitize -G Ninja -DCOMPACTER_SANITIZE=ON -DCOMPACTER_CUDA=OFF -DCMAKE_BUILD_TYPE=RelWithDebInfo
	cmake --build build/sanitize --target native_check
	build/sanitize/native_check

# the same under ThreadSanitizer, with every call on four threads
thread-check: $(READY)
	cmake -S . -B build/thread -G Ninja -DCOMPACTER_SANITIZE=thread -DCOMPACTER_CUDA=OFF -DCMAKE_BUILD_TYPE=RelWithDebInfo
	cmake --build build/thread --target native_check
	build/thread/native_check

# the C++ kernels without sanitizers, built by other compilers than the usual one; no environment is needed
CHECK := -G Ninja -DCOMPACTER_NATIVE_CHECK=ON -DCOMPACTER_CUDA=OFF

# for ARM, compiled here and executed by qemu, twice with the same bits; needs Debian's g++-aarch64-linux-gnu and qemu-user
QEMU := qemu-aarch64 -L /usr/aarch64-linux-gnu
arm-check:
	cmake -S . -B build/arm $(CHECK) -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
		-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++
	cmake --build build/arm --target native_check
	$(QEMU) build/arm/native_check > build/arm/first.txt
	$(QEMU) build/arm/native_check | diff build/arm/first.txt - && cat build/arm/first.txt

clang-check:
	cmake -S . -B build/clang $(CHECK) -DCMAKE_CXX_COMPILER=clang++ -DCMAKE_CXX_FLAGS=-Werror
	cmake --build build/clang --target native_check
	build/clang/native_check

# as a compiler without vector types builds the plain kernels (csrc/cpu/vector.h)
loops-check:
	cmake -S . -B build/loops $(CHECK) -DCOMPACTER_VECTOR_LOOPS=ON
	cmake --build build/loops --target native_check
	build/loops/native_check

clean:
	rm -rf build dist $(OUT) *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks $(VENV)/.ready*
	rm -f compacter_kernels/_C.*.so compacter_kernels/_not_built.txt
