package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/cowdev/cowdev/bench/guest"
	"github.com/cowdev/cowdev/test/vm"
)

// storeSize is the size of the disk for what changes: room for all loads in
// chunks of 64 KiB, several times over.
const storeSize = gib

// vmFlags are those of "bench vm".
type vmFlags struct {
	cowdev, dir, out, docs string
	rounds                 int
	limit                  time.Duration
	report                 bool
}

// runVM compares cowdev with dm-snapshot in a guest, or reports on what an
// earlier run saved.
func runVM(args []string) error {
	var f vmFlags
	set := flag.NewFlagSet("vm", flag.ContinueOnError)
	set.StringVar(&f.cowdev, "cowdev", "cowdev", "program that is measured")
	set.StringVar(&f.dir, "dir", os.TempDir(), "where the guest's disks are made; needs 3 GiB")
	set.StringVar(&f.out, "out", "out", "directory for vm.json")
	set.StringVar(&f.docs, "docs", "", "directory of benchmarks.md; none where empty")
	set.IntVar(&f.rounds, "rounds", 3, "rounds")
	set.DurationVar(&f.limit, "limit", time.Hour, "time after which the guest is ended")
	set.BoolVar(&f.report, "report", false, "run nothing: report on the vm.json that is there")
	if err := set.Parse(args); err != nil {
		return err
	}
	saved := filepath.Join(f.out, "vm.json")
	var res VMResults
	if f.report {
		b, err := os.ReadFile(saved)
		if err != nil {
			return err
		}
		if err := json.Unmarshal(b, &res); err != nil {
			return err
		}
	} else {
		if err := res.measure(&f); err != nil {
			return err
		}
		if err := saveJSON(saved, &res); err != nil {
			return err
		}
	}
	res.write(os.Stdout)
	if f.docs == "" {
		return nil
	}
	var w strings.Builder
	res.write(&w)
	return replaceMarked(filepath.Join(f.docs, "benchmarks.md"), beginVMMark, endVMMark, w.String())
}

// VMResults are all that a run in a guest measured.
type VMResults struct {
	Began   time.Time
	Machine []string
	Kernel  string // of the guest
	Samples []guest.Sample
}

// measure boots a guest and takes the samples that its script prints.
func (r *VMResults) measure(f *vmFlags) error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, f.limit)
	defer cancel()
	self, err := os.Executable()
	if err != nil {
		return err
	}
	cowdev, err := exec.LookPath(f.cowdev)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp(f.dir, "cowdev-bench-vm-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	origin, store := filepath.Join(dir, "origin"), filepath.Join(dir, "store")
	if err := errors.Join(guest.MakeOrigin(origin), sparse(store, storeSize)); err != nil {
		return err
	}
	img, err := vm.Prepare(ctx)
	if err != nil {
		return err
	}
	r.Began = time.Now().UTC().Truncate(time.Second)
	r.Machine = append(describeMachine(dir)[:1], firstLine("qemu-system-x86_64", "--version"), firstLine(cowdev, "--version"))
	before := processorsNow()
	m, err := img.Boot(ctx, vm.Options{
		Dir:      dir,
		Files:    map[string]string{"cowdev": cowdev, "bench": self},
		Programs: []string{"dmsetup"},
		Disks:    []string{origin, store},
		Script:   fmt.Sprintf("echo kernel $(uname -r)\nexec ./bench guest %d\n", f.rounds),
		Line:     r.line,
	})
	if err != nil {
		return err
	}
	defer m.Cut()
	status, err := m.Wait()
	if err == nil && status != 0 {
		err = fmt.Errorf("status %d", status)
	}
	if err != nil {
		return fmt.Errorf("in the guest: %w; console:\n%s", err, m.Console())
	}
	r.Machine = append(r.Machine, fmt.Sprintf("other processes used %.0f %% of the processors meanwhile", 100*before.others(m.CPU())))
	if err := guest.CompareOrigin(origin); err != nil {
		return fmt.Errorf("the origin was changed: %w", err)
	}
	return nil
}

// line takes a line of the guest's script.
func (r *VMResults) line(line string) {
	if text, ok := strings.CutPrefix(line, guest.SamplePrefix); ok {
		var s guest.Sample
		if err := json.Unmarshal([]byte(text), &s); err == nil {
			r.Samples = append(r.Samples, s)
		}
	}
	if text, ok := strings.CutPrefix(line, "kernel "); ok {
		r.Kernel = text
	}
	fmt.Fprintf(os.Stderr, "%s guest: %s\n", time.Now().Format(time.TimeOnly), line)
}
