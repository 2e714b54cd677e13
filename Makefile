# Set-up, demonstration, tests. Every target can be run again; finished work is not repeated.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO := runs/demo
EXAMPLES := runs/examples

.PHONY: demo examples test check links bench docs wheel lowest clean

demo: $(DEMO)/results.json  ## train on the bundled digits, audit, show verdict and report
	@$(BIN)/robustann report $(DEMO)/results.json

$(DEMO)/results.json: $(DEMO)/model.safetensors
	$(BIN)/robustann audit --model $< --data digits --norm linf --eps 0.1 --output-dir $(DEMO) --quiet

$(DEMO)/model.safetensors: | $(VENV)/.installed
	$(BIN)/robustann train --data digits --out $@

examples: $(EXAMPLES)/compare.html  ## two reports: a plainly trained model, and the same hardened

$(EXAMPLES)/compare.html: $(EXAMPLES)/hardened/after/results.json
	$(BIN)/robustann compare $(EXAMPLES)/hardened/before/results.json $< --out $@

$(EXAMPLES)/hardened/after/results.json: $(EXAMPLES)/model.safetensors
	$(BIN)/robustann harden --model $< --data digits --norm linf --eps 0.1 --preset quick \
		--defense trades --epochs 20 --weights --output-dir $(EXAMPLES)/hardened

$(EXAMPLES)/model.safetensors: | $(VENV)/.installed
	$(BIN)/robustann train --data digits --out $@

test: $(VENV)/.installed-test  ## run the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8

check: $(VENV)/.installed-test  ## style, types, what is imported and declared, and which floor may import which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/deptry robustann attacks defenses reports

docs: $(VENV)-docs/.installed  ## the documentation as a site, in site/
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --strict

links: $(VENV)/.installed-test  ## ask online whether every link that leads out still holds
	$(BIN)/python tests/links.py

bench: $(VENV)/.installed-bench  ## speed, side by side with other libraries
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/bench.py --output-dir runs/bench

wheel:  ## what strangers get: the wheel in an environment of its own, used outside the checkout
	PYTHON=$(PYTHON) .ci/wheel $(VENV)-wheel

lowest:  ## the whole test suite with the oldest versions of everything that pyproject.toml allows
	.ci/lowest --numprocesses auto --maxprocesses 8

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; try make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-%: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	touch $@

# An environment of its own: the code is read, not imported, so PyTorch is not needed.
$(VENV)-docs/.installed: pyproject.toml
	test -x $(VENV)-docs/bin/python || $(PYTHON) -m venv $(VENV)-docs
	$(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' > $(VENV)-docs/requirements.txt
	$(VENV)-docs/bin/python -m pip install --quiet --requirement $(VENV)-docs/requirements.txt
	touch $@

clean:  ## remove the environment and what the demonstration wrote
	rm -rf $(VENV) $(VENV)-docs $(VENV)-wheel site $(DEMO) $(EXAMPLES)
