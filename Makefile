# Every target sets itself up in .venv from nothing but Python >= 3.10 and make.
PYTHON ?= python3
DATA ?= ../shared/data
BIN := .venv/bin

.PHONY: demo test test-slow test-avx2 test-all coverage mutants lint accuracy calibration fit models bench speedup end-to-end static clean

demo: .venv/demo
	$(BIN)/python demo/run.py

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

test: .venv/test
	$(PYTEST) -m "not slow"

# Compilers, the GPU emulator and other processes; with Triton 3.6 beside the installed one, if there is a wheel of it.
SLOW ?= tests
test-slow: .venv/test
	-$(MAKE) --no-print-directory .venv/triton36
	TINYDROP_TRITON36=$$(ls -d $(CURDIR)/.venv/triton36) $(PYTEST) -m slow $(SLOW)

# What touches numbers, as on a CPU of AVX2 alone (no AVX512, and no bfloat16 in oneDNN). Inductor has a cache of its own
# there, because it would take the code that it compiled for the real CPU.
AVX2 := ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 \
	TORCHINDUCTOR_CACHE_DIR=$(CURDIR)/build/inductor-avx2
test-avx2: .venv/test
	$(AVX2) $(PYTEST) -m "not slow" tests/guidance tests/test_patching.py $(addprefix tests/, cli/test_precision.py cli/test_cli.py \
		engine/test_onednn.py engine/test_engine.py families/test_levels.py)

test-all: test test-slow test-avx2

# The default tests again, slower for being watched; fails below the floor.
coverage: .venv/test
	$(PYTEST) -m "not slow" --cov --cov-report=term:skip-covered --cov-fail-under=90

# Faults seeded one by one, each of which the tests must notice.
mutants: .venv/test
	$(BIN)/python tests/mutants/run.py

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tests/prose.py

# Real photographs and weights, where DATA holds them (docs/accuracy.md says what is looked for).
accuracy: .venv/test
	$(BIN)/python bench/accuracy.py --data $(DATA) --dtype bfloat16 --cache build/accuracy \
		--out bench/results/accuracy_cpu.md

# Every model name of timm, tried (docs/models.md).
models: .venv/test
	cd tests && PYTHONPATH=. ../$(BIN)/python -W ignore families/timm_names.py ../docs/models.md

# Whether certificates hold, on the same answers.
calibration: .venv/test
	$(BIN)/python bench/calibration.py --data $(DATA) --cache build/accuracy --out bench/results/calibration_cpu.md

# Guidance models fitted to the target's answers, on the same photographs.
fit: .venv/test
	$(BIN)/python bench/fit_guidance.py --data $(DATA) --cache build/fit --out bench/results/fit_guidance_cpu.md

# Every operator against what a good PyTorch user would write; on a machine with a GPU: bench/gpu.sh.
bench: .venv/test
	rm -f bench/results/ops.jsonl
	$(BIN)/python -m pytest bench --benchmark-quiet --lines bench/results/ops.jsonl
	$(BIN)/python bench/table.py bench/results/ops.jsonl

# A stock ViT-B/16, dense against patched, at last beside busy processes; fails where the mixed policy stays below the bar.
speedup: .venv/test
	$(BIN)/python bench/cpu_speedup.py --batch-sizes 1 8 32 --json bench/results/cpu_vit_b16.json
	$(BIN)/python bench/cpu_speedup.py --policy mixed --bar 0.8 --json bench/results/cpu_vit_b16_mixed.json
	$(BIN)/python bench/cpu_speedup.py --dtype auto --batch-sizes 1 8 32 --json bench/results/cpu_vit_b16_bfloat16.json
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python bench/cpu_speedup.py --busy 3 --batch-sizes 1 8 32 \
		--json bench/results/cpu_vit_b16_busy.json

# A stock ViT-B/16 and what a user would pick instead: dense, compiled, merged, padded, smaller, in ONNX Runtime.
END_TO_END := bench/results/end_to_end_cpu
end-to-end: .venv/test .venv/bench
	$(BIN)/python bench/end_to_end.py --json $(END_TO_END).json
	$(BIN)/python bench/end_to_end.py --show $(END_TO_END).json --plot $(END_TO_END).png > $(END_TO_END).md

# What the compiler makes of every kernel, with the installed Triton and the oldest that is supported; no GPU needed.
# The summary is kept in git, the full tables beside it are not.
static: .venv/test .venv/triton36
	PYTHONPATH=.venv/triton36 $(BIN)/python bench/static.py --table bench/results/static_full_triton36.md \
		--json bench/results/static_full_triton36.json
	$(BIN)/python bench/static.py --table bench/results/static_full.md \
		--summary bench/results/static.md --beside bench/results/static_full_triton36.json

.venv/triton36: .venv/test
	$(BIN)/python -m pip install --quiet --no-deps --target $@ triton==3.6.0

.venv/%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[$*]"
	@touch $@

clean:
	rm -rf .venv build *.egg-info
