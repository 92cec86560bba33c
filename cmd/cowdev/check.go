package main

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"github.com/cowdev/cowdev/exception"
	"github.com/cowdev/cowdev/image"
	"github.com/cowdev/cowdev/internal/disk"
)

func checkCommand() *cli.Command {
	return &cli.Command{
		Name:      "check",
		Usage:     "Look for damage in COW, and whether BASE is its base",
		ArgsUsage: "COW [BASE]",
		Description: "Exit status: 0 clean, 1 nothing is lost but space or safety, 6 wrong base, 8 damaged, 10 repaired.\n" +
			"--deep also keeps the base's full digest in COW, where it was not known and COW can be written; with --accept-base\n" +
			"it is that of BASE as it is now.",
		Flags: append([]cli.Flag{
			jsonFlag,
			&cli.BoolFlag{Name: "deep", Usage: "read all of BASE and compare its digest"},
			&cli.BoolFlag{Name: "repair", Usage: "mend what can safely be mended; what is overwritten is kept in COW.repair-GENERATION"},
		}, baseFlags()...),
		Action: check,
	}
}

// checkResult is what check prints; the JSON names are part of the interface.
type checkResult struct {
	File     string         `json:"file"`
	State    string         `json:"state"`
	Clean    bool           `json:"closed-in-order"`
	Chunks   int64          `json:"chunks"`
	Stored   int64          `json:"stored-bytes"`
	Zero     int64          `json:"zero-bytes"`
	Holes    int64          `json:"hole-bytes"`
	Leaked   int64          `json:"leaked-bytes"`
	Records  int            `json:"log-records"`
	Problems []checkProblem `json:"problems"`
	Repaired []string       `json:"repaired,omitempty"`
	Kept     string         `json:"kept-in,omitempty"`
	Base     string         `json:"base,omitempty"`
}

type checkProblem struct {
	What string `json:"what"`
	Harm bool   `json:"harm"`
	Fix  string `json:"fix,omitempty"`
}

func check(c *cli.Context) error {
	args, err := arguments(c, c.Command.ArgsUsage)
	if err != nil {
		return err
	}
	cowPath, basePath := args[0], args[1]
	o, err := viewOptionsOf(c)
	if err != nil {
		return err
	}
	if c.Bool("deep") && basePath == "" {
		return usagef("check: --deep needs BASE; usage: cowdev check [flags] COW BASE")
	}
	result, harmed, err := checkStore(cowPath, c.Bool("repair"))
	if err != nil {
		return err
	}
	if basePath != "" && !harmed {
		o.deep, o.existing, o.readOnly = c.Bool("deep"), true, !o.accept && !(c.Bool("deep") && writable(cowPath))
		if err := checkBase(c, basePath, cowPath, o, result); err != nil {
			return err
		}
	}
	if c.Bool("json") {
		err = printJSON(c.App.Writer, result)
	} else {
		err = result.print(c)
	}
	return errors.Join(err, result.verdict(harmed))
}

// verdict returns what the exit status says.
func (r *checkResult) verdict(harmed bool) error {
	switch {
	case harmed:
		return quietError(exitDamaged)
	case len(r.Problems) > 0:
		return quietError(exitFailure)
	case len(r.Repaired) > 0:
		return quietError(exitRepaired)
	}
	return nil
}

// checkLocked is what to do where somebody else has the store or the base.
const checkLocked = "check when that process has ended; info looks without a lock"

// checkStore checks the store at path and repairs it if it is to; harmed says
// that it is damaged afterwards.
func checkStore(path string, repair bool) (r *checkResult, harmed bool, err error) {
	f, err := openStoreFile(path, !repair)
	if err != nil {
		return nil, false, ifLocked(err, checkLocked)
	}
	defer f.Close()
	rep, err := exception.Check(f)
	if err != nil {
		return nil, false, fmt.Errorf("%s: %w", path, err)
	}
	r = &checkResult{File: absolute(path)}
	if repair && fixable(rep) {
		if err := r.repair(f, path, rep); err != nil {
			return nil, false, err
		}
		if rep, err = exception.Check(f); err != nil {
			return nil, false, fmt.Errorf("%s: after the repair: %w", path, err)
		}
	}
	r.fill(rep)
	return r, rep.Harmed(), nil
}

func fixable(rep *exception.Report) bool {
	for _, p := range rep.Problems {
		if p.Fix != "" {
			return true
		}
	}
	return false
}

