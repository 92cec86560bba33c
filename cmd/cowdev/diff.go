package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/urfave/cli/v2"

	"github.com/cowdev/cowdev/diff"
)

func diffCommand() *cli.Command {
	return &cli.Command{
		Name:      "diff",
		Usage:     "Show what differs between BASE and what COW makes of it",
		ArgsUsage: "BASE COW",
		Description: "By blocks, and with --files by files. Exit status: 0 no difference, 1 there are differences, more: failed.\n" +
			"Only what COW holds is read; blocks that were written with the bytes that BASE has are no difference.",
		Flags: append(append([]cli.Flag{
			jsonFlag,
			&cli.BoolFlag{Name: "summary", Usage: "print sums only: bytes stored, zero, different from BASE and equal to it"},
		}, diffFilesFlags()...), baseFlags()...),
		Action: func(c *cli.Context) error {
			args, err := arguments(c, c.Command.ArgsUsage)
			if err != nil {
				return err
			}
			if c.Bool("files") {
				if c.IsSet("summary") {
					return usagef("diff: --summary is of blocks; with --files it is --stat")
				}
				return differ(diffFiles(c, args[0], args[1]))
			}
			for _, name := range []string{"all", "no-renames", "stat", "content", "content-limit", "tar", "partition"} {
				if c.IsSet(name) {
					return usagef("diff: --%s goes with --files", name)
				}
			}
			return differ(diffBlocks(c, args[0], args[1]))
		},
	}
}

// differ returns what the exit status of diff says. Status 1 is kept for
// differences: a failure that has it elsewhere, as a disk that cannot be read,
// counts as a file that is not readable.
func differ(different bool, err error) error {
	switch {
	case err == nil && different:
		return quietError(exitFailure)
	case exitStatus(err) == exitFailure:
		return statusError{err, exitFile}
	}
	return err
}

// diffRun is a run of blocks as JSON has it.
type diffRun struct {
	Start  int64  `json:"start"`
	Length int64  `json:"length"`
	State  string `json:"state"` // stored or zero
	Equal  bool   `json:"equal"` // to the base
}

// diffBlocks is diff BASE COW.
func diffBlocks(c *cli.Context, basePath, cowPath string) (different bool, err error) {
	ctx, stop := untilSignal(c)
	defer stop()
	o, err := viewOptionsOf(c)
	if err != nil {
		return false, err
	}
	o.readOnly, o.existing = true, true
	v, err := openView(ctx, c, basePath, cowPath, o)
	if err != nil {
		return false, ifLocked(err, "compare when that process has ended, or with --files name the socket of its server instead of COW")
	}
	defer func() { err = errors.Join(err, v.Close()) }()

	sum, err := v.printDiff(ctx, c)
	return sum.Different > 0, err
}

// printDiff prints the differences in the form that was asked for.
func (v *view) printDiff(ctx context.Context, c *cli.Context) (sum diff.Summary, err error) {
	u := usageOf(v.store)
	p := newProgress(c, "compare", u.stored+u.zero)
	defer p.end()
	summary, asJSON := c.Bool("summary"), c.Bool("json")
	w := bufio.NewWriter(c.App.Writer)
	list := newList(w, asJSON)
	err = diff.Compare(ctx, v.base, v.device, func(r diff.Run) error {
		sum.Add(r)
		p.set(sum.Stored + sum.Zero)
		switch {
		case summary:
		case asJSON:
			list.add(diffRun{r.Off, r.N, r.State.String(), r.Equal})
		case !r.Equal:
			fmt.Fprintf(w, "%-14d %-14d %s\n", r.Off, r.N, r.State)
		}
		return nil
	})
	if err != nil {
		return sum, err
	}
	switch {
	case summary && asJSON:
		err = printJSON(w, sum)
	case summary:
		err = printSummary(w, sum)
	case asJSON:
		err = list.end()
	}
	return sum, errors.Join(err, w.Flush())
}

func printSummary(w io.Writer, s diff.Summary) error {
	t := newTable(w)
	t.line("stored", "%s", size(s.Stored))
	t.line("zero", "%s", size(s.Zero))
	t.line("different from the base", "%s", size(s.Different))
	t.line("equal to the base", "%s", size(s.Equal))
	return t.end()
}
