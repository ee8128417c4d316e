# Every target is a line or two that a person could type. `make run` and `make test` set everything up themselves.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed
GUIDE  := build/guide
# The longest files first, so that two workers end together.
FIRST  := tests/end_to_end/test_resume.py tests/end_to_end/test_ultrafeedback.py tests/notebooks/test_quickstart.py
CELLS  := OMP_NUM_THREADS=1 DPO_TUTORIAL_PROFILE=smoke DPO_TUTORIAL_HEADLESS=1 $(PY) -m pytest --nbval-lax -p no:cacheprovider --durations=6
UNIT   := tests -m 'not (end_to_end or slow or gpu or guide or colab)' -n auto --dist loadfile

# A typed value as one word of the shell, whatever is in it; neither make nor the shell may read it as a command.
quoted = '$(subst ','\'',$(value $(1)))'

# What reaches the notebooks: make run PROFILE=cpu BETA=0.3. Every variable that is typed, but make's own and never the
# shell's; the command knows which names there are.
TYPED := $(sort $(foreach name,$(.VARIABLES),$(if $(filter command,$(origin $(name))),$(name))))
TYPED := $(filter-out PYTHON VENV PY STAMP GUIDE FIRST CELLS UNIT REPO SHELL MAKEFLAGS,$(TYPED))
PARAMETERS := $(foreach name,$(TYPED),-p '$(name)' $(call quoted,$(name)))
unexport $(TYPED) REPO

# The quickstart has knobs of its own, and lies beside its results.
KNOBS  := PROFILE MODEL DATA PAIRS ARTIFACTS
UNKNOWN := $(filter-out $(KNOBS),$(TYPED))
FOLDER := $(if $(and $(filter command,$(origin ARTIFACTS)),$(value ARTIFACTS)),$(call quoted,ARTIFACTS),artifacts)

.DEFAULT_GOAL := help
.PHONY: help quickstart run test lessons results colab lowest extras notebooks check lint pins badges shape bench gpu guide slides clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-10s %s\n", $$1, $$2}'

# The Python of the environment, where PYTHON is given and asks for another: then the environment is made anew.
series = $(shell $(1) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
ifneq ($(origin PYTHON),file)
OTHER := $(filter-out $(call series,$(PYTHON)),$(call series,$(PY)))
endif
.PHONY: $(if $(OTHER),$(STAMP))

# Most of what is installed is never imported: --no-compile leaves each module to its first import, which must then be
# allowed to keep what it compiled. Images of containers often forbid it; each kernel would compile torch anew.
export PYTHONDONTWRITEBYTECODE :=
$(STAMP): requirements.txt pyproject.toml
	$(if $(OTHER),@echo "$(VENV) is of Python $(OTHER): it is made anew with $(PYTHON)")
	$(if $(OTHER),,test -x $(PY) || )$(PYTHON) -m venv --clear $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-compile -r requirements.txt
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

run: $(STAMP)  ## all six notebooks, headless; NAME=value sets a parameter of docs/parameters.md
	$(PY) -m dpo_tutorial run $(PARAMETERS)

quickstart: $(STAMP)  ## one page, minutes: PROFILE=smoke MODEL= DATA= PAIRS= ARTIFACTS=
	$(if $(UNKNOWN),$(error quickstart does not know $(UNKNOWN). It knows $(KNOBS)))
	$(if $(and $(filter command,$(origin PROFILE)),$(filter-out smoke,$(value PROFILE))),$(error quickstart knows one PROFILE, smoke))
	mkdir -p $(FOLDER)
	$(PY) -m papermill notebooks/00_quickstart.ipynb $(FOLDER)/00_quickstart.ipynb $(foreach name,$(KNOBS),$(if $(and $(filter command,$(origin $(name))),$(value $(name))),$(if $(filter PAIRS,$(name)),-p,-r) $(name) $(call quoted,$(name))))

check: $(STAMP) lint  ## the quick loop: style, types, unit tests; two minutes
	$(PY) -m mypy
	OMP_NUM_THREADS=1 $(PY) -m pytest $(UNIT)

test: check  ## all of check, then the end-to-end tests and all six notebooks in the smoke profile
	OMP_NUM_THREADS=1 $(PY) -m pytest $(FIRST) tests -m 'end_to_end and not slow' -n auto --dist loadfile --no-loadscope-reorder --durations=15
	rm -rf artifacts/smoke
	mkdir -p artifacts/smoke
	$(MAKE) --jobs=2 lessons results

# Side by side, each on a core and in a folder of its own: 06 reads what 05 has saved, no other needs one before it.
lessons: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) -m papermill notebooks/00_quickstart.ipynb artifacts/smoke/00_quickstart.ipynb -p PROFILE smoke -p ARTIFACTS artifacts/smoke
	DPO_TUTORIAL_ARTIFACTS=artifacts/smoke/lessons $(CELLS) notebooks/0[1-4]_*.ipynb

