# Each target does its own set-up: `make test` on a fresh machine needs Python 3.11 and a package index, nothing else.

VENV := .venv
DEMO := .venv-demo$(addprefix -cuda,$(firstword $(filter 12 13,$(CUDA))))
AOT := .venv-aot
NEXT := .venv-next
DOCS := .venv-docs
LOCKS := requirements
BIN := $(VENV)/bin

# Bytecode is of what is imported: pip would spend half of its time on the rest.
INSTALL := pip install -q --no-deps --no-compile

# One environment at a time: all of them write the checkout's .egg-info.
EDITABLE = $(INSTALL) --no-build-isolation -e .

# A Python of one version that can make environments: on the PATH, or among pyenv's.
candidates = python$(1) python3 $(wildcard $(or $(PYENV_ROOT),$(HOME)/.pyenv)/versions/$(1).*/bin/python$(1))
identify = 'import sys, ensurepip; print(sys.executable if sys.version.startswith("$(1).") else "")'
find_python = $(firstword $(foreach python,$(call candidates,$(1)),$(shell $(python) -c $(call identify,$(1)) 2>/dev/null)))
PYTHON311 = $(call find_python,3.11)
PYTHON312 = $(call find_python,3.12)
need_python = $(if $($(1)),,$(error Python $(2) with venv is missing. Install it: `pyenv install $(2)`, or `apt-get install python$(2) python$(2)-venv`))

# XLA assembles with CUDA's ptxas and libdevice, of a toolkit or of two wheels.
PTXAS = $(firstword $(wildcard $(or $(CUDA_HOME),/usr/local/cuda)/bin/ptxas $(AOT)/lib/python3.12/site-packages/nvidia/cu13/bin/ptxas))
TOOLKIT = $(PTXAS:/bin/ptxas=)
need_ptxas = $(if $(PTXAS),,$(error ptxas is missing. Install CUDA 13 in /usr/local/cuda, or `$(AOT)/bin/pip install --no-deps nvidia-cuda-nvcc==13.0.* nvidia-nvvm==13.0.*`))

# Compiled programs are kept: a third of a test run is XLA.
CACHE := JAX_COMPILATION_CACHE_DIR=$(CURDIR)/build/xla JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.3

# A worker takes whole files, whose tests share models. Programs for GPUs are shared by none, and most lie in one file.
PYTEST := -m pytest -q -n auto --maxprocesses 4 --dist loadfile
SPREAD := -m pytest -q -n auto --maxprocesses 4 --dist worksteal

.PHONY: environments demo demo-full test long lint aot versions next docs lock clean

# The model in the box, dense and by its plan, side by side. `make demo CUDA=13`, or 12, runs on an NVIDIA GPU.
ifneq ($(filter demo,$(or $(MAKECMDGOALS),demo)),)
ifneq ($(filter-out 12 13,$(CUDA))$(word 2,$(CUDA)),)
$(error CUDA=$(CUDA) must be 12 or 13, the major version of CUDA: `make demo CUDA=13`. Leave it out for a CPU)
endif
endif

demo: $(DEMO)/ready
	$(DEMO)/bin/dfa2 demo --out build/demo

# The long form, with a report: converts, samples, calibrates two plans, samples by them. Some 10 minutes on two cores.
SHAPE := --height 256 --width 256 --steps 20 --guidance-scale 4 --max-sequence-length 32
BOX := dfa2_jax/demo
FULL := build/demo-full
SAMPLE := $(BIN)/dfa2 sample $(FULL)/sd35 --prompts $(BOX)/prompts.txt --batch 4

