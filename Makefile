PYTHON ?= python3
VENV := .venv/bin/python
DEMO := data/demo

SEED := 0
EPOCHS := 8

# Everything at the demo's size: the small backbone from scratch, on photos of 112 x 112.
DEMO_OPTIONS := --eval_datasets_folder=$(DEMO) --eval_dataset_name=toy_city --backbone=dino_tiny --crossimage_encoder \
	--resize 112 112 --extraction_batch_size=16 --seed=$(SEED)
DEMO_TRAINING := $(DEMO_OPTIONS) --train_resize 112 112 --freeze_te none --randaugment_ops 0
NEWEST = logs/demo/$(1)/latest

.PHONY: help demo test test-fast lint bench

help:
	@echo "make demo       a made city, training of a small model, recall before and after, pages and pictures"
	@echo "make test       all tests, on up to four processes of one thread each"
	@echo "make test-fast  those that start no process and build no ViT-B, for use while editing"
	@echo "make lint       ruff and mypy"
	@echo "make bench      speed and memory of each stage"
	@echo "Each first makes .venv with requirements-dev.txt, once."

demo: $(DEMO)/toy_city
	$(VENV) train.py $(DEMO_TRAINING) --save_dir=demo/before --epochs_num=0
	$(VENV) train.py $(DEMO_TRAINING) --save_dir=demo/after --epochs_num=$(EPOCHS) --train_batch_size=32 --lr=0.001
	$(VENV) eval.py $(DEMO_OPTIONS) --save_dir=demo/matches --resume=$(call NEWEST,after)/best_model.pth \
		--save_predictions=5
	@# The pictures show clusters of trained features, as the recipe finds them; those of an untrained backbone die out.
	$(VENV) train.py $(DEMO_TRAINING) --save_dir=demo/clusters --epochs_num=0 \
		--foundation_model_path=$(call NEWEST,after)/best_model.pth
	$(VENV) eval.py $(DEMO_OPTIONS) --save_dir=demo/assignments --resume=$(call NEWEST,clusters)/best_model.pth \
		--save_assignments=6
	@echo; for run in before after; do \
		folder=$(call NEWEST,$$run); \
		echo "$$run training: $$(sed -n 's/.*INFO Recalls/Recalls/p' $$folder/info.log), in $$folder"; \
	done; echo "clusters of some photos' patches, of the layer as k-means initialises it (the trained one sends most to" \
		"the ghost cluster): $(call NEWEST,assignments)/assignments"; \
	echo "open in a browser: file://$(CURDIR)/$(call NEWEST,matches)/matches/index.html"

$(DEMO)/toy_city: $(wildcard datasets/toy_city/*.py) | .venv/ready
	$(VENV) -m datasets.toy_city --output $(DEMO) --overwrite

# One thread a process: tests are many and small, and threads would wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(VENV) -m pytest -n auto --maxprocesses=4 --dist=worksteal

test: .venv/ready
	$(PYTEST)

test-fast: .venv/ready
	$(PYTEST) -m "not slow"

bench: .venv/ready
	$(VENV) -m benchmarks.stages
	$(VENV) -m benchmarks.compare
	$(VENV) -m benchmarks.end_to_end
	$(VENV) -m benchmarks.memory

lint: .venv/ready
	$(VENV) -m ruff check .
	$(VENV) -m ruff format --check .
	$(VENV) -m mypy

.venv/ready: requirements.txt requirements-dev.txt
	@echo "Installing requirements-dev.txt into .venv: PyTorch with CUDA and the rest, 7.5 GB, once; some minutes."
	$(PYTHON) -m venv .venv
	@# uv is several times as fast; it knows no pip.conf, so where it finds no packages, pip does it.
	if ! { command -v uv && uv pip install --python $(VENV) --requirement requirements-dev.txt; }; then \
		$(VENV) -m pip install --requirement requirements-dev.txt; fi
	touch $@
