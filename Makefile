# HAT: what a user and a developer do. `make` lists the targets.
# Needs Python 3.11 or later, git and make; everything else is installed into .venv and .cache of this folder.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

BIN := .venv/bin
STAMP := .venv/.hat-synced
# The last one has uv where the machine has none.
export PATH := $(CURDIR)/$(BIN):$(PATH):$(CURDIR)/.cache/uv-venv/bin
# Prompts for the long checks and benchmarks: HAT_DATA names a folder with the report files
# (benchmarks/fetch_data.py gets them); without it the tests that use them are skipped.

# Options of a target's command, for example: make demo ARGS='--link 10mbit,80ms'
ARGS ?=

.PHONY: help
help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-22s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

##@ use

.PHONY: demo
demo: $(STAMP)  ## answer a question with a real model split between two processes
	@$(BIN)/hat demo $(ARGS)

.PHONY: env
env: $(STAMP)  ## install everything into .venv

$(STAMP): pyproject.toml uv.lock
	@scripts/uv sync --frozen --all-extras --compile-bytecode
	@touch $@

##@ checks, as CI runs them

.PHONY: test
test: $(STAMP)  ## all checks and tests, the fast ones first
	@$(BIN)/python scripts/check.py $(ARGS)

.PHONY: lint
lint: $(STAMP)  ## format, lint, import contracts
	@$(BIN)/python scripts/check.py format lint imports

.PHONY: types
types: $(STAMP)  ## mypy, strict
	@$(BIN)/python scripts/check.py types

.PHONY: unit
unit: $(STAMP)  ## unit tests (seconds)
	@$(BIN)/python scripts/check.py unit

.PHONY: runtime
runtime: $(STAMP)  ## runtime tests: real servers, small models (minutes)
	@$(BIN)/python scripts/check.py runtime

.PHONY: operator
operator: $(STAMP)  ## operator tests on a real Kubernetes API server (the first run builds one from source: minutes)
	@$(BIN)/python scripts/check.py operator

.PHONY: e2e
e2e: $(STAMP)  ## the whole product on two clusters with real nodes (root, containerd, CNI plugins)
	@$(BIN)/python scripts/check.py e2e

.PHONY: scan
scan: $(STAMP)  ## checkov over the rendered chart and the examples' objects
	@$(BIN)/python scripts/check.py scan

##@ container images

# make images REGISTRY=registry.example.com/hat [VARIANT=cpu|cuda|l4t-RELEASE] [BASE_IMAGE=...] [IMAGES="operator edge"] [PUSH=1]
VARIANT ?= cpu
.PHONY: images
images: $(STAMP)  ## build the images with docker or buildah: REGISTRY=... VARIANT=cpu|cuda|l4t-RELEASE
	@$(BIN)/python scripts/images.py --registry "$(REGISTRY)" --variant "$(VARIANT)" $(addprefix --image ,$(IMAGES)) \
	  $(if $(BASE_IMAGE),--base-image "$(BASE_IMAGE)") $(if $(PUSH),--push) $(ARGS)

.PHONY: sbom
sbom: $(STAMP)  ## CycloneDX bills of materials of the distribution and of each image, into dist/sbom
	@$(BIN)/python -m scripts.sbom $(ARGS)

.PHONY: pin-images
pin-images: $(STAMP)  ## write the digests of the base images, where their registry answers
	@$(BIN)/python scripts/pin_images.py $(ARGS)

##@ development

.PHONY: cluster
cluster: $(STAMP)  ## a Kubernetes cluster for development until Ctrl-C (root); ARGS='--two --chart'
	@$(BIN)/python scripts/cluster.py $(ARGS)

.PHONY: fmt
fmt: $(STAMP)  ## rewrite the code in the project's style
	@$(BIN)/ruff check --fix --quiet . || true
	@$(BIN)/ruff format .

.PHONY: proto
proto: $(STAMP)  ## regenerate the code of the .proto files
	@hat_runtime/proto/generate.sh

.PHONY: crd
crd: $(STAMP)  ## write the chart's copy of the CRD
	@$(BIN)/python scripts/chart_crd.py

.PHONY: dashboards
dashboards: $(STAMP)  ## write the chart's Grafana dashboards
	@$(BIN)/python -m scripts.dashboards

.PHONY: screenshots
screenshots: $(STAMP)  ## take the pictures of the device's page for the README (needs Chromium)
	@$(BIN)/python -m scripts.screenshots $(ARGS)

.PHONY: clean
clean:  ## delete caches and build results (.venv and the model cache stay)
	@rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .grimp_cache dist
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

##@ the long forms of the checks (tens of minutes each; the numbers in docs/benchmarks come from these)

.PHONY: full-exactness
full-exactness: $(STAMP)  ## token ids equal to the whole model's, 40 Spec-Bench prompts
	@$(BIN)/python benchmarks/exactness.py $(ARGS)

.PHONY: full-drafting-exactness
full-drafting-exactness: $(STAMP)  ## the same with every drafter over slow links, 40 Spec-Bench and 20 HumanEval prompts
	@$(BIN)/python -m pytest tests/runtime/test_speculation.py -m long -k whole_grid
	@$(BIN)/python benchmarks/exactness.py --drafting $(ARGS)

.PHONY: full-split-overhead
full-split-overhead: $(STAMP)  ## tokens/s against local transformers, 1 and 8 sessions
	@$(BIN)/python benchmarks/split_overhead.py $(ARGS)

.PHONY: full-ttft
full-ttft: $(STAMP)  ## time to first token against the physical limit
	@$(BIN)/python benchmarks/ttft.py $(ARGS)

