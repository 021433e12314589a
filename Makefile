# `make demo`, `make test` and `make doctor` each go from a fresh clone to done; they make .venv by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test doctor doctor-full lint clean

$(VENV)/.run: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/.dev: $(VENV)/.run requirements-dev.txt
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

demo: $(VENV)/.run
	$(BIN)/python demo.py

# one process a core, one thread a process: the tests are many and small; each takes neighbours, which share fixtures, and what is left at the end
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

# every model YAML, the smallest scale of each: a training step, validation, fusing, deployment, ONNX; table in runs/doctor
doctor: $(VENV)/.run
	OMP_NUM_THREADS=1 $(BIN)/python doctor.py

# every scale; may take hours, and resumes where it was stopped
doctor-full: $(VENV)/.run
	OMP_NUM_THREADS=1 $(BIN)/python doctor.py --all-scales --resume --out runs/doctor-full

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) runs data/shapes data/shapes-*/
