# SPDX-License-Identifier: Apache-2.0
#
# A front to CMake; a fresh Debian or Ubuntu machine needs make and a shell, no more.
#   make          build the libraries, and build/layershard, layershard-llama, layershard-bench
#   make demo     install what is missing, build, fetch the model, show it at work
#   make check    install what is missing, build, run the tests (of Python: 5.7 GB in ~/.cache); FOLDER=core: those
#                 of tests/core
#   make install  with PREFIX and DESTDIR as usual
#   make lint     look through the sources: format, Python, shell scripts; make format fixes what it can
# The longer checks: check-long, after check; with clang in build directories of their own check-clang, check-asan and
# check-tsan; check-valgrind; check-faults: a rank is killed, stopped, kept short in each call; check-soak: ranks are
# killed and come back for an hour; and check-mutants: small faults put into the sources, each of which one test must
# find.
# After check, as root on a machine where nobody else needs large pages: check-pages.
# On a machine with an NVIDIA GPU: check-gpu.

BUILD ?= build
PREFIX ?= /usr/local
JOBS ?= $(shell nproc)
CMAKE_FLAGS ?=
# Passed to ctest: make check TEST_FLAGS="-R ring"
TEST_FLAGS ?=
# Of which folder of tests/, and those in it: make check FOLDER=transport/shm
FOLDER ?=
IN_FOLDER = $(if $(FOLDER),-L '^in:$(patsubst tests/%,%,$(FOLDER:/=))(/|$$)')
# Which of tests/mutants: make check-mutants MUTANTS="registry-users trace-each-wait". All if none is named.
MUTANTS ?=
# Which supplies of large pages: make check-pages PAGES="none short" (scripts/check_pages.sh). All if none is named.
PAGES ?=

MAKEFLAGS += --no-print-directory
CONFIGURE = cmake -DLAYERSHARD_WERROR=ON -DCMAKE_EXPORT_COMPILE_COMMANDS=ON -DCMAKE_INSTALL_PREFIX=$(PREFIX) $(CMAKE_FLAGS)
COMPILE = cmake --build $(1) -j $(JOBS)

.PHONY: all
all:
	$(CONFIGURE) -S . -B $(BUILD)
	$(call COMPILE,$(BUILD))

.PHONY: deps check-deps ci-deps
deps:
	scripts/install_packages.sh
check-deps:
	scripts/install_packages.sh --check
ci-deps:
	scripts/install_packages.sh --check --ci

.PHONY: demo
demo: deps
	$(MAKE) all
	scripts/fetch_model.sh >/dev/null
	scripts/demo.sh $(BUILD)

.PHONY: check
check: check-deps
	scripts/python_env.sh $(BUILD)/venv --torch >/dev/null
	$(CONFIGURE) -DLAYERSHARD_BUILD_TESTS=ON -S . -B $(BUILD)
	$(call COMPILE,$(BUILD))
	LAYERSHARD_TEST_MODEL=$$(scripts/fetch_model.sh) && export LAYERSHARD_TEST_MODEL && \
		tests/run_tests.sh $(BUILD) -LE 'gpu|long' $(IN_FOLDER) $(TEST_FLAGS)

# After make check, with its build: what takes minutes, most of it with PyTorch.
.PHONY: check-long
check-long:
	tests/run_tests.sh $(BUILD) -L plain -L long $(TEST_FLAGS)

# Tests labelled "plain" look at the ordinary build's files and are left out of the others.
.PHONY: check-clang check-asan check-tsan check-valgrind
check-clang: ci-deps
	CC=clang CXX=clang++ $(CONFIGURE) -DLAYERSHARD_BUILD_TESTS=ON -S . -B build-clang
	$(call COMPILE,build-clang)
check-asan: ci-deps
	CC=clang CXX=clang++ $(CONFIGURE) -DLAYERSHARD_BUILD_TESTS=ON "-DLAYERSHARD_SANITIZE=address;undefined" \
		-DLAYERSHARD_FUZZ=ON -S . -B build-asan
	$(call COMPILE,build-asan)
	tests/run_tests.sh build-asan -LE 'plain|model|gpu' $(TEST_FLAGS)
check-tsan: ci-deps
	CC=clang CXX=clang++ $(CONFIGURE) -DLAYERSHARD_BUILD_TESTS=ON -DLAYERSHARD_SANITIZE=thread -S . -B build-tsan
	$(call COMPILE,build-tsan)
	tests/run_tests.sh build-tsan -L threads $(TEST_FLAGS)
check-valgrind: ci-deps
	$(CONFIGURE) -DLAYERSHARD_BUILD_TESTS=ON -S . -B $(BUILD)
	$(call COMPILE,$(BUILD))
	tests/run_valgrind.sh $(BUILD)

# The tests of make check, with its build, where large pages are required, where there are none, where they run out.
.PHONY: check-pages
check-pages:
	LAYERSHARD_TEST_MODEL=$$(scripts/fetch_model.sh) && export LAYERSHARD_TEST_MODEL && \
		scripts/check_pages.sh $(BUILD) $(PAGES) -- $(IN_FOLDER) $(TEST_FLAGS)

# After make check, with its build: docs/reliability.md. FAULTS: arguments of build/tests/fault_matrix (--help).
FAULTS ?=
.PHONY: check-faults
check-faults:
	$(BUILD)/tests/fault_matrix $(FAULTS) >$(BUILD)/fault_matrix.log 2>&1; status=$$?; \
		cat $(BUILD)/fault_matrix.log; printf 'log: %s\n' $(BUILD)/fault_matrix.log; exit $$status

# Ranks that are killed and come back for as many seconds. After make check, with its build.
SOAK ?= 3600
.PHONY: check-soak
check-soak:
	$(BUILD)/tests/rejoin_soak $(SOAK) >$(BUILD)/rejoin_soak.log 2>&1; status=$$?; \
		cat $(BUILD)/rejoin_soak.log; printf 'log: %s\n' $(BUILD)/rejoin_soak.log; exit $$status

.PHONY: check-mutants
check-mutants: check-deps
	scripts/mutants.sh --jobs $(JOBS) $(MUTANTS)

# A skipped test is a failed one here; shows what the device was and what it took. Where there is no network,
# scripts/gpu_packages.sh has what is missing. python3, or LAYERSHARD_PYTHON, should have torch and pytest.
.PHONY: check-gpu gpu-deps
gpu-deps:
	scripts/install_packages.sh --gpu
check-gpu: gpu-deps
	$(CONFIGURE) -DLAYERSHARD_BUILD_TESTS=ON -S . -B $(BUILD)
	$(call COMPILE,$(BUILD))
	LAYERSHARD_TEST_STRICT=1 tests/run_tests.sh $(BUILD) -L gpu --verbose $(TEST_FLAGS)

.PHONY: format lint
format:
	scripts/lint.sh --fix $$(scripts/python_env.sh $(BUILD)/lint --lint)
lint:
	scripts/lint.sh $$(scripts/python_env.sh $(BUILD)/lint --lint)

.PHONY: install
install: all
	cmake --install $(BUILD)

.PHONY: clean
clean:
	rm -rf $(BUILD) build-clang build-asan build-tsan build-mutants
