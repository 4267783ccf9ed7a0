# `make tiny` and `make test` set up an environment of their own first; VENV says where, PYTHON with what.
VENV ?= .venv
PYTHON ?= python3
SHARED ?= ../shared
RUN := $(VENV)/bin/python

.PHONY: tiny test world frontier seeds resume pictures lint format memory clean

tiny: $(VENV)/installed
	$(RUN) -m dpo_lightning fit --config configs/tiny.yaml
	$(RUN) -m dpo_lightning test --config configs/tiny.yaml --ckpt_path last

test: $(VENV)/installed-test
	$(RUN) -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(VENV)/installed-test
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# Half an hour: the built-in world's base model and pairs, made anew.
WORLD := dpo_lightning/assets/world
world: $(VENV)/installed
	rm -rf runs/world
	$(RUN) -m dpo_lightning world blank --output_dir runs/world/blank
	$(RUN) -m dpo_lightning fit --config configs/world-sft.yaml --trainer.default_root_dir runs/world
	cd runs/world/version_0/export && cp config.json generation_config.json model.safetensors tokenizer*.json $(CURDIR)/$(WORLD)
	$(RUN) -m dpo_lightning world pairs --checkpoint world:base --output $(WORLD)/pairs.jsonl.gz

# Half an hour: reward against KL, for docs/frontier.md.
frontier: $(VENV)/installed
	rm -rf runs/frontier
	$(RUN) -m dpo_lightning sweep --config configs/tiny.yaml --grid configs/grids/frontier.yaml --output_dir runs/frontier
	cp runs/frontier/frontier.png docs/frontier.png

# A quarter of an hour: what the default recipe promises, with three seeds, and that flipped labels come up.
seeds: $(VENV)/installed-test
	$(RUN) -m pytest tests/e2e/test_tiny.py tests/e2e/test_pair_ledger.py -m campaign

# Minutes: a run that is killed goes on to the same bits, wherever and however.
resume: $(VENV)/installed-test
	$(RUN) -m pytest tests/e2e/test_resume.py -m campaign

# Minutes: the pictures of the page, after `make tiny`; needs chromium.
pictures: $(VENV)/installed-test
	$(RUN) -m tests.e2e.pictures --export $(lastword $(sort $(wildcard runs/tiny/version_*/export))) --output_dir docs

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
