# The chapters are the source; `make sync` writes the rest from them.
# `make run` and `make test` need Python 3.11 or later with `venv`, no more.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
PORT ?= 8000

# `make run PROMPT='...'`. It travels through the environment, so that quotes
# and dollars in it reach the program, and neither make nor the shell.
PROMPT ?= In the beginning
override export PROMPT := $(value PROMPT)

# Compiled programs are kept: the next run of tests or notebooks takes less.
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.jax_cache
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0.1

.DEFAULT_GOAL := help
.PHONY: help run test test-all env parity-env sync check lint unit notebooks wheel-notebooks \
	test-newest book book-html train prefix bench growth clean

help:
	@echo 'make run [PROMPT=...]  stream text from the small model, on 8 devices'
	@echo 'make test              drift, lint, unit tests, every notebook'
	@echo 'make test-all          these, and the full products of families and meshes'
	@echo 'make parity-env        torch and transformers, for more tests'
	@echo 'make sync              write notebooks and package from the chapters'
	@echo 'make check             fail if they differ from the chapters'
	@echo 'make prefix N=08       the chapters up to 8 alone, in .prefix/08: import,'
	@echo '                       run the notebooks of 8, whose time it takes'
	@echo 'make book              build the book, serve it, open it'
	@echo 'make book-html         build the book, run what is new; a warning is an error'
	@echo 'make wheel-notebooks   every notebook, with only the wheel installed'
	@echo 'make test-newest PYTHON=...  tests and notebooks, with the newest of everything'
	@echo 'make train             train the small model again'
	@echo 'make bench             how fast it is, beside transformers and llama.cpp'
	@echo 'make growth            how cost grows with batch, context, experts, depth'
	@echo 'make lint | unit | notebooks | env | clean'

run: env
	@$(BIN)/annotated-moe generate --devices 8 --temperature 0.8 --top-p 0.95 --max-new-tokens 128 --prompt "$$PROMPT"

test: check lint unit notebooks

# `make test` leaves out the tests marked `full`.
SELECT := not full

test-all:
	@$(MAKE) test SELECT=

env: $(STAMP)

$(STAMP): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'Python 3.11 or later: make PYTHON=/path/to/python3' >&2; exit 1; }
	@echo 'Creating the environment in $(VENV) (once; some minutes) ...'
	@$(PYTHON) -m venv --clear $(VENV)
	@$(PIP) install -r requirements.txt
	@$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

# torch and transformers, for tests/test_parity.py; hundreds of megabytes.
parity-env: env
	$(PIP) install -c requirements.txt -r requirements-parity.txt

# As a file and not as a module: it then runs even when a chapter has just
# broken the package. `-P` keeps the package's folder off `sys.path`.
sync: env
	@$(BIN)/python -P annotated_moe/tangle.py

check: env
	@$(BIN)/python -P annotated_moe/tangle.py --check

# The chapters up to number N as a package of their own, in a folder where no
# other is found: every module imported, and the notebook of chapter N run.
PREFIX := .prefix

prefix: env
	@$(BIN)/python -P scripts/prefix.py "$(N)" "$(PREFIX)/$(N)"

lint: env
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy
	$(BIN)/pytest -q tests/test_book.py

# Tests compile thousands of programs and run most of them once: with few
# passes of the compiler that is a third less work, and with the older way of
# writing loops a third less again. Notebooks have the compiler as it is.
unit: env
	JAX_DISABLE_MOST_OPTIMIZATIONS=1 \
	XLA_FLAGS="$$XLA_FLAGS --xla_cpu_use_fusion_emitters=false" \
		$(BIN)/pytest -n 2 --dist worksteal --durations=20 -m '$(SELECT)' \
		--ignore=tests/test_book.py tests

