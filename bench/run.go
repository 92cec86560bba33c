package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"syscall"
	"time"

	"github.com/cowdev/cowdev/bench/peer"
)

// runFlags are those of "bench run".
type runFlags struct {
	cowdev, dir, out, docs string
	rounds                 int
	seconds, quiet         float64
	patient                time.Duration
	quick                  bool
	rows, servers          string
}

func parseRun(args []string) (runFlags, error) {
	var f runFlags
	set := flag.NewFlagSet("run", flag.ContinueOnError)
	set.StringVar(&f.cowdev, "cowdev", "cowdev", "program that is measured")
	set.StringVar(&f.dir, "dir", os.TempDir(), "where images are made, on the filesystem that is measured; needs 20 GiB")
	set.StringVar(&f.out, "out", "out", "directory for results.json")
	set.StringVar(&f.docs, "docs", "", "directory for benchmarks.md; none where empty")
	set.IntVar(&f.rounds, "rounds", 5, "rounds")
	set.Float64Var(&f.seconds, "seconds", 1, "seconds of each row")
	set.Float64Var(&f.quiet, "quiet", 0.1, "part of the processors that others may use")
	set.DurationVar(&f.patient, "patience", 3*time.Second, "how long a row waits for others to be quiet")
	set.BoolVar(&f.quick, "quick", false, "fewer rows, servers and rounds")
	set.StringVar(&f.rows, "rows", "", "only rows whose name matches this expression")
	set.StringVar(&f.servers, "servers", "", "only servers whose name matches this expression")
	err := set.Parse(args)
	if f.quick {
		f.rounds, f.seconds = min(f.rounds, 2), min(f.seconds, 0.4)
	}
	return f, err
}

// quickServers are the best of each family, found by the full run.
const quickServers = "^(cowdev|qemu-ext-uring|qemu-none-native|nbdkit-4k|limit)$"

func runMatrix(args []string) error {
	f, err := parseRun(args)
	if err != nil {
		return err
	}
	b, all, err := f.newBench()
	if err != nil {
		return err
	}
	defer os.RemoveAll(b.dir)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	b.ctx = ctx

	res := Results{Began: time.Now().UTC().Truncate(time.Second), Machine: describeMachine(b.dir), Versions: versions(f.cowdev), Seconds: f.seconds}
	res.Commands = commands(b.kinds)
	b.logf("making a base of %d MiB", baseSize/mib)
	if b.base, err = makeBase(b.dir, baseSize); err != nil {
		return err
	}
	for i := range b.kinds {
		if err := b.verify(&b.kinds[i]); err != nil {
			return fmt.Errorf("%s: %w", b.kinds[i].Name, err)
		}
	}
	b.logf("every server returns the right bytes")
	raisePriority()
	for n := range f.rounds {
		b.logf("round %d of %d", n+1, f.rounds)
		s, err := b.round(n, all)
		if err != nil {
			return err
		}
		res.Samples = append(res.Samples, s...)
		if err := res.save(f.out); err != nil {
			return err
		}
	}
	if f.quick || f.rows != "" && f.rows != trialsOnly {
		return f.report(&res)
	}
	for n := range min(f.rounds, trialRounds) {
		b.logf("trials, round %d", n+1)
		extras, err := b.trials(n)
		if err != nil {
			return err
		}
		res.Extras = append(res.Extras, extras...)
		if err := res.save(f.out); err != nil {
			return err
		}
	}
	return f.report(&res)
}

// trialsOnly is what -rows says for no rows, but the trials.
const trialsOnly = "trials"

// newBench chooses servers and rows, and makes the directory of the run.
func (f *runFlags) newBench() (*bench, []Row, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, nil, err
	}
	cowdev, err := exec.LookPath(f.cowdev)
	if err != nil {
		return nil, nil, err
	}
	if cowdev, err = filepath.Abs(cowdev); err != nil {
		return nil, nil, err
	}
	b := &bench{self: self, seconds: f.seconds, quiet: f.quiet, patient: f.patient}
	b.logf = func(format string, args ...any) {
		fmt.Fprintf(os.Stderr, "%s bench: %s\n", time.Now().Format(time.TimeOnly), fmt.Sprintf(format, args...))
	}
	servers := f.servers
	if f.quick && servers == "" {
		servers = quickServers
	}
	wanted, err := regexp.Compile(servers)
	if err != nil {
		return nil, nil, err
	}
	for _, k := range peer.Kinds(peer.Tools{Cowdev: cowdev, Self: self}) {
		if wanted.MatchString(k.Name) {
			b.kinds = append(b.kinds, k)
		}
	}
	if wanted, err = regexp.Compile(f.rows); err != nil {
		return nil, nil, err
	}
	var chosen []Row
	for _, r := range rows() {
		if wanted.MatchString(r.ID) && !(f.quick && r.Long) {
			chosen = append(chosen, r)
		}
	}
	b.dir, err = os.MkdirTemp(f.dir, "cowdev-bench-")
	return b, chosen, err
}

// report prints the ratios, and writes the document if one is wanted.
func (f *runFlags) report(res *Results) error {
	if err := res.printRatios(os.Stdout); err != nil || f.docs == "" {
		return err
	}
	return res.writeDocs(f.docs)
}

// writeReport makes the document again from what a run saved.
func writeReport(results, docs string) error {
	b, err := os.ReadFile(results)
	if err != nil {
		return err
	}
	var res Results
	if err := json.Unmarshal(b, &res); err != nil {
		return err
	}
	return res.writeDocs(docs)
}

// newFiller returns a source of bytes that cannot be compressed, the same in
// every run.
func newFiller() *rand.ChaCha8 { return rand.NewChaCha8([32]byte{'b', 'e', 'n', 'c', 'h'}) }

// save writes the results as JSON.
func (r *Results) save(dir string) error { return saveJSON(filepath.Join(dir, "results.json"), r) }

func saveJSON(path string, v any) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	b, err := json.MarshalIndent(v, "", "\t")
	if err != nil {
		return err
	}
	return os.WriteFile(path, b, 0o644)
}
