VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: help setup demo test test-all lint format clean

help:
	@echo "make demo      train a small DCA language model and image classifier (about 10 minutes on 2 cores)"
	@echo "make test      run the fast tests"
	@echo "make test-all  run the slow tests, too"
	@echo "make setup     build $(VENV) alone"
	@echo "make lint      check style and format; make format mends them"

# One environment, grown by what is asked for: the `test` extra holds the `training` extra.
$(VENV)/.training $(VENV)/.test: $(VENV)/.%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[$*]"
	touch $@

setup: $(VENV)/.training $(VENV)/.test

# A demo that was interrupted goes on where it was.
resume = $(if $(wildcard runs/$(1)/run.yaml),--resume_from_checkpoint)

demo: $(VENV)/.training
	$(BIN)/python -m training.image_classification configuration/demo/image.yaml $(call resume,demo/image)
	$(BIN)/python -m training.causal_lm configuration/demo/text.yaml $(call resume,demo/text)
	@echo
	@echo "Both models are trained. Results, model cards and pictures:"
	@echo "  runs/demo/text/README.md   the language model, next to the same transformer with the standard residual sum"
	@echo "  runs/demo/image/README.md  the image classifier"
	@echo "What to try next:"
	@echo "  load      $(BIN)/python -c \"import modeling_dca, transformers; print(transformers.AutoModelForCausalLM.from_pretrained('runs/demo/text'))\""
	@echo "  generate  $(BIN)/python -c \"import modeling_dca, transformers; print(transformers.pipeline('text-generation', 'runs/demo/text')('def __init__(self', max_new_tokens=60)[0]['generated_text'])\""
	@echo "  push      $(BIN)/python -m training.publish runs/demo/text YOUR_NAME/dca-demo-text"

test: $(VENV)/.test
	$(BIN)/python -m pytest

test-all: $(VENV)/.test
	$(BIN)/python -m pytest -m "not gpu"

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) *.egg-info build .pytest_cache .ruff_cache
