# Each target is what one could type oneself; `make test` on a fresh machine does everything, set-up included.
PYTHON ?= python3
export PYTHONUNBUFFERED = 1

demo: .venv/installed
	.venv/bin/python demo/run_demo.py

# Models and tasks need a processor each; swarms, and what measures time, run one at a time.
test: lint
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist loadfile tests/models tests/tasks
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest --ignore tests/models --ignore tests/tasks

chaos: .venv/installed
	.venv/bin/python -m benchmarks.swarm_faults

bench: .venv/installed
	.venv/bin/python -m benchmarks.run_all

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

.venv/installed: requirements.txt requirements-bench.txt requirements-dev.txt
	test -d .venv || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet torch==2.13.0
	.venv/bin/python -m pip install --quiet -r requirements-dev.txt
	touch $@

.PHONY: demo test bench chaos lint
