# `make tiny` and `make test` set up an environment of their own first; VENV says where, PYTHON with what.
VENV ?= .venv
PYTHON ?= python3
SHARED ?= ../shared
RUN := $(VENV)/bin/python

.PHONY: tiny test lint format memory clean

tiny: $(VENV)/installed
	$(RUN) -m tests.toy runs/toy
	$(RUN) -m dpo_lightning fit --config configs/tiny.yaml

test: $(VENV)/installed-test
	$(RUN) -m pytest

lint: $(VENV)/installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(VENV)/installed-test
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# Minutes: needs a tokenizer and pairs, see benchmarks/memory.py.
memory: $(VENV)/installed
	$(RUN) benchmarks/memory.py --source $(SHARED)/data/rm-static-test.jsonl.gz --tokenizer $(SHARED)/tokenizers/gpt2

$(VENV)/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable .[test]
	touch $@

clean:
	rm -rf $(VENV) runs build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