demo-full: $(VENV)/ready
	rm -rf $(FULL)
	mkdir -p $(FULL)
	$(BIN)/dfa2-convert $(BOX)/toy-sd35 $(FULL)/sd35
	$(SAMPLE) $(SHAPE) --out $(FULL)/dense
	for delta in 0.1 0.4; do \
		$(BIN)/dfa2 calibrate $(FULL)/sd35 --prompts assets/calibration_prompts.txt $(SHAPE) \
			--delta $$delta --tiles 64 64 --out $(FULL)/delta-$$delta.json && \
		$(BIN)/dfa2 plan show $(FULL)/delta-$$delta.json && \
		$(SAMPLE) --plan $(FULL)/delta-$$delta.json --guidance-scale 4 --out $(FULL)/delta-$$delta || exit 1; \
	done
	$(BIN)/dfa2 report $(FULL)/sd35 --plan $(FULL)/delta-0.1.json --plan $(FULL)/delta-0.4.json \
		--prompts $(BOX)/prompts.txt --guidance-scale 4 --batch 4 --out $(FULL)/report
	$(BIN)/python -m toy.figure --dense $(FULL)/dense --plan delta-0.1=$(FULL)/delta-0.1 \
		--plan delta-0.4=$(FULL)/delta-0.4 --report $(FULL)/report/report.json --out $(FULL)/demo.png
	@echo "Look at $(FULL)/demo.png and $(FULL)/report/report.html; the plans are drawn in $(FULL)/delta-*.png"

# jax 0.10's emitters of fusions take as long as the rest of XLA, on a CPU alone.
QUICK := XLA_FLAGS="--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
test: $(VENV)/ready build/tiny
	$(CACHE) $(QUICK) DFA2_TINY=$(CURDIR)/build/tiny $(BIN)/python $(PYTEST) -m "not aot and not long"

# What takes minutes by nature: training the model in the box, and a plan of its heads. No part of .ci/run.
long: $(VENV)/ready build/tiny
	$(CACHE) DFA2_TINY=$(CURDIR)/build/tiny $(BIN)/python $(PYTEST) -m long

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# Compile for GPUs that are not here: everything on jax 0.11, and what the kernels spill and copy on the oldest and the
# newest version, whose plugins lie beside their environments.
COMPILE = JAX_PLATFORMS=cpu JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 CUDA_HOME=$(TOOLKIT) XLA_FLAGS=--xla_gpu_cuda_data_dir=$(TOOLKIT)
aot: $(AOT)/ready build/cuda-0.10.2/ready build/cuda-0.12.0.1/ready
	$(call need_ptxas)
	JAX_PLATFORMS=cpu JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 $(AOT)/bin/python $(SPREAD) -m "aot and not torch"
	PYTHONPATH=build/cuda-0.10.2 $(COMPILE) $(BIN)/python $(SPREAD) tests/kernels/test_kernels_aot.py -k "spill and not mosaic and not jax_triton"
	PYTHONPATH=build/cuda-0.12.0.1 $(COMPILE) $(NEXT)/bin/python $(SPREAD) tests/kernels/test_kernels_aot.py -k "spill and not jax_triton"

# The suite, less what needs torch, on jax 0.11, and a part of it on the newest. (.ci/run has the older one run a wheel.)
versions: $(AOT)/ready build/tiny next
	JAX_PLATFORMS=cpu JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 DFA2_TINY=$(CURDIR)/build/tiny $(CACHE) $(AOT)/bin/python $(PYTEST) -m "not aot and not torch and not long"

# What differs between versions of JAX: kernels, loops and what they compile to. Portable attention runs in the loops; what
# steps skip and what is refused is decided by our own code.
DIFFERS := $(addprefix tests/, kernels/test_a*.py kernels/test_backends.py kernels/test_p*.py families/test_real_shapes_lower.py \
	sampling/test_calls.py sampling/test_compile_once.py sampling/test_planned.py)
