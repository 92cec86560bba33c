# cowdev: see README.md. Every target works from a clean clone with Go and make.

GO ?= go

# The program is one static file; only the race detector needs C.
export CGO_ENABLED = 0

# The longest come first, so that the others run beside them.
TEST = ./test/vm ./test/crash ./...

# Packages whose concurrency is also run under the race detector, in short.
RACE = ./internal/disk ./internal/keeper ./image ./exception ./cow ./nbdserver ./merge

.PHONY: all build demo test packages vet unit race bench bench-quick bench-vm crash soak fuzz clean

all: build

build:
	$(GO) build -o bin/cowdev ./cmd/cowdev

# The main job end to end, told step by step; needs neither root nor packages.
demo: build
	@scripts/demo bin/cowdev

# Everything that a change must pass. Phases are told with the time, so that a
# slow machine shows where it was slow.
test:
	@scripts/phase packages scripts/install-test-packages
	@scripts/phase modules scripts/download-modules
	@scripts/phase build $(GO) build ./...
	@scripts/phase vet $(GO) vet ./...
	@scripts/phase demo $(MAKE) -s demo
	@scripts/phase test scripts/with-tmpdir $(GO) test -p 2 -timeout 8m $(TEST)
	@scripts/phase walks scripts/with-tmpdir scripts/walks 2000000 150
	@CGO_ENABLED=1 scripts/phase race scripts/with-tmpdir $(GO) test -race -short -p 2 -timeout 8m $(RACE)
	@CGO_ENABLED=1 scripts/phase stress scripts/with-tmpdir $(GO) test -race -short -timeout 8m -run TestStress ./internal/crash
	@scripts/phase end

packages:
	@scripts/install-test-packages

vet:
	$(GO) vet ./...
	@test -z "$$(gofmt -l .)" || { gofmt -l .; exit 1; }

unit:
	scripts/with-tmpdir $(GO) test -timeout 8m $(TEST)

race:
	CGO_ENABLED=1 scripts/with-tmpdir $(GO) test -race -short -timeout 8m $(RACE)

# Campaigns: the same tests with far more of everything. COWDEV_LONG is the
# switch; docs/testing.md says what each does and how long it takes.
WALKS ?= 100000000
crash:
	scripts/with-tmpdir scripts/walks $(WALKS) 14400
	COWDEV_LONG=1 scripts/with-tmpdir $(GO) test -count=1 -timeout 12h -skip '^TestWalks$$' ./internal/crash
	COWDEV_LONG=1 scripts/with-tmpdir $(GO) test -count=1 -timeout 12h ./test/crash

soak:
	COWDEV_LONG=1 scripts/with-tmpdir $(GO) test -count=1 -timeout 12h ./attach/... ./test/...

FUZZTIME ?= 60s
fuzz:
	scripts/fuzz $(FUZZTIME)

bench:
	scripts/bench full

bench-quick:
	scripts/bench quick

# Beside dm-snapshot, in a guest whose kernel has it.
bench-vm:
	scripts/bench vm

clean:
	rm -rf bin
