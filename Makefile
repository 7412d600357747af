# make install | demo | test | bench | gpu | sanitize | fuzz | lint | docs | wheel | hub | clean. PYTHON=python3.12 picks the interpreter of a new .venv.

SHELL := bash
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install --quiet
CORES := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)

.PHONY: install demo test bench gpu sanitize fuzz lint docs wheel hub clean

install: $(VENV)/.installed

$(PY):
	@for python in $(PYTHON) python3 python3.14 python3.13 python3.12 python3.11 python3.10 python; do \
	  if $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then \
	    echo "making $(VENV) with $$($$python --version)"; exec $$python -m venv $(VENV); \
	  elif [ -n "$(PYTHON)" ]; then \
	    echo "PYTHON=$(PYTHON) is not a Python >= 3.10 with the modules venv and ensurepip" >&2; exit 1; \
	  fi; \
	done; \
	echo "no Python >= 3.10 with the modules venv and ensurepip on the PATH: install one, or name it with make PYTHON=..." >&2; exit 1

# CUDA's compiler is left out where it cannot be had, or where there is one already.
$(VENV)/.requirements: requirements-dev.txt requirements-nodeps.txt requirements-cuda.txt | $(PY)
	$(PIP) -r requirements-dev.txt
	@command -v nvcc >/dev/null || $(PIP) -r requirements-cuda.txt || echo "installed without CUDA's compiler: csrc/cuda is not built" >&2
	$(PIP) --no-deps -r requirements-nodeps.txt
	@touch $@

