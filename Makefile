# One command sets up everything: each target that needs the environment makes .venv first, and again only
# when setup.cfg, pyproject.toml or constraints.txt has changed.

PYTHON ?= python3
DATA_DIR ?= data
PYTEST_ARGS ?=
OVERHEAD_ARGS ?=
EVIDENCE_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEEP_RIVER := .venv-deep-river
TORCH_PIN := $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' constraints.txt)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv test test-all test-deep-river lint format demo benchmark-quick benchmark-overhead benchmark-sampling \
	benchmark-layers benchmark-sequences benchmark-curvature benchmark-scale benchmark-theory benchmark-sgld benchmark-gamma-decay \
	benchmark-convergence benchmark-streaming benchmark-language benchmark-ablations build clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-22s %s\n", $$1, $$2 }' Makefile

venv: $(STAMP)

$(STAMP): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "error: $(PYTHON) is not Python 3.10 or newer; name one with: make PYTHON=/path/to/python3" >&2; \
		exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "error: $(PYTHON) cannot make a virtual environment: its modules venv and ensurepip are" >&2; \
		echo "missing. On Debian and Ubuntu install python3-venv, or name another Python with:" >&2; \
		echo "make PYTHON=/path/to/python3" >&2; \
		exit 1; }
	@test -n "$(TORCH_PIN)" || { \
		echo "error: constraints.txt has no line that begins with torch==" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt "$(TORCH_PIN)"
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev]"
	@touch $@

test: $(STAMP) ## run the tests, but for the slow ones (PYTEST_ARGS="-k name" to choose)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-all: $(STAMP) ## run all tests, the slow ones too
	$(BIN)/python -m pytest -m "slow or not slow" $(PYTEST_ARGS)

test-deep-river: $(DEEP_RIVER)/.installed ## test against deep-river, in an environment of its own
	$(DEEP_RIVER)/bin/python -c "import deep_river.base"
	$(DEEP_RIVER)/bin/python -m pytest tests/clients/test_deep_river.py $(PYTEST_ARGS)

# deep-river 0.3.4 asks for torch < 2.6 and river < 0.26: it gets our torch and that river
$(DEEP_RIVER)/.installed: constraints.txt
	$(PYTHON) -m venv $(DEEP_RIVER)
	$(DEEP_RIVER)/bin/python -m pip install -c constraints.txt "$(TORCH_PIN)" numpy pytest pytest-timeout scikit-learn tqdm
	$(DEEP_RIVER)/bin/python -m pip install "river==0.25.0" "pandas<3" sortedcontainers torchviz
	$(DEEP_RIVER)/bin/python -m pip install --no-deps "deep-river==0.3.4"
	@touch $@

lint: $(STAMP) ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy bnp_optim lightning_callbacks

format: $(STAMP) ## format the code and fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: $(STAMP) ## run the demo
	$(BIN)/python -m demo

benchmark-quick: $(STAMP) ## accuracy of all methods on digits, under 5 minutes (EVIDENCE_ARGS=--fresh: run all again)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[benchmarks]"
	$(BIN)/python -m benchmarks.convergence --quick $(EVIDENCE_ARGS)

benchmark-convergence: $(STAMP) ## accuracy against all peers: days (EVIDENCE_ARGS="--preset short": hours; DATA_DIR=…)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[benchmarks]"
	$(BIN)/python -m benchmarks.convergence --data-dir "$(DATA_DIR)" $(EVIDENCE_ARGS)

benchmark-streaming: $(STAMP) ## river's streams, predict then learn, about 10 minutes (EVIDENCE_ARGS=--quick: one)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[benchmarks]"
	$(BIN)/python -m benchmarks.streaming $(EVIDENCE_ARGS)

benchmark-language: $(STAMP) ## a character GPT: days (EVIDENCE_ARGS="--preset short": 90 minutes; --quick: minutes)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[benchmarks]"
	$(BIN)/python -m benchmarks.language $(EVIDENCE_ARGS)

benchmark-ablations: $(STAMP) ## which default is best (EVIDENCE_ARGS="--only fold": one question; DATA_DIR=…)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[benchmarks]"
	$(BIN)/python -m benchmarks.ablations --data-dir "$(DATA_DIR)" $(EVIDENCE_ARGS)

benchmark-overhead: $(STAMP) ## measure what a training step costs, about 1.5 hours (OVERHEAD_ARGS=--quick: 2 minutes)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[benchmarks]"
	$(BIN)/python -m benchmarks.overhead $(OVERHEAD_ARGS)

benchmark-sampling: $(STAMP) ## what measuring less costs and saves, about 8 minutes (DATA_DIR=path/to/data)
	$(BIN)/python -m benchmarks.sampling --data-dir "$(DATA_DIR)"

benchmark-layers: $(STAMP) ## no bias, zero padding, embeddings: what is best, about an hour (DATA_DIR=path/to/data)
	$(BIN)/python -m benchmarks.layer_choices --data-dir "$(DATA_DIR)"

benchmark-sequences: $(STAMP) ## a recurrent network at many learning rates, about 25 minutes (DATA_DIR=path/to/data)
	$(BIN)/python -m benchmarks.sequences --data-dir "$(DATA_DIR)"

benchmark-curvature: $(STAMP) ## what an estimate of curvature costs, beside others, and the figure of docs/curvature.md
	$(BIN)/python -m benchmarks.curvature
	$(BIN)/python -m benchmarks.curvature --figure

benchmark-scale: $(STAMP) ## what the exchange between 1, 2 and 4 processes costs, about 5 minutes
	$(BIN)/python -m benchmarks.scale

benchmark-theory: $(STAMP) ## theory, predicted against measured: one figure per paper, about 10 minutes
	$(BIN)/python -m benchmarks.theory

benchmark-sgld: $(STAMP) ## sampling from a known posterior: SGLD and BNP-SGLD, about 2 minutes
	$(BIN)/python -m benchmarks.sgld

benchmark-gamma-decay: $(STAMP) ## batch noise as regularization: ζ, and a CNN, about 15 minutes (DATA_DIR=path/to/data)
	$(BIN)/python -m benchmarks.theory_gamma --data-dir "$(DATA_DIR)"
	$(BIN)/python -m benchmarks.gamma_decay --data-dir "$(DATA_DIR)"

build: $(STAMP) ## build sdist and wheel, and try the wheel in a fresh environment
	rm -rf build dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	$(BIN)/python scripts/check_wheel.py dist/*.whl --constraints constraints.txt

clean: ## remove the environment, caches and builds
	rm -rf $(VENV) $(DEEP_RIVER) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
