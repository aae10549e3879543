# make run    train the quickstart, write and validate sub.csv, report its robustness
# make test   lint, type check, tests
# make speedrun    train for robustness on CIFAR-10 in data/raw/cifar10, print what AutoAttack leaves
# make container-check    build the container twice, compare, predict in it (docker or podman)
# make requirements.lock  lock what the container installs, with hashes (takes uv from PyPI)
PYTHON ?= python3
BIN := .venv/bin
# accelerate would give a CPU process one thread.
THREADS := $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)

.PHONY: run test speedrun container-check clean

run: .venv/installed
	$(BIN)/accelerate launch --num_processes 1 --num_cpu_threads_per_process $(THREADS) \
		training/train.py --overwrite
	$(BIN)/python inference/predict.py --out sub.csv
	$(BIN)/python submission/validate.py sub.csv
	$(BIN)/python inference/evaluate.py --checkpoint runs/quickstart --out report \
		--attacks fgsm,pgd --steps 10 --limit 100
	@echo "sub.csv is valid; the report is report/report.html"

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal --durations 15

speedrun: .venv/installed
	$(BIN)/python benchmarks/speedrun.py

.venv/installed: requirements.txt requirements-dev.txt pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else \
		f"expected Python 3.11 or newer, found {v[0]}.{v[1]}: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement requirements.txt \
		--requirement requirements-dev.txt --editable .
	touch $@

container-check: .venv/installed
	$(BIN)/python tests/container_check.py

# The container's lock files. The second needs the index of torch's CPU wheels within reach.
CPU_INDEX := https://download.pytorch.org/whl/cpu
LOCKED := --generate-hashes --no-header --no-annotate \
	--python-version 3.11 --python-platform x86_64-manylinux_2_28

requirements.lock: requirements.txt .venv/uv
	{ echo "# What the container installs: requirements.txt and all that it needs, for Linux on x86-64 and"; \
	echo "# Python 3.11. Made by \`make $@\` (uv); not by hand."; \
	.venv/uv/bin/uv pip compile $(LOCKED) requirements.txt; } > $@.new
	mv $@.new $@

requirements.cpu.lock: requirements.txt .venv/uv
	sed -E 's/^(torch|torchvision)==.*/&+cpu/' requirements.txt \
		| .venv/uv/bin/uv pip compile $(LOCKED) --extra-index-url $(CPU_INDEX) \
		--index-strategy unsafe-best-match - > $@.new
	mv $@.new $@

.venv/uv: .venv/installed
	$(PYTHON) -m venv $@
	$@/bin/pip install --quiet uv

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache
