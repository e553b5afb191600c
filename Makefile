# Every target prepares the environment first, so any of them can be the first command ever run.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BENCHES := kernel streaming replays inference recovery
# Beside other systems, which they install into environments of their own.
PEERS := backfill peers training

# Without starting what a package brings as a service.
INSTALL := test "$$(id -u)" = 0 && timeout 120 apt-get update -qq && \
	RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive timeout 240 apt-get install -qq -y --no-install-recommends

# Cached byte code makes every process of the system start in half the time.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo test check test-unit test-integration test-e2e bench $(BENCHES:%=bench-%) $(PEERS:%=bench-%) up down clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt ops/kafka-jars.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet uv==0.13.9
	VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --quiet --compile-bytecode --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m ops.jars
	command -v redis-server >/dev/null || ( $(INSTALL) redis-server >/dev/null ) || echo "no redis-server: its tests are skipped"
	$(BIN)/python -m streaming.compile_kernels
	touch $(READY)

demo: $(READY)
	$(BIN)/millrace demo $(if $(KEEP),--keep)

test:
	$(MAKE) test-unit
	$(MAKE) test-integration
	$(MAKE) test-e2e

test-unit: $(READY)
	$(BIN)/pytest tests/unit --numprocesses logical --maxprocesses 8 --dist loadfile

test-integration test-e2e: test-%: $(READY)
	$(BIN)/pytest tests/$*

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(BENCHES:%=bench-%)

$(BENCHES:%=bench-%) $(PEERS:%=bench-%): bench-%: $(READY)
	$(BIN)/python -m benchmarks.$*

up down: $(READY)
	$(BIN)/millrace $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
