PYTHON ?= python3
VENV := .venv/bin/python
DEMO := data/demo

SEED := 0

# Everything at the demo's size: the small backbone from scratch, on photos of 112 x 112.
DEMO_OPTIONS := --eval_datasets_folder=$(DEMO) --eval_dataset_name=toy_city --backbone=dino_tiny --crossimage_encoder \
	--resize 112 112 --extraction_batch_size=16 --seed=$(SEED)
DEMO_TRAINING := $(DEMO_OPTIONS) --train_resize 112 112 --freeze_te none --randaugment_ops 0
NEWEST = $$(ls -d logs/demo/$(1)/* | tail -n 1)

.PHONY: demo test lint bench

demo: $(DEMO)/toy_city
	$(VENV) train.py $(DEMO_TRAINING) --save_dir=demo/before --epochs_num=0
	$(VENV) train.py $(DEMO_TRAINING) --save_dir=demo/after --epochs_num=8 --train_batch_size=32 --lr=0.001
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
	done; echo "open in a browser: file://$(CURDIR)/$(call NEWEST,matches)/matches/index.html"

$(DEMO)/toy_city: datasets/toy_city.py | .venv/ready
	$(VENV) -m datasets.toy_city --output $(DEMO) --overwrite

test: .venv/ready
	$(VENV) -m pytest

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
	$(PYTHON) -m venv .venv
	$(VENV) -m pip install --quiet --requirement requirements-dev.txt
	touch $@
