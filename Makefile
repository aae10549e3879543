# make run    train the quickstart, write and validate sub.csv, report its robustness
# make test   lint, type check, tests
PYTHON ?= python3
BIN := .venv/bin

.PHONY: run test clean

run: .venv/installed
	$(BIN)/accelerate launch --num_processes 1 training/train.py --overwrite
	$(BIN)/python inference/predict.py --out sub.csv
	$(BIN)/python submission/validate.py sub.csv
	$(BIN)/python inference/evaluate.py --checkpoint runs/quickstart --out report \
		--attacks fgsm,pgd --limit 100
	@echo "sub.csv is valid; the report is report/report.html"

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto

.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else \
		f"expected Python 3.11 or newer, found {v[0]}.{v[1]}: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement requirements.txt
	touch $@

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache
