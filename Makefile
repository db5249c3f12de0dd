# Every target sets itself up in .venv from nothing but Python >= 3.10 and make.
PYTHON ?= python3
DATA ?= ../shared/data
BIN := .venv/bin

.PHONY: demo test lint accuracy bench speedup static clean

demo: .venv/demo
	$(BIN)/python demo/run.py

# With Triton 3.6 beside the installed one, where there is a wheel of it; else its test is skipped.
test: .venv/test
	-$(MAKE) --no-print-directory .venv/triton36
	TINYDROP_TRITON36=$$(ls -d $(CURDIR)/.venv/triton36) $(BIN)/python -m pytest --cov --cov-report=term

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Real photographs and weights, where DATA holds them (docs/accuracy.md says what is looked for).
accuracy: .venv/test
	$(BIN)/python bench/accuracy.py --data $(DATA)

# Every operator against what a good PyTorch user would write; on a machine with a GPU: bench/gpu.sh.
bench: .venv/test
	$(BIN)/python -m pytest bench --benchmark-quiet --benchmark-json bench/results/ops.json
	$(BIN)/python bench/table.py bench/results/ops.json

# A stock ViT-B/16, dense against patched; fails below the bar.
speedup: .venv/test
	$(BIN)/python bench/cpu_speedup.py --bar 0.75

# What the compiler makes of every kernel, with the installed Triton and the oldest that is supported; no GPU needed.
static: .venv/test .venv/triton36
	$(BIN)/python bench/static.py --markdown bench/results/static.md
	PYTHONPATH=.venv/triton36 $(BIN)/python bench/static.py --markdown bench/results/static_triton36.md

.venv/triton36: .venv/test
	$(BIN)/python -m pip install --quiet --no-deps --target $@ triton==3.6.0

.venv/%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[$*]"
	@touch $@

clean:
	rm -rf .venv build *.egg-info
