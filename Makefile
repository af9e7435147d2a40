# The commands of this repository: environments, the demonstration, the server, the checks. Needs GNU make 3.81 or newer.

VENV    := .venv
BIN     := $(VENV)/bin
PIP     := $(BIN)/python -m pip --disable-pip-version-check --no-input
QUIET   := $(if $(CI),--quiet)
TORCH   := $(PIP) install $(QUIET) --no-compile --constraint constraints.txt
INSTALL := sh deploy/install.sh $(VENV)
LOCKS   := deploy/locks

# The first that every pinned package has wheels for; `make PYTHON=…` overrides.
USABLE  := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON  ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
             if $$p -c '$(USABLE)' 2>/dev/null; then echo $$p; break; fi; done)

# PyPI's torch for Linux brings gigabytes of CUDA; without an NVIDIA card the CPU build is asked for first.
CPU_INDEX := https://download.pytorch.org/whl/cpu
CPU_ONLY  := [ "$$(uname -s)" = Linux ] && ! nvidia-smi -L >/dev/null 2>&1

# Whether the torch that was installed asks for CUDA's libraries, which no lock names.
CUDA    := import importlib.metadata as m, sys; \
           sys.exit(not any(need.startswith(("nvidia", "cuda")) for need in m.requires("torch") or ()))

# With it, every process of a fresh environment would compile what it imports anew: 3 s of CPU for a server.
unexport PYTHONDONTWRITEBYTECODE

# Files of tests beside each other, three for two cores, since tests wait for servers for half of their time. A file stays
# together, with the servers that it starts.
CORES   := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
SPREAD  := --numprocesses $(shell expr \( $(CORES) \* 3 + 1 \) / 2) --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help install otel demo serve test test-all lint docs audit sbom locks clean

help:
	@echo 'make install    .venv with what serving needs; then `source .venv/bin/activate` gives the command uniroute'
	@echo 'make otel       the same, with what sends traces and metrics to an OpenTelemetry collector'
	@echo 'make demo       a real language model on this machine, profiled, routed and served; no key needed'
	@echo 'make serve      the proxy; make serve ARGS="--config my.yaml --port 9000"'
	@echo 'make test       lint, types and every test but the slow ones'
	@echo 'make test-all   lint, types and every test'
	@echo 'make lint       ruff and mypy'
	@echo 'make docs       docs/settings.md and docs/cli.md anew, from the code'
	@echo 'make audit      known vulnerabilities of the pinned packages; needs the network'
	@echo 'make sbom       dist/sbom.json, a CycloneDX list of everything installed'
	@echo 'make locks      deploy/locks anew, from pyproject.toml and constraints.txt; needs the network'
	@echo 'make clean      removes .venv and the tools'"'"' caches; data directories stay'

install: $(VENV)/installed

otel: $(VENV)/installed-otel

demo: $(VENV)/installed-demo
	$(BIN)/uniroute demo $(ARGS)

serve: $(VENV)/installed
	$(BIN)/uniroute serve $(ARGS)

test: lint
	$(BIN)/python -m pytest $(SPREAD) -m "not slow" $(ARGS)

test-all: $(VENV)/installed-all test
	$(BIN)/python -m pytest -m slow $(ARGS)

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/installed-dev
	$(BIN)/python -m docs.generate

audit: $(VENV)/installed-audit
	$(BIN)/pip-audit --requirement constraints.txt --no-deps --disable-pip

sbom: $(VENV)/installed-audit
	mkdir -p dist
	$(BIN)/cyclonedx-py environment $(BIN)/python --pyproject pyproject.toml --output-file dist/sbom.json

locks: $(VENV)/installed-audit
	$(BIN)/python deploy/lock.py

clean:
	rm -f router_core/*.so
	rm -rf $(VENV) .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis dist

# One environment that grows: what the demonstration needs, then torch and all that a server may use, then the tools. All
# but torch is checked against the hashes in deploy/locks; which build of torch fits depends on the machine. A step that
# is interrupted is done again by the next `make`.
$(VENV)/created:
	@if [ -z "$(PYTHON)" ]; then \
	  echo 'UniRoute needs Python 3.11, 3.12 or 3.13, and none was found. Install one, or say where: make PYTHON=/path/to/python3.12' >&2; exit 1; fi
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "UniRoute needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) $(LOCKS)/uv.txt
	@touch $@

$(VENV)/installed-core: $(VENV)/created $(LOCKS)/core.txt pyproject.toml hatch_build.py router_core/_compiled.c
	$(INSTALL) $(LOCKS)/core.txt
	$(INSTALL) .
	@touch $@

$(VENV)/installed-demo: $(VENV)/installed-core $(LOCKS)/demo.txt
	$(INSTALL) $(LOCKS)/demo.txt
	@touch $@

$(VENV)/installed-torch: $(VENV)/created constraints.txt
	@if $(CPU_ONLY); then \
	  echo 'torch: the CPU build, from PyTorch'"'"'s own index'; \
	  $(TORCH) --no-deps --retries 0 --timeout 10 --index-url $(CPU_INDEX) torch 2>/dev/null \
	    || echo 'torch: not to be had there; taking the build of the usual index, which may bring CUDA (several GB)'; fi
	$(TORCH) --no-deps torch
	@if $(BIN)/python -c '$(CUDA)'; then $(TORCH) torch; fi
	@touch $@

$(VENV)/installed: $(VENV)/installed-core $(VENV)/installed-torch $(LOCKS)/serve.txt
	$(INSTALL) $(LOCKS)/serve.txt
	@touch $@

$(VENV)/installed-otel: $(VENV)/installed $(LOCKS)/otel.txt
	$(INSTALL) $(LOCKS)/otel.txt
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed-otel $(VENV)/installed-demo $(LOCKS)/dev.txt
	$(INSTALL) $(LOCKS)/dev.txt
	@touch $@

$(VENV)/installed-audit: $(VENV)/installed $(LOCKS)/audit.txt $(LOCKS)/uv.txt
	$(INSTALL) $(LOCKS)/audit.txt
	@touch $@

# Atheris has wheels for Linux alone; elsewhere its line in the lock has no effect, and its tests say that they are skipped.
$(VENV)/installed-all: $(VENV)/installed-dev $(VENV)/installed-audit $(LOCKS)/all.txt
	$(INSTALL) $(LOCKS)/all.txt
	@touch $@
