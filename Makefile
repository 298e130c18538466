# Each target makes .venv and installs what it needs, once; it is made anew when the list of packages changes.
PYTHON ?= python3
PIP := .venv/bin/python -m pip install --disable-pip-version-check -q -c constraints.txt

.PHONY: demo test test-slow test-gpu test-versions lint release
demo: .venv/installed
	.venv/bin/dit-hf demo --output_dir runs/demo
	@echo 'dit-hf is in .venv: . .venv/bin/activate'

# Two processes of one thread each: tiny models gain nothing from more threads. Each begins with half of the files, whose
# set-up is then needed once, and the one that is through takes tests of the other.
test: .venv/installed
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist worksteal -m "not slow"

# The tests of one file one after the other, since they share what they set up.
test-slow: .venv/installed
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist loadfile -m slow

test-gpu: .venv/installed
	.venv/bin/python -m pytest -m gpu

# With the lowest versions of our libraries, with the newest, and what other versions read of what we write.
VERSIONS ?= lowest newest readers
test-versions: .venv/installed
	.venv/bin/python scripts/test_versions.py $(VERSIONS)

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports --no-logo

# `make release RUN=runs/mine REPO=OWNER/NAME`; without RUN a model of avatars is trained first.
release: .venv/installed
	.venv/bin/python scripts/release.py $(if $(RUN),--run $(RUN)) $(if $(REPO),--repo_id $(REPO))

# torch first and alone: its version then stands before anything else asks for one.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) -e ".[dev]"
	touch $@
