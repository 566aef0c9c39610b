PYTHON ?= python3
LAUNCH = .venv/bin/accelerate launch -q --config_file accelerate_configs/cpu.yaml

.PHONY: demo test lint .venv

# Trains MeanFlow and its flow-matching twin on handwritten digits, minutes each on 2 cores, and compares them.
demo: .venv
	$(LAUNCH) recipes/digits_dit.py --out runs/digits
	$(LAUNCH) recipes/digits_dit.py --objective.meanflow-ratio 0 --out runs/digits-flow
	.venv/bin/python tools/digits_report.py runs/digits --flow runs/digits-flow

test: .venv lint
	.venv/bin/pytest -n 2 --dist worksteal

lint: .venv
	.venv/bin/ruff check
	.venv/bin/ruff format --check

.venv: .venv/installed

.venv/installed: setup.cfg constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q -c constraints.txt -e '.[test]'
	touch $@
