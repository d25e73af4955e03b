PYTHON ?= python3
SETUP = $(PYTHON) -m venv .venv && .venv/bin/pip install -q -r requirements.txt -e ".[dev]"

.PHONY: demo test check

demo:                     # one run on the handwritten digits
	$(SETUP) && .venv/bin/brqat

test:                     # the tests that take seconds
	$(SETUP) && .venv/bin/pytest

check:                    # what CI runs
	.ci/run
