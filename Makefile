# Every target sets up what it needs in .venv; a second run finds the stamps and starts at once.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
# Installed first and by itself, so that no other package chooses the torch build.
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?= -n 2 --dist loadfile
BENCH_ARGS ?=
STORM_ARGS ?=
ALIKE_ARGS ?=
MANY_ARGS ?=
# Where `make reliability` keeps a registry of 10,000 adapters; filling it takes minutes.
GATEWAY_HOME ?= .gateway
# What `loramux fetch smollm2-135m` makes.
BASE ?= $(HOME)/.cache/loramux/models/smollm2-135m-bf16

# One thread per process: two pytest workers with a thread pool each fight for the same cores.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo tenants serve-demo many fuzz reliability crash kills test lint format bench storm alike reference clean

demo: $(VENV)/.stamp-demo
	env -u OMP_NUM_THREADS OMP_WAIT_POLICY=PASSIVE $(BIN)/loramux demo

tenants: $(VENV)/.stamp-demo
	env -u OMP_NUM_THREADS OMP_WAIT_POLICY=PASSIVE $(BIN)/loramux tenants

serve-demo: $(VENV)/.stamp-serve
	env -u OMP_NUM_THREADS OMP_WAIT_POLICY=PASSIVE $(BIN)/loramux serve-demo

many: $(VENV)/.stamp-demo
	env -u OMP_NUM_THREADS OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m loramux.demo.many --out runs/eight $(MANY_ARGS)

test: lint
	$(BIN)/python -m pytest -q $(PYTEST_ARGS)

lint: $(VENV)/.stamp-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.stamp-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.stamp-dev
	for what in decode prefill mixed load residency serve train; do $(BIN)/loramux bench $$what $(BENCH_ARGS) || exit 1; done

fuzz: $(VENV)/.stamp-dev
	PYTHONPATH=tests $(BIN)/python -m fuzz.uploads --archives 2000 --mutations 50000 --names 20000
	PYTHONPATH=tests $(BIN)/python -m fuzz.configs --count 20000
	LORAMUX_RETRIEVAL_CALLS=100000 $(BIN)/python -m pytest -q tests/retrieval/test_retriever.py -k outside
	LORAMUX_FUZZ_EXAMPLES=500 LORAMUX_AUTO_CALLS=100000 $(BIN)/python -m pytest -q -n 2 --dist load \
		tests/server/test_openapi.py tests/server/test_auto_rights.py tests/server/test_lm_eval.py

reliability: $(VENV)/.stamp-dev
	$(BIN)/python -m loramux.bench.gateway --home $(GATEWAY_HOME)
	for what in streams flips flood "flood --races 20" overload revoke kill; do \
		$(BIN)/python -m loramux.bench.gateway_$$what || failed=1; done; exit $${failed:-0}

crash: $(VENV)/.stamp-dev
	$(BIN)/python -m loramux.registry.crash --kills 1000

kills: $(VENV)/.stamp-dev
	LORAMUX_KILL_POINTS=20 $(BIN)/python -m pytest -q tests/joint/test_resume.py

reference: $(VENV)/.stamp-dev
	$(BIN)/python -m loramux.cli.reference docs/reference

alike: $(VENV)/.stamp-dev
	$(BIN)/python -m loramux.bench.alike $(BASE) $(ALIKE_ARGS)

storm: $(VENV)/.stamp-dev
	$(BIN)/python -m loramux.bench.storm $(STORM_ARGS)

$(VENV)/.stamp-torch:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	touch $@

# The pin is repeated: a dependency must not move torch to another build.
$(VENV)/.stamp-demo: pyproject.toml $(VENV)/.stamp-torch
	$(BIN)/python -m pip install --quiet "$(TORCH)" -e ".[demo]"
	touch $@

$(VENV)/.stamp-serve: pyproject.toml $(VENV)/.stamp-torch
	$(BIN)/python -m pip install --quiet "$(TORCH)" -e ".[demo,serve,retrieval]" "openai>=1.40" "httpx>=0.27"
	touch $@

$(VENV)/.stamp-dev: pyproject.toml $(VENV)/.stamp-torch
	$(BIN)/python -m pip install --quiet "$(TORCH)" -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
