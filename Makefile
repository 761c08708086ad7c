# Two commands from a fresh clone: make demo, make test. Everything they need goes into $(VENV).
#
#   make demo                            set up, then the demonstration on real sentences
#   make test                            set up, ruff, mypy, the whole test suite, then make sanitize
#   make demo PYTHON=python3 VENV=none   install nothing: use that Python and the torch it has (make test: no ruff, mypy)
#   make test PYTEST_ARGS="-k patching"  arguments for pytest
#   make fuzz N=5000                     random calls of every attention kernel against the float64 oracle
#   make cuda-check                      registers and spills of the CUDA kernels, by nvcc; needs no GPU
#   make install-test                    install into clean environments, with and without a compiler
#   make sanitize                        the C++ under AddressSanitizer and UndefinedBehaviorSanitizer
#   make report                          tables and figures of benchmarks/results/*.json, here and in the README
#   make budget                          registers, spills and shared memory of every kernel, per architecture

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
N ?= 5000
DEMO_ARGS ?=
TORCH_VERSION := 2.13.0
TRITON_VERSION := 3.9.0
EXTENSION_SOURCES := setup.py $(wildcard csrc/*.* csrc/cuda/*)

export HF_HUB_OFFLINE := 1
export TRANSFORMERS_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

ifeq ($(VENV),none)
RUN := PYTHONPATH="$(CURDIR)" $(PYTHON)
STAMP := build/in-place.stamp
CHECK :=
else
RUN := $(abspath $(VENV))/bin/python
STAMP := $(VENV)/fastattn.stamp
CHECK := check
# Two processes of one thread each: the interpreter of the kernels has no use for threads.
WORKERS := -n 2 --dist worksteal
endif

PURE := The extension could not be built; going on in pure Python, see make doctor.

.PHONY: demo test fuzz sanitize budget cuda-check install-test check setup profile doctor results report clean

demo: setup
	$(RUN) -m fastattn demo $(DEMO_ARGS)

test: setup $(CHECK)
	$(if $(WORKERS),OMP_NUM_THREADS=1) $(RUN) -m pytest $(WORKERS) --durations=15 $(PYTEST_ARGS)
	$(if $(WORKERS),$(if $(PYTEST_ARGS),,@$(SANITIZE_IF_POSSIBLE)))

# Draw N random calls of attention for each backend instead of the suite's 500.
fuzz: setup
	FASTATTN_FUZZ=$(N) OMP_NUM_THREADS=1 $(RUN) -m pytest $(WORKERS) tests/test_attention_core.py -k combinations

# The extension once more, in a copy of the package, with checks of every access to memory and of undefined behaviour.
SANITIZED := build/sanitized
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=undefined
SANITIZE_ARGS ?= tests/test_extension.py tests/test_extension_numbers.py tests/test_kept_memory.py tests/test_packed_op.py \
	tests/test_kv_cache_cpu.py tests/test_additive_cpu.py tests/test_lstm_op.py tests/test_lstm_bad_input.py \
	tests/test_lstm_runtime.py tests/test_layer_norm_lstm_op.py tests/test_layer_norm_lstm_bad_input.py \
	tests/test_panels.py
SANITIZE_IF_POSSIBLE := if echo 'int main() {}' | c++ $(SANITIZERS) -x c++ - -o /dev/null 2>/dev/null; \
	then $(MAKE) --no-print-directory sanitize; else echo "no compiler with sanitizers: the C++ runs without them"; fi
sanitize: setup
	rm -rf $(SANITIZED)
	mkdir -p $(SANITIZED)
	cp -r csrc fastattn tests setup.py pyproject.toml README.md $(SANITIZED)
	rm -f $(SANITIZED)/fastattn/*.so
	cd $(SANITIZED) && FASTATTN_CXXFLAGS="$(SANITIZERS) -O1 -g1" FASTATTN_LDFLAGS="$(SANITIZERS)" FASTATTN_CUDA=0 \
		$(RUN) setup.py --quiet build_ext --inplace
	cd $(SANITIZED) && OMP_NUM_THREADS=2 ASAN_OPTIONS=detect_leaks=0 \
		LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
		$(RUN) -m pytest -p no:cacheprovider $(SANITIZE_ARGS)

check: setup
	$(RUN) -m ruff check .
	$(RUN) -m mypy

# What the compiler makes of every kernel for sm_80, sm_90 and sm_100: the checked-in table.
budget: setup
	$(RUN) -m benchmarks.budget

# The CUDA kernels for the same, which fails where one spills: as long as nvcc takes, a minute and a half on two cores.
cuda-check: setup
	$(RUN) -m benchmarks.cuda_budget

# The three states of an installation, and the CUDA kernels of every architecture.
install-test: setup
	FASTATTN_INSTALL_TESTS=1 $(RUN) -m pytest tests/test_install.py tests/test_lstm_cuda_build.py

profile doctor: setup
	$(RUN) -m fastattn $@

# Measure on this machine, keep the figures in docs/results, and write them into the README.
results: setup
	$(RUN) -m fastattn demo --out demo_output $(DEMO_ARGS)
	$(RUN) -m fastattn.profiling.report --record demo_output

# The same for what the benchmarks measured: benchmarks/gpu.sh, or pytest benchmarks --benchmark-only --record FILE.
report: setup
	$(RUN) -m fastattn report $(wildcard benchmarks/results/*.json)

setup: $(STAMP)

ifeq ($(VENV),none)
# The extension is optional: without a compiler the library runs in pure Python, and `doctor` says so.
$(STAMP): pyproject.toml $(EXTENSION_SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "fastattn needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)"; exit 1; }
	@$(PYTHON) -c 'import torch' || { echo "VENV=none uses the torch of $(PYTHON), which has none"; exit 1; }
	$(PYTHON) setup.py build_ext --inplace \
		|| echo "$(PURE)"
	@mkdir -p $(@D) && touch $@
else
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "fastattn needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
			"Name another one: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# A torch or triton that is already there stays. setup.py needs torch, hence --no-build-isolation. Where the extension
# fails to compile, setup.py is told that there is no compiler, and the library runs in pure Python.
INSTALL := $(VENV)/bin/python -m pip install --no-build-isolation -e '.[demo,examples,test,dev]'
$(STAMP): pyproject.toml $(EXTENSION_SOURCES) | $(VENV)/bin/python
	$(RUN) -c 'import torch' 2>/dev/null || $(RUN) -m pip install torch==$(TORCH_VERSION)
	$(RUN) -c 'import triton' 2>/dev/null || $(RUN) -m pip install triton==$(TRITON_VERSION)
	$(RUN) -m pip install 'setuptools>=77' wheel pybind11 ninja
	$(INSTALL) || { echo "$(PURE)"; CXX=none $(INSTALL); }
	@touch $@
endif

clean:
	rm -rf build demo_output .pytest_cache .mypy_cache .ruff_cache .hypothesis fastattn/*.so
