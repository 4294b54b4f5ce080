# make run    set up, reconstruct 16 bundled images from one averaged gradient in 2,500 evaluations, say where they are
# make test   set up, lint, run the tests
# make test-long   the tests that take long; a shorter one of `make test` asks nearly the same as each
# make docs   write docs/flags.md from the comments at the top of main_MAGIA_sel.py, and docs/results.md and
#             the tables of results in README.md, docs/cluster.md, docs/defences.md, docs/local-training.md and
#             docs/networks.md from results/data
PYTHON ?= python3
BIN := .venv/bin
ARGS ?= --max_evals 2500

.PHONY: run test test-long lint docs clean

run: .venv/installed
	$(BIN)/python main_MAGIA_sel.py $(ARGS)

test: lint
	$(BIN)/python -m pytest

test-long: .venv/installed-dev
	$(BIN)/python -m pytest -m long

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

docs: .venv/installed
	$(BIN)/python -m cli.docs
	$(BIN)/python -m bench.docs

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements.txt
	touch $@

.venv/installed-dev: requirements-dev.txt requirements-benchmark.txt requirements-cluster.txt .venv/installed
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements-dev.txt
	touch $@
