# Each target is what one could type oneself; `make test` on a fresh machine does everything, set-up included.
PYTHON ?= python3
export PYTHONUNBUFFERED = 1

# One thread for each test. Many of them wait for something, so that three at once keep two processors busy; swarms, in
# which time matters, run one at a time (tried: two at once disturb each other and are hardly quicker).
PYTEST = OMP_NUM_THREADS=1 .venv/bin/python -m pytest
ALONE = -n 3 --dist loadfile --no-loadscope-reorder -m "not swarm and not slow and not gpu"
SWARMS = -m "swarm and not slow and not gpu"

demo: .venv/installed
	.venv/bin/python demo/run_demo.py

test: lint
	$(PYTEST) $(ALONE)
	$(PYTEST) tests/swarm/test_join.py -k test_swarm_of_two_trainers

test-all: lint
	$(PYTEST) $(ALONE)
	$(PYTEST) $(SWARMS)

chaos: .venv/installed
	.venv/bin/python -m benchmarks.swarm_faults

bench: .venv/installed
	.venv/bin/python -m benchmarks.run_all

# Installs nothing: whatever is there is measured.
gpu:
	$(if $(wildcard .venv/bin/python),.venv/bin/python,$(PYTHON)) -m benchmarks.gpu --minutes 9 --results benchmarks/gpu.json

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

.venv/installed: requirements.txt requirements-bench.txt requirements-dev.txt
	test -d .venv || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet torch==2.13.0
	.venv/bin/python -m pip install --quiet -r requirements-dev.txt
	touch $@

.PHONY: demo test test-all bench chaos gpu lint
