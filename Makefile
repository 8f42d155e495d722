# The two commands of the README; both make the same virtual environment first.
PYTHON ?= python3
BIN := .venv/bin
DEMO := results/demo

.PHONY: demo test test-long lint
.DELETE_ON_ERROR:

# The whole pipeline at a small size on the bundled voices, then one voice out of a mixture with the shipped weights.
demo: .venv/ready
	$(BIN)/python downloader.py --size 96 --datasets $(DEMO) \
		--speech datasets/demo/voices --noise datasets/demo/noise --music datasets/demo/music
	$(BIN)/python main.py --data $(DEMO)/preprocessed/size=96 --output $(DEMO)/extractor --logs $(DEMO)/runs \
		--steps 36 --every 18 --no-compile
	$(BIN)/python test.py --data $(DEMO)/preprocessed/size=96 --checkpoint $(DEMO)/extractor/best.pt \
		--output $(DEMO)/trained-for-a-minute --no-play
	$(BIN)/python test.py datasets/demo/mixture.flac --reference datasets/demo/reference.opus \
		--target datasets/demo/target.flac --checkpoint models/extractor/pretrained.pt --output $(DEMO)/shipped

test: .venv/ready-dev
	$(BIN)/python -m pytest -m "not long"

test-long: .venv/ready-dev
	$(BIN)/python -m pytest

lint: .venv/ready-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -r requirements.txt
	touch $@

.venv/ready-dev: .venv/ready requirements-dev.txt
	$(BIN)/pip install -r requirements-dev.txt
	touch $@
