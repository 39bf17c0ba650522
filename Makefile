# Two commands are all that a fresh machine needs: `make run` and `make test`. Both install into $(VENV) first.

PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=

PY  := $(VENV)/bin/python
RUN := $(VENV)/bin/finetune-bn fit --config configs/quickstart.yaml

.DEFAULT_GOAL := help
.PHONY: help run test slow fuzz mutation coverage sweep gpu check docs install clean distclean

help:  ## print this list
	@echo "make TARGET [ARGS='more arguments of the command'] [PYTHON=python3.12]"
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: $(VENV)/.demo  ## the main job: fine-tune EfficientNet-Lite0 with frozen BatchNorm on the emoji, on this machine
	$(RUN) $(ARGS)

# A file of tests stays in one process: what its tests share (weights, data, fixtures) is made once.
test: $(VENV)/.dev  ## the tests, a process for each core
	$(PY) -m pytest -q -n auto --maxprocesses 8 --dist loadfile $(ARGS)

slow: $(VENV)/.dev  ## the tests that take minutes
	$(PY) -m pytest -q -m slow $(ARGS)

fuzz: $(VENV)/.dev  ## 2,000 random networks, damaged images, model files and changed configs each (ARGS='--only configs')
	$(PY) scripts/fuzz.py $(ARGS)

mutation: $(VENV)/.dev  ## change the code in one place at a time: do the tests notice?
	$(PY) scripts/mutate.py $(ARGS)

coverage: $(VENV)/.dev  ## which lines and branches of the package the tests run
	$(PY) scripts/measure_coverage.py $(ARGS)

sweep: $(VENV)/.demo  ## convert and revert one net of every timm family that has BatchNorm (ARGS=--all: every net)
	$(PY) scripts/sweep_timm.py $(ARGS)

gpu: $(VENV)/.dev  ## all that only a GPU can tell, in eight minutes (ARGS=--tiny: with tiny sizes, on a CPU too)
	$(PY) scripts/gpu_check.py $(ARGS)

check: $(VENV)/.dev  ## ruff and mypy; the package is built and looked at
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	rm -rf dist
	$(PY) -m build --no-isolation . > /dev/null
	$(PY) scripts/check_package.py dist

docs: $(VENV)/.dev  ## the documentation as a site: site/index.html
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet
	@echo "site/index.html"

install: $(VENV)/.dev  ## only install, with everything for development

clean:  ## remove caches and build output; runs/ is yours and stays
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean  ## clean, and remove the virtual environment too
	rm -rf $(VENV)

# A virtual environment that was made halfway would pass for a whole one the next time, so it is removed.
$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is missing or older than 3.11; name a newer one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "Creating the virtual environment $(VENV)"
	@$(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "$(PYTHON) cannot make one; on Debian: apt-get install python3-venv" >&2; exit 1; }

# The stamps make a second run start at once; they are made only by an installation that went through.
$(VENV)/.demo: pyproject.toml setup.py constraints.txt | $(PY)
	@echo "Installing finetune_bn with the extra [demo] into $(VENV) (torch is large: this takes some minutes)"
	@$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[demo]'
	@touch $@

$(VENV)/.dev: pyproject.toml setup.py constraints.txt | $(PY)
	@echo "Installing finetune_bn with the extra [dev] into $(VENV) (torch is large: this takes some minutes)"
	@$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.demo