# Every notebook, in an empty directory. Their outputs are kept: the book
# shows them, and runs again only a page whose notebook they are not from.
RAN := .ran
SOURCES := $(wildcard book/chapters/*.md annotated_moe/*.py)

notebooks: env
	rm -rf $(RAN) _build/.jupyter_cache && mkdir $(RAN)
	cp book/chapters/*.ipynb $(RAN)
	cd $(RAN) && $(CURDIR)/$(BIN)/pytest -n 2 --nbmake --nbmake-timeout=300 \
		--overwrite -c /dev/null .
	$(BIN)/python scripts/keep_outputs.py $(RAN) _build/.jupyter_cache
	@touch $(RAN)/.done

$(RAN)/.done: $(SOURCES)
	@$(MAKE) notebooks

# What a reader in Colab has: a fresh environment, an empty directory.
# Outside of `_build`, where nbmake looks for no notebook.
WHEEL := .wheel

wheel-notebooks: env
	rm -rf $(WHEEL) && mkdir -p $(WHEEL)/empty
	$(PIP) wheel --no-deps --no-build-isolation -w $(WHEEL) .
	$(PYTHON) -m venv $(WHEEL)/venv
	$(WHEEL)/venv/bin/pip install --quiet -c requirements.txt \
		$(WHEEL)/*.whl ipykernel matplotlib jupytext nbmake pytest-xdist \
		tokenizers tiktoken jinja2 pyflakes starlette uvicorn llguidance
	cp book/chapters/*.ipynb $(WHEEL)/empty
	cd $(WHEEL)/empty && \
		../venv/bin/pytest -n 2 --nbmake --nbmake-timeout=300 -c /dev/null .
	rm -rf $(WHEEL)

# What `pip install` gives today: no lock, the newest release of every dependency.
# Another Python than that of $(VENV): make test-newest PYTHON=python3.13
# Nothing compiled is kept: JAX 0.12 was seen to abort while it wrote a program.
NEWEST := .newest

test-newest: export JAX_COMPILATION_CACHE_DIR :=
test-newest:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'Python 3.11 or later: make PYTHON=/path/to/python3' >&2; exit 1; }
	rm -rf $(NEWEST) && mkdir -p $(NEWEST)/empty
	$(PYTHON) -m venv $(NEWEST)/venv
	$(NEWEST)/venv/bin/python -m pip install --quiet --disable-pip-version-check \
		--upgrade '.[book,test,tokenizers,images,train,serve]'
	$(NEWEST)/venv/bin/python -c "import jax, sys; print('JAX', jax.__version__, 'on Python', sys.version)"
	JAX_DISABLE_MOST_OPTIMIZATIONS=1 \
		$(NEWEST)/venv/bin/pytest -n 2 --dist worksteal tests
	cp book/chapters/*.ipynb $(NEWEST)/empty
	cd $(NEWEST)/empty && \
		../venv/bin/pytest -n 2 --nbmake --nbmake-timeout=300 -c /dev/null .

book-html: env $(RAN)/.done
	rm -rf _build/html _build/.doctrees _build/jupyter_execute
	$(BIN)/jupyter-book build --warningiserror --nitpick --keep-going .

book: book-html
	@echo 'The book is at http://localhost:$(PORT)/ (Ctrl-C stops it)'
	@(sleep 1; $(BIN)/python -m webbrowser -t http://localhost:$(PORT)/) \
		>/dev/null 2>&1 &
	@$(BIN)/python -m http.server --bind 127.0.0.1 --directory _build/html $(PORT)

# Texts and the run, in a folder that holds 7 GB at its end; needs Debian's
# wordnet-base, or WORDNET=folder of its files.
SMALL ?= .small
WORDNET ?= /usr/share/wordnet

train: env
	$(BIN)/python scripts/small_texts.py $(SMALL) --wordnet $(WORDNET)
	$(BIN)/python scripts/train_small.py $(SMALL)

# What it compares with, in an environment of its own. ARGS='--no-store' keeps nothing;
# run it on a machine that does nothing else.
BENCH := .bench
ARGS ?=

$(BENCH)/.installed: requirements.txt requirements-parity.txt requirements-bench.txt
	$(PYTHON) -m venv --clear $(BENCH)
	$(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check \
		-c requirements.txt -r requirements-bench.txt -e .
	@touch $@

bench: $(BENCH)/.installed
	@$(BENCH)/bin/python benchmarks/table.py $(ARGS)

growth: env
	@$(BIN)/python benchmarks/growth.py $(ARGS)

clean:
	rm -rf $(VENV) $(WHEEL) $(NEWEST) $(RAN) $(PREFIX) $(BENCH) _build dist build *.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .jax_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