results: $(STAMP)
	$(CELLS) notebooks/0[56]_*.ipynb

colab: $(STAMP)  ## a stand-in for Colab: its versions, the first cell, every notebook alone
	$(PY) -m pytest -m colab tests/end_to_end/test_colab_standin.py

lint: $(STAMP)  ## ruff, for .py and .ipynb
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

lowest:  ## unit tests with the lowest versions that pyproject.toml admits, in an environment of its own
	$(PYTHON) -m venv --clear $(VENV)-lowest
	$(PYTHON) scripts/lowest.py > $(VENV)-lowest/requirements.txt
	$(VENV)-lowest/bin/python -m pip install --quiet --disable-pip-version-check -r $(VENV)-lowest/requirements.txt --editable .[dev]
	OMP_NUM_THREADS=1 $(VENV)-lowest/bin/python -m pytest $(UNIT)

extras:  ## unit tests of what the extras bring, in an environment of its own: GGUF, a server, the page, trackers
	$(PYTHON) -m venv --clear $(VENV)-extras
	$(VENV)-extras/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(VENV)-extras/bin/python -m pip install --quiet --disable-pip-version-check --editable .[demo,export,serve,tensorboard,trackio] playwright
	OMP_NUM_THREADS=1 $(VENV)-extras/bin/python -m pytest -rs tests/unit/test_using.py tests/unit/test_served.py tests/unit/test_demo.py tests/unit/test_tracking.py

notebooks: $(STAMP)  ## run the cpu profile and the quickstart, and write their outputs into notebooks/
	$(PY) scripts/refresh_notebooks.py

# torch brings the CUDA packages that fit it; on a machine without a GPU they would be gigabytes for nothing.
pins:  ## write requirements.txt from pyproject.toml with uv; no version moves that still fits
	printf 'torch\nnumpy\n' | uv pip compile --quiet --universal --python-version 3.11 --extra dev --no-annotate --no-header pyproject.toml - --output-file requirements.txt
	{ echo '# What this repository was tested with (Python 3.11 to 3.13): everything, made by `make pins`. Ranges are in pyproject.toml.'; \
	  echo '# On Colab do not install this file: the notebooks keep the torch and numpy that are there.'; \
	  grep -vE '^(cuda|nvidia|triton)' requirements.txt; } > requirements.new && mv requirements.new requirements.txt

badges: $(STAMP)  ## stamp the Colab and Kaggle badges: REPO=owner/name
	$(PY) scripts/badges.py $(if $(value REPO),$(call quoted,REPO))

shape: $(STAMP)  ## lines, modules, notebooks and the library calls in them; fails nothing
	$(PY) scripts/shape.py

bench: $(STAMP)  ## training speed beside stock TRL, and how it grows, more than an hour on two cores
	$(PY) benchmarks/training_speed.py
	$(PY) benchmarks/growth.py

gpu: $(STAMP)  ## what a GPU does: tests, speed, notebooks, UltraFeedback (ULTRAFEEDBACK_SAMPLE in the environment)
	$(PY) benchmarks/gpu.py A B C D page --workers 4 --seconds 480

# The guide needs no torch, so it has an environment of its own. Its sources lie as in the repository, for the links
# between them; only the start page moves to the root.
$(VENV)-guide/.installed: docs/requirements.txt
	test -x $(VENV)-guide/bin/python || $(PYTHON) -m venv $(VENV)-guide
	$(VENV)-guide/bin/python -m pip install --quiet --disable-pip-version-check -r docs/requirements.txt
	touch $@

guide: $(VENV)-guide/.installed  ## the notebooks as a site in build/guide/html, looked at in a browser
	rm -rf $(GUIDE) && mkdir -p $(GUIDE)/source
	cp -r README.md docs/index.md docs notebooks benchmarks $(GUIDE)/source
	$(VENV)-guide/bin/python -m sphinx --quiet --fail-on-warning --keep-going -c docs -d $(GUIDE)/doctrees $(GUIDE)/source $(GUIDE)/html
	$(VENV)-guide/bin/python -m pytest --noconftest -m guide tests/guide/test_guide.py

slides: $(STAMP)  ## the stored notebooks as slides for a course, in build/slides (docs/teaching.md)
	$(PY) scripts/slides.py

clean:  ## remove results, the guide and the environments (not the model cache)
	rm -rf artifacts build $(VENV) $(VENV)-extras $(VENV)-guide $(VENV)-lowest
