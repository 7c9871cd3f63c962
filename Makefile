# One way to run everything; each target installs first what it needs, into .venv.
VENV := .venv
PYTHON := $(VENV)/bin/python
MODEL := dense
E2E := not ray and not thorough
# Processes that run tests; in tests/e2e each starts its engines.
WORKERS := 2
INSTALLED := $(VENV)/.installed

.PHONY: install demo check test test-all unit e2e test-ray soak kills bench versions lint format clean
.DEFAULT_GOAL := install

install: $(INSTALLED)

# uv takes the complete SGLang in under a minute; where it is absent, pip brings it.
$(INSTALLED): pyproject.toml
	@test -x $(PYTHON) || python3 -m venv $(VENV)
	@command -v uv >/dev/null || test -x $(VENV)/bin/uv || $(PYTHON) -m pip install --quiet uv
	PATH="$$PATH:$(VENV)/bin" uv pip install --quiet --compile-bytecode --python $(PYTHON) --editable '.[dev]'
	@touch $@

# A mixture of experts: make demo MODEL=moe
demo: install
	@PYTHONWARNINGS=ignore $(PYTHON) -m examples.demo --model $(MODEL)

check: lint unit

test: unit e2e

# With the cases that make CI too long.
test-all:
	$(MAKE) test E2E="not ray"

unit: install
	$(PYTHON) -m pytest tests/unit -n $(WORKERS)
	$(PYTHON) -m pytest tests/kernels

# lm-evaluation-harness comes last: it brings scikit-learn, which slows every process's start.
e2e: install
	$(PYTHON) -m pytest tests/e2e -m "$(E2E)" --ignore tests/e2e/test_evaluation.py \
		-n $(WORKERS) --dist loadfile
	PATH="$$PATH:$(VENV)/bin" uv pip install --quiet --python $(PYTHON) --editable '.[eval]'
	$(PYTHON) -m pytest tests/e2e/test_evaluation.py -m "$(E2E)"

# Two engines under Ray, about 5 GB of memory; not part of `make test`.
test-ray: install
	PATH="$$PATH:$(VENV)/bin" uv pip install --quiet --python $(PYTHON) --editable '.[ray]'
	$(PYTHON) -m pytest tests/e2e/test_ray.py

# Ten minutes of random load, faults among it; not part of `make test`.
soak: install
	PYTHONWARNINGS=ignore $(PYTHON) -m tests.soak.soak --minutes 10 --seed 0

# One batch job through twenty kills and full disks, a quarter of an hour; needs root for a tmpfs.
kills: install
	PYTHONWARNINGS=ignore $(PYTHON) -m tests.soak.kills --seed 0

# All that the machine allows, an hour and a half or more; writes bench/results and docs/benchmarks.md.
bench: install
	PYTHONWARNINGS=ignore $(PYTHON) -m bench.suite

# Is the working tree as fast as commit BASE? make versions BASE=main
versions: install
	PYTHONWARNINGS=ignore $(PYTHON) -m bench.versions $(BASE)

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: install
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
