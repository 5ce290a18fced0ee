# make demo    set up, and train across a slow link          make test    set up, and run what CI runs
# make quick   the tests that take seconds                   make docs    the documentation, into build/site
# make test-oldest   all tests with the oldest versions that pyproject.toml declares, on Python 3.11; PYTEST='tests/plugins -q' to choose
# make bench   measure against the peers (minutes; the throttled link needs root)
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Without an NVIDIA driver the CPU build of torch serves as well and is a tenth of the size: taken where pip finds one, else pip's default.
TORCH  ?= $(if $(shell command -v nvidia-smi),,torch==2.13.0+cpu)

.PHONY: demo test test-oldest quick lint types links docs bench compat clean
demo: $(VENV)/.ready
	$(BIN)/python examples/demo.py
test: lint types
	$(BIN)/python -m pytest
test-oldest: # an environment of its own
	mkdir -p build
	$(PYTHON) tests/oldest.py >build/oldest.txt
	PIP_CONSTRAINT=build/oldest.txt $(MAKE) VENV=build/oldest TORCH="$$(grep '^torch==' build/oldest.txt)+cpu" build/oldest/.ready
	OMP_NUM_THREADS=1 build/oldest/bin/python -m pytest $(PYTEST)
quick: $(VENV)/.ready
	$(BIN)/python -m pytest -m 'not slow'
lint: $(VENV)/.ready
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/lint-imports
types: links
	$(BIN)/mypy
links: $(VENV)/.ready # mypy and mkdocstrings read the packages through links, not through the import hook
	mkdir -p build/types/fulgurite
	for root in commands strategies callbacks plugins; do ln -sfn "../../../$$root" "build/types/fulgurite/$$root"; done
docs: links
	$(BIN)/mkdocs build --strict
bench: $(VENV)/.ready
	$(BIN)/python benchmarks/e3m0.py
	$(BIN)/python benchmarks/streaming_diloco.py
	$(BIN)/python benchmarks/federated.py
	$(BIN)/python benchmarks/fedspeed.py
	$(BIN)/python benchmarks/gradient_coherence.py
	$(BIN)/python benchmarks/hessian_spectrum.py
	$(BIN)/python benchmarks/gradient_regularized_newton.py
	$(BIN)/python benchmarks/jacobian_homeostasis.py
	$(BIN)/python benchmarks/exponentiated_gradient.py
	$(BIN)/python benchmarks/sequential_gradient_coding.py
	$(BIN)/python benchmarks/scale.py
	$(BIN)/python benchmarks/refresh.py
compat: $(VENV)/.ready # which method goes with what, tried anew, into docs/compatibility.md
	mkdir -p build
	$(BIN)/fulgurite compat --json > build/compatibility.json
	mv build/compatibility.json benchmarks/results/compatibility.json
	$(BIN)/python benchmarks/refresh.py
	$(BIN)/python docs/_figures.py
clean:
	rm -rf build $(VENV)

$(VENV)/.ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	test -z '$(TORCH)' || $(BIN)/python -c 'import torch' 2>/dev/null || \
	    $(BIN)/python -m pip install --quiet '$(TORCH)' || echo 'pip has no $(TORCH): taking the default build'
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@