.PHONY: full-ablation
full-ablation: $(STAMP)  ## HAT's ablation and beyond over four links, beside the limits (device and cloud on a core each)
	@$(BIN)/python benchmarks/ablation.py $(ARGS)

.PHONY: full-acceptance
full-acceptance: $(STAMP)  ## tokens a round of every drafter on the report sets
	@$(BIN)/python benchmarks/acceptance.py $(ARGS)

.PHONY: full-capacity
full-capacity: $(STAMP)  ## what a core of the cloud serves, with and without speculation
	@$(BIN)/python benchmarks/capacity.py $(ARGS)

.PHONY: full-overload
full-overload: $(STAMP)  ## three times as many devices as the cloud has time for: speed, refusals, memory, shares
	@$(BIN)/python benchmarks/overload.py $(ARGS)

.PHONY: full-chunking
full-chunking: $(STAMP)  ## chunk sizes that follow link and load against every fixed one; what prompts cost others
	@$(BIN)/python benchmarks/chunking.py $(ARGS)

# make full-simulation ARGS=--check: 8 devices, simulated and with a real cloud (needs HAT_DATA)
.PHONY: full-simulation
full-simulation: $(STAMP)  ## the paper's 30 devices, then 1,000 and 10,000, in a simulator: TTFT, TBT, pods needed
	@$(BIN)/python benchmarks/fleet_simulation.py $(ARGS)

.PHONY: full-codec-quality
full-codec-quality: $(STAMP)  ## the uplink's codecs: bytes, time, distance from the exact model
	@$(BIN)/python benchmarks/codec_quality.py $(ARGS)

.PHONY: full-audit
full-audit: $(STAMP)  ## how much of a text attackers recover from hidden states: docs/benchmarks/inversion.md
	@$(BIN)/python benchmarks/inversion.py $(ARGS)

.PHONY: full-prefix-timing
full-prefix-timing: $(STAMP)  ## what one tenant's times tell of another's prompts, and of prompts that are shared on purpose
	@$(BIN)/python benchmarks/prefix_timing.py $(ARGS)

.PHONY: full-padding
full-padding: $(STAMP)  ## what sizes of messages tell of an answer, with and without --pad-frames, and its cost
	@$(BIN)/python benchmarks/padding.py $(ARGS)

.PHONY: full-picospec
full-picospec: $(STAMP)  ## token mode over slow links: no drafts, synchronous, PicoSpec; and its distribution
	@$(BIN)/python -m pytest tests/runtime/test_picospec_distribution.py -m long
	@$(BIN)/python benchmarks/picospec.py $(ARGS)

.PHONY: full-operator-cost
full-operator-cost: $(STAMP)  ## the operator's writes, times and memory with 30 to 1,000 fake devices
	@$(BIN)/python benchmarks/operator_cost.py $(ARGS)

.PHONY: full-operator-kill
full-operator-kill: $(STAMP)  ## the operator killed at 20 random points; a site away for a minute
	@$(BIN)/python -m pytest tests/operator -m long -s $(ARGS)

.PHONY: full-stress
full-stress: $(STAMP)  ## 32 sessions, a third of them cancelled; leaks
	@$(BIN)/python -m pytest tests -m long -k stress $(ARGS)

# HAT_FULL_GRID=1 make full-distribution: every drafter with every window, branches and sampler (most of a day)
.PHONY: full-distribution
full-distribution: $(STAMP)  ## sampled texts distributed as the target's, 100,000 answers with every drafter
	@$(BIN)/python -m pytest tests/runtime/test_rejection_distribution.py -m long -s $(ARGS)

.PHONY: full-speculation-faults
full-speculation-faults: $(STAMP)  ## stalls, cuts and slow spells of the link while drafts are under way, 60 at random moments
	@$(BIN)/python -m pytest tests/runtime -m long -k faults -s $(ARGS)

# The short form is tests/runtime/test_faults.py, which CI runs.
.PHONY: faults
faults: $(STAMP)  ## the fault suite: 20 answers under each fault of cloud, link and device; writes docs/benchmarks/faults.md
	@$(BIN)/python benchmarks/faults.py $(ARGS)

.PHONY: full-cluster-faults
full-cluster-faults: $(STAMP)  ## the same on real nodes (root): pods killed, deleted, drained, rolled; writes docs/benchmarks/cluster_faults.md
	@CI=true HAT_WRITE_REPORT=1 $(BIN)/python -m pytest tests/e2e/test_cluster_faults.py -m long -s $(ARGS)

.PHONY: full-session-model
full-session-model: $(STAMP)  ## sessions opened, lost, resumed, fenced, expired in 1,000 random orders, against a model
	@$(BIN)/python -m pytest tests/runtime/test_session_model.py -m long $(ARGS)

.PHONY: full-fuzz
full-fuzz: $(STAMP)  ## 100,000 mutated messages, HTTP requests and HatDeployments against live servers
	@CI=true $(BIN)/python -m pytest tests/runtime tests/operator -m long -k fuzz -s $(ARGS)

.PHONY: soak
soak: $(STAMP)  ## half an hour of mixed traffic with random faults, every answer checked; growth (ARGS='--minutes 5')
	@$(BIN)/python benchmarks/soak.py $(ARGS)

.PHONY: full-e2e
full-e2e: $(STAMP)  ## every field, changes under traffic and chart upgrades on real nodes (root)
	@CI=true $(BIN)/python -m pytest tests/e2e -m long $(ARGS)

.PHONY: full-images
full-images: $(STAMP)  ## build all images with torch inside, on a base made on the spot (root, buildah; 20 GB of disk)
	@CI=true $(BIN)/python -m pytest tests/images -m long -s $(ARGS)
