# make demo   train a small GPT over the parameter server, sync and async, and write a report
# make quick  the tests that start no process, in less than a minute
# make check  the lint, and the tests of servers and workers but for the longest, in some minutes
# make test   the lint and every test
#
# All make a virtual environment in .venv first and keep it; a changed list of packages is installed into it.
# PYTHON=python3.12 chooses the interpreter, ARGS="--slow w1:3x" are options for the program that the target runs.

PYTHON ?= $(shell scripts/find-python)
ARGS ?=
export TAG ?=

VENV := .venv
BIN := $(VENV)/bin
PACKAGES := pyproject.toml setup.py constraints.txt scripts/protoc.txt
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq --constraint constraints.txt

export PATH := $(CURDIR)/$(BIN):$(PATH)
# Of this checkout and this environment only, whatever the caller's shell has.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV

.PHONY: help demo quick check test lint proto bench gpu gpu-wheels chaos loops fuzz hostile soak docs dist clean

help:
	@sed -n 's/^# make/make/p' Makefile

demo: $(VENV)/demo
	ps-compare $(ARGS)

quick: $(VENV)/dev
	scripts/test --tier quick $(ARGS)

check: $(VENV)/dev
	scripts/lint
	scripts/test --tier check $(ARGS)

test: $(VENV)/dev
	scripts/lint
	scripts/test $(ARGS)

# make lint   ruff, mypy, and whether the generated code is up to date
lint: $(VENV)/dev
	scripts/lint

# make docs   the documentation as a site, in build/site
docs: $(VENV)/dev
	NO_MKDOCS_2_WARNING=1 mkdocs build --quiet
	@echo "open build/site/index.html"

# make proto  generate common/pb from proto/
proto: $(VENV)/dev
	scripts/protos

# make bench  seconds per round of this project beside others that do the same work, in one run
bench: $(VENV)/dev
	python bench/versus.py $(ARGS)

# make gpu    the tests that need a GPU, then bits and samples per second there; at most six minutes, without a network
gpu:
	scripts/gpu $(ARGS)

# make gpu-wheels  bring together what make gpu needs beside torch, for a machine without a network
gpu-wheels: $(VENV)/python
	scripts/gpu --collect

# make chaos  random faults in real jobs, and what they cost; SECONDS=3600 SEED=7 ARGS="--shards 3 --data-sets 40"
chaos: $(VENV)/dev
	python -m tests.chaos.run $(if $(SECONDS),--seconds $(SECONDS)) $(if $(SEED),--seed $(SEED)) $(ARGS)

# make loops  training loops put together at random, each compared with plain torch after each line; SECONDS=600 SEED=7
loops: $(VENV)/dev
	python -m tests.loops.random_loops $(if $(SECONDS),--seconds $(SECONDS)) $(if $(SEED),--seed $(SEED)) $(ARGS)

# make fuzz   bytes that nobody would write, to all that reads the bytes of others; SECONDS=600 SEED=7
fuzz: $(VENV)/dev
	$(PIP) 'atheris>=3.0'
	python -m tests.fuzz.run $(if $(SECONDS),--seconds $(SECONDS)) $(if $(SEED),--seed $(SEED)) $(ARGS)

# make hostile  hostile members and floods of strangers, and what they cost the servers; SECONDS=1800 SEED=7
hostile: $(VENV)/dev
	python -m tests.hostile.run $(if $(SECONDS),--seconds $(SECONDS)) $(if $(SEED),--seed $(SEED)) $(ARGS)

# make soak   a long job whose workers die and join; fails when a server grows; MINUTES=30
soak: $(VENV)/dev
	python -m tests.soak.run $(if $(MINUTES),--minutes $(MINUTES)) $(if $(SEED),--seed $(SEED)) $(ARGS)

# make dist   what is published, in dist/; TAG=v1.2.3 has to be the version that it has
dist: $(VENV)/dev
	@version=$$(python -c 'import torch_ps; print(torch_ps.__version__)') && \
	    test "$${TAG:-v$$version}" = "v$$version" || { echo "make: $$TAG is not the version $$version" >&2; exit 1; }
	rm -rf dist
	python -m build --no-isolation

# make clean  remove the environment and everything that tools left
clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are written last, so an installation that was cut off is repeated.
$(VENV)/python:
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or newer found; give one with PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "making $(VENV) with $(PYTHON)"
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) setuptools
	@touch $@

$(VENV)/demo: $(VENV)/python $(PACKAGES)
	@echo "installing (torch is the large part; some minutes at the first time)"
	$(PIP) --no-build-isolation --editable '.[compare]'
	@touch $@

$(VENV)/dev: $(VENV)/demo
	$(PIP) --no-build-isolation --editable '.[compare,dev]'
	scripts/protos --setup
	@touch $@
