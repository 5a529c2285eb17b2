# Two commands for a fresh machine: make quickstart, make test.
PYTHON ?= python3
BIN := .venv/bin
# A process on each of two GPUs, or where there is none on each of two cores, with one thread each; one where there is one.
RANKS := $(shell n=$$(nvidia-smi -L 2>/dev/null | grep -c ^GPU); [ $$n -gt 0 ] || n=$$(nproc); [ $$n -ge 2 ] && echo 2 || echo 1)
PRETRAIN := OMP_NUM_THREADS=1 PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/deepspeed --num_gpus $(RANKS) acn_scale/pretrain.py
SEED ?= 0
SUFFIX := $(if $(filter 0,$(SEED)),,_seed$(SEED))

.PHONY: quickstart quickstart-bert test clean

quickstart: data/digits/train/index.json data/digits/eval/index.json
	$(PRETRAIN) --config configs/quickstart/ac_vit.toml run.seed=$(SEED) run.name=quickstart/ac_vit$(SUFFIX)
	$(PRETRAIN) --config configs/quickstart/residual_vit.toml run.seed=$(SEED) run.name=quickstart/residual_vit$(SUFFIX)
	@$(BIN)/python tools/depth_report.py runs/quickstart/ac_vit$(SUFFIX) runs/quickstart/residual_vit$(SUFFIX)

quickstart-bert: data/pydoc/train/index.json data/pydoc/eval/index.json
	$(PRETRAIN) --config configs/quickstart/ac_bert.toml run.seed=$(SEED) run.name=quickstart/ac_bert$(SUFFIX)
	@$(BIN)/python tools/depth_report.py runs/quickstart/ac_bert$(SUFFIX)

test: .venv/test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -n 2 --dist worksteal

clean:
	rm -rf runs data .venv

.venv/run: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement requirements.txt
	$(BIN)/pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

.venv/test: .venv/run requirements-test.txt
	$(BIN)/pip install --quiet --requirement requirements-test.txt
	touch $@

data/digits/%/index.json: | .venv/run
	$(BIN)/python tools/make_image_shards.py --source digits --split $* --shard-size 200 --out data/digits/$*

data/pydoc/tokenizer/tokenizer.model: | .venv/run
	$(BIN)/python tools/train_tokenizer.py --source pydoc --vocab-size 1024 --eval-share 0.1 --character-coverage 1 \
		--out data/pydoc/tokenizer

data/pydoc/train/index.json: data/pydoc/tokenizer/tokenizer.model
	$(BIN)/python tools/make_text_shards.py --source pydoc --tokenizer data/pydoc/tokenizer --tokens 64 --out data/pydoc

data/pydoc/eval/index.json: data/pydoc/train/index.json