// repair mends what can be mended, and keeps what that overwrites.
func (r *checkResult) repair(f *disk.OS, path string, rep *exception.Report) error {
	r.Kept = fmt.Sprintf("%s.repair-%d", path, rep.Header.Generation)
	keep, err := os.OpenFile(r.Kept, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer keep.Close()
	mended, err := exception.Repair(f, rep, keep)
	if err != nil {
		return fmt.Errorf("%s: repair: %w", path, err)
	}
	for _, p := range mended {
		r.Repaired = append(r.Repaired, p.Fix)
	}
	if n, err := keep.Seek(0, io.SeekEnd); err == nil && n == 0 {
		os.Remove(r.Kept)
		r.Kept = ""
	}
	return nil
}

func (r *checkResult) fill(rep *exception.Report) {
	block := int64(rep.Header.BlockSize())
	r.State, r.Clean = rep.Header.State.String(), rep.Header.Clean
	r.Chunks, r.Stored, r.Zero = rep.Chunks, rep.Stored*block, rep.Zero*block
	r.Holes = rep.Holes * block
	r.Leaked, r.Records = rep.Leaked, rep.Records
	r.Problems = []checkProblem{}
	for _, p := range rep.Problems {
		r.Problems = append(r.Problems, checkProblem{p.What, p.Harm, p.Fix})
	}
}

// checkBase sees whether the base is the store's.
func checkBase(c *cli.Context, basePath, cowPath string, o viewOptions, r *checkResult) error {
	ctx, stop := untilSignal(c)
	defer stop()
	v, err := openView(ctx, c, basePath, cowPath, o)
	if err != nil {
		return ifLocked(err, checkLocked)
	}
	r.Base = v.told(o)
	return v.Close()
}

// writable reports whether the store at path may be written: the digest of its
// base is kept where it can be, and compared anywhere.
func writable(path string) bool {
	return unix.Faccessat(unix.AT_FDCWD, path, unix.W_OK, unix.AT_EACCESS) == nil
}

// told says what is known of the base, which was opened with o.
func (v *view) told(o viewOptions) string {
	id := v.identity
	sampled := id.Sample != nil && o.look != image.DigestOff
	switch {
	case o.accept && id.Full != nil:
		return "accepted as it is now; the digest of all of it is kept"
	case o.accept && sampled:
		return "accepted as it is now; its size, time and sample are kept"
	case o.accept:
		return "accepted as it is now; none of its contents are kept to compare"
	case v.store.Header().State == exception.Merging && sampled:
		return "half merged; of the sample, what the store does not hold is as it was"
	case v.store.Header().State == exception.Merging:
		return "half merged; not compared"
	case id.Full != nil && v.compared:
		return "all of it is as it was"
	case id.Full != nil && o.deep:
		parts, kept := "size and time", "that of now is kept"
		if sampled {
			parts = "size, time and sample"
		}
		if v.store.ReadOnly() {
			kept = "nor can that of now be kept"
		}
		return fmt.Sprintf("%s are as they were; no digest of all of it was known, %s", parts, kept)
	case id.Full != nil:
		return "size, time and sample are as they were; the digest of all of it is known"
	case sampled:
		return "size, time and sample are as they were"
	}
	return "not compared"
}

func (r *checkResult) print(c *cli.Context) error {
	w := c.App.Writer
	for _, p := range r.Problems {
		kind := "problem"
		if p.Harm {
			kind = "damage"
		}
		fix := ""
		if p.Fix != "" {
			fix = " (--repair: " + p.Fix + ")"
		}
		fmt.Fprintf(w, "%s: %s%s\n", kind, p.What, fix)
	}
	for _, fix := range r.Repaired {
		fmt.Fprintf(w, "repaired: %s\n", fix)
	}
	t := newTable(w)
	if r.Kept != "" {
		t.line("kept", "what was overwritten, in %s", r.Kept)
	}
	left := "closed in order"
	if !r.Clean {
		left = fmt.Sprintf("not closed in order, %d records to replay", r.Records)
	}
	t.line("store", "%s: %s, %s", r.File, r.State, left)
	t.line("stored", "%s in %d chunks", size(r.Stored), r.Chunks)
	t.line("zero", "%s", size(r.Zero))
	if r.Holes > 0 {
		t.line("holes", "%s of what is stored: zeros, as a sparse copy leaves them", size(r.Holes))
	}
	if r.Leaked > 0 {
		t.line("leaked", "%s", size(r.Leaked))
	}
	if r.Base != "" {
		t.line("base", "%s", r.Base)
	}
	return t.end()
}