$(VENV)/.installed: $(VENV)/.requirements setup.py pyproject.toml $(wildcard csrc/*/*)
	@rm -f fastff/_C*.so
	$(PIP) --no-build-isolation --no-deps -e .
	@ls fastff/_C*.so >/dev/null 2>&1 || echo "installed without the compiled library; to see why: FASTFF_FORCE_BUILD=1 $(PY) -m pip install -v --no-build-isolation --no-deps -e ." >&2
	@touch $@

demo: install
	$(VENV)/bin/fastff compare --data digits --out runs/demo --json runs/demo/compare.json

# A process for each core with one thread each: the tests' tensors are small, and a second thread only makes them wait.
test: install
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} FASTFF_REQUIRE_NATIVE=1 $(PY) -m pytest -q -n $(CORES) --dist worksteal --durations=10 $(PYTEST_ARGS)

# A selection, in less than ten minutes on two cores; docs/benchmarks.md, which it fills from these files, has the commands that measure all.
bench: install
	@mkdir -p benchmarks/results
	set -e; run() { OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$(CORES)} $(PY) -m benchmarks.$$1 --csv benchmarks/results/$$2.csv "$${@:3}"; }; \
	for name in goodness epilogue layer_norm group_goodness convolution depthwise; do run $$name $$name --quick; done; \
	run step step-resnet18-64 --quick --rounds 5 --no-compile; \
	run step step-mobilenet_v3_small --model mobilenet_v3_small --quick --no-compile; \
	for axis in depth classes; do run scaling scaling-$$axis --axis $$axis --quick; done; \
	run budget budget
	$(PY) -m benchmarks.report

# With the python of an environment whose torch sees a GPU: make gpu PYTHON=python3. Nothing is installed. GPU_DRY=1 goes through the same on a CPU,
# in .venv. GPU_ARGS="--only kernels --out FOLDER" for a part; docs/benchmarks.md has the options.
gpu: $(if $(GPU_DRY),install)
	$(if $(GPU_DRY),TRITON_INTERPRET=1 )PYTHONPATH=. $(or $(PYTHON),$(if $(GPU_DRY),$(PY),python3)) -m benchmarks.gpu $(GPU_ARGS)

# The compiled operators under AddressSanitizer and UndefinedBehaviorSanitizer (GCC), in a copy of the tree.
SANITIZE := -fsanitize=address,undefined
sanitize: install
	rm -rf build/sanitize && mkdir -p build/sanitize
	cp -r fastff csrc tests setup.py pyproject.toml README.md LICENSE build/sanitize && rm -f build/sanitize/fastff/_C*.so
	cd build/sanitize && FASTFF_CUDA= CFLAGS="$(SANITIZE) -fno-omit-frame-pointer" LDFLAGS="$(SANITIZE)" FASTFF_FORCE_BUILD=1 \
	  $(abspath $(PY)) setup.py -q build_ext --inplace
	cd build/sanitize && LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	  PYTHONPATH=. OMP_NUM_THREADS=$${OMP_NUM_THREADS:-2} FASTFF_DRAWS=$${FASTFF_DRAWS:-1000} $(abspath $(PY)) -m pytest -q -p no:cacheprovider \
	  tests/test_goodness.py tests/test_goodness_limits.py tests/test_layer_norm.py tests/test_epilogue_step.py tests/test_convolution.py \
	  tests/test_depthwise.py tests/test_group_goodness.py tests/test_group_epilogue_step.py tests/test_muon.py tests/test_drawn.py \
	  -k "native or drawn_calls or few_positions or winograd"

# 100,000 drawn calls of the compiled operators, 2,500 for each of goodness's two property tests, whose tolerances are narrower (half an hour), and
# training steps of 10,000 drawn networks (about an hour on two cores).
fuzz: install
	FASTFF_DRAWS=$${FASTFF_DRAWS:-100000} OMP_NUM_THREADS=2 $(PY) -m pytest -q tests/test_drawn.py
	FASTFF_EXAMPLES=2500 OMP_NUM_THREADS=1 $(PY) -m pytest -q tests/test_goodness.py -k "native and (its_gradients or step_and_loss)"
	FASTFF_NETWORKS=$${FASTFF_NETWORKS:-10000} OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(CORES) tests/test_drawn_networks.py

lint: install
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu tests/cuda_host/*
	$(PY) -m mypy fastff

# The site, into build/docs: a link that leads nowhere is an error. The versions in requirements-docs.txt need Python 3.11 or later.
$(VENV)/.docs: requirements-docs.txt | $(VENV)/.installed
	$(PIP) -r requirements-docs.txt
	@touch $@

docs: install $(VENV)/.docs
	$(PY) -m sphinx -W --keep-going -n -q -b html docs build/docs
	@echo "build/docs/index.html"

# What is published, into dist, and checked: the source archive, the wheel for Linux with this kind of processor, and the one without the compiled
# library. The last line is what the compiled library needs of the system: manylinux_2_28 has GLIBC_2.28 and GLIBCXX_3.4.25.
RELEASE := build/release
$(RELEASE)/.tools: pyproject.toml | $(PY)
	test -x $(RELEASE)/bin/python || $(PY) -m venv $(RELEASE)
	$(RELEASE)/bin/python -m pip --disable-pip-version-check install --quiet $$($(PY) -c "import tomllib; \
	  print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['release'])")
	@touch $@

# The CUDA library is built from source alone: what it takes of CUDA needs the building machine's GLIBC.
wheel: export FASTFF_CUDA :=
wheel: $(VENV)/.requirements $(RELEASE)/.tools
	rm -rf dist build/wheel build/lib build/bdist*
	$(PY) setup.py -q sdist
	FASTFF_NO_BUILD=1 $(PY) setup.py -q bdist_wheel
	rm -rf build/lib*
	FASTFF_FORCE_BUILD=1 $(PY) setup.py -q bdist_wheel --dist-dir build/wheel
	PATH=$(abspath $(RELEASE))/bin:$$PATH auditwheel repair --only-plat --plat manylinux_2_28_$$(uname -m) --exclude libtorch_cpu.so --exclude libc10.so -w dist build/wheel/*.whl
	$(RELEASE)/bin/abi3audit --strict dist/*manylinux*.whl
	$(RELEASE)/bin/twine check --strict dist/*
	@ls -l dist
	@for f in $$(unzip -Z1 dist/*manylinux*.whl 'fastff/_C*.so'); do unzip -p dist/*manylinux*.whl $$f > build/wheel/library.so; \
	  echo "$$f needs $$(objdump -T build/wheel/library.so | grep -oE '\bGLIBC_[0-9.]+' | sort -Vu | tail -1)" \
	    "and $$(objdump -T build/wheel/library.so | grep -oE 'GLIBCXX_[0-9.]+' | sort -Vu | tail -1)"; done

# The layout that Hugging Face's kernels hub asks for, in build/hub: its kernel-builder registers the operators under a name of its own.
hub:
	rm -rf build/hub && mkdir -p build && cp -r hub build/hub && mkdir build/hub/cpu && mv build/hub/hub.h build/hub/cpu
	cp csrc/cpu/*.h build/hub/cpu
	for f in csrc/cpu/*.cpp; do { echo '#include "hub.h"'; sed 's/\(LIBRARY_[A-Z]*\)(fastff,/\1(TORCH_EXTENSION_NAME,/' $$f; } > build/hub/cpu/$${f##*/}; done
	@echo build/hub

# Leaves .venv alone; the next make install builds the extension again.
clean:
	rm -rf build dist *.egg-info fastff/_C*.so .pytest_cache .ruff_cache .mypy_cache .hypothesis $(VENV)/.installed
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