DECIDED := not [blockwise and not -blockwise and not skip and not refused and not density
next: $(NEXT)/ready build/tiny
	JAX_PLATFORMS=cpu DFA2_TINY=$(CURDIR)/build/tiny $(CACHE) $(NEXT)/bin/python $(PYTEST) -m "not aot and not torch" -k "$(DECIDED)" $(DIFFERS)

# The site, in build/site; without a network, once its environment is there.
docs: $(DOCS)/ready
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict
	@echo "Open build/site/index.html"

# All that .ci/run takes: `make -j2 environments`.
environments: $(addsuffix /ready,$(VENV) $(AOT) $(NEXT) $(DOCS) build/cuda-0.10.2 build/cuda-0.12.0.1)

$(DOCS)/ready: $(LOCKS)/docs.txt
	$(call need_python,PYTHON311,3.11)
	$(PYTHON311) -m venv $(DOCS)
	$(DOCS)/bin/$(INSTALL) -r $<
	touch $@

build/tiny: $(VENV)/ready tests/tiny.py
	rm -rf $@
	$(BIN)/python tests/tiny.py $@

$(VENV)/ready: $(LOCKS)/py311-jax0.10.2.txt pyproject.toml
	$(call need_python,PYTHON311,3.11)
	$(PYTHON311) -m venv $(VENV)
	$(BIN)/$(INSTALL) -r $<
	flock pyproject.toml $(BIN)/$(EDITABLE)
	touch $@

# Without torch and the tests' packages: the first image comes sooner. JAX's CUDA packages are not locked: NVIDIA's are
# gigabytes, and JAX names them.
$(DEMO)/ready: $(LOCKS)/demo-jax0.10.2.txt pyproject.toml
	$(call need_python,PYTHON311,3.11)
	$(PYTHON311) -m venv $(DEMO)
	$(DEMO)/bin/$(INSTALL) -r $<
	$(if $(CUDA),$(DEMO)/bin/pip install -q -c $< "jax[cuda$(CUDA)]")
	flock pyproject.toml $(DEMO)/bin/$(EDITABLE)
	touch $@

$(AOT)/ready: $(LOCKS)/py312-jax0.11.2.txt $(LOCKS)/aot-jax0.11.2.txt pyproject.toml
	$(call need_python,PYTHON312,3.12)
	$(PYTHON312) -m venv $(AOT)
	$(AOT)/bin/$(INSTALL) -r $< -r $(LOCKS)/aot-jax0.11.2.txt
	flock pyproject.toml $(AOT)/bin/$(EDITABLE)
	touch $@

$(NEXT)/ready: $(LOCKS)/py312-jax0.12.0.1.txt pyproject.toml
	$(call need_python,PYTHON312,3.12)
	$(PYTHON312) -m venv $(NEXT)
	$(NEXT)/bin/$(INSTALL) -r $<
	flock pyproject.toml $(NEXT)/bin/$(EDITABLE)
	touch $@

build/cuda-0.10.2/ready: $(LOCKS)/aot-jax0.10.2.txt $(VENV)/ready
	rm -rf $(@D)
	$(BIN)/$(INSTALL) --target $(@D) -r $<
	touch $@

build/cuda-0.12.0.1/ready: $(LOCKS)/aot-jax0.12.0.1.txt $(NEXT)/ready
	rm -rf $(@D)
	$(NEXT)/bin/$(INSTALL) --target $(@D) -r $<
	touch $@

# Resolve every environment anew.
lock:
	$(call need_python,PYTHON311,3.11)
	$(call need_python,PYTHON312,3.12)
	./requirements/lock.sh "$(PYTHON311)" py311-jax0.10.2.txt "jax==0.10.2" ".[test,dev]" "torch==2.13.0"
	./requirements/lock.sh "$(PYTHON311)" demo-jax0.10.2.txt "jax==0.10.2" . "setuptools>=77"
	./requirements/lock.sh "$(PYTHON312)" py312-jax0.11.2.txt "jax==0.11.2" ".[report]" beartype hypothesis "pytest>=9" pytest-xdist safetensors transformers setuptools
	./requirements/lock.sh "$(PYTHON312)" py312-jax0.12.0.1.txt "jax==0.12.0.1" ".[report]" beartype hypothesis "pytest>=9" pytest-xdist safetensors transformers setuptools
	./requirements/lock.sh "$(PYTHON311)" docs.txt mkdocs mkdocs-material "mkdocstrings[python]" ruff

clean:
	rm -rf $(VENV) .venv-demo* $(AOT) $(NEXT) $(DOCS) build dist *.egg-info
