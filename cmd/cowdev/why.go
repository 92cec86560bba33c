package main

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"github.com/urfave/cli/v2"

	"github.com/cowdev/cowdev/block"
	"github.com/cowdev/cowdev/files"
)

func whyCommand() *cli.Command {
	return &cli.Command{
		Name:      "why",
		Usage:     "Show which files and directories an overlay's space went to",
		ArgsUsage: "BASE COW",
		Description: "COW is a store, or the socket or NBD URI of the server that serves it. " +
			"Files and kinds are told of ext2, ext3 and ext4.",
		Flags: append([]cli.Flag{
			partitionFlag,
			&cli.IntFlag{Name: "top", Value: 15, Usage: "how many directories and files to show, 0 for all; JSON has all"},
			jsonFlag,
		}, baseFlags()...),
		Action: why,
	}
}

// whyReport is what why prints; the JSON names are part of the interface.
type whyReport struct {
	*files.SpaceReport
	Dropped int64 `json:"recorded-zeros"` // known as zeros, and stored nowhere
}

func why(c *cli.Context) (err error) {
	args, err := arguments(c, c.Command.ArgsUsage)
	if err != nil {
		return err
	}
	if c.Int("top") < 0 {
		return usagef("--top: %d: expected 0 or more", c.Int("top"))
	}
	v, err := openPair(c, args[0], args[1])
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, v.close()) }()
	r := whyReport{}
	var mute string
	err = v.settled(func() (err error) {
		mute, err = r.fill(v)
		return err
	})
	if err != nil {
		return fmt.Errorf("%s: %w", args[1], err)
	}
	if mute != "" {
		warn(c, "%s: no file is told: %s", args[1], mute)
	}
	if c.Bool("json") {
		return printJSON(c.App.Writer, r)
	}
	return r.print(c.App.Writer, c.Int("top"))
}

// fill finds out. It says in mute why there is no file system that tells what
// its blocks are for.
func (r *whyReport) fill(v *lookView) (mute string, err error) {
	fsys, err := files.Open(v)
	switch {
	case errors.Is(err, files.ErrNoFS) || errors.Is(err, files.ErrUnsupported):
		fsys, mute = nil, err.Error()
	case err != nil:
		return "", err
	case !strings.HasPrefix(fsys.Info().Type, "ext"):
		mute = fsys.Info().Type + " does not tell what its blocks are for, expected ext2, ext3 or ext4"
	}
	overlay, err := v.overlay()
	if err != nil {
		return "", err
	}
	r.Dropped = 0
	var stored []block.Extent
	for _, e := range overlay {
		if e.State == block.Stored {
			stored = append(stored, e)
		} else {
			r.Dropped += e.N
		}
	}
	r.SpaceReport, err = files.Why(v.base, v, fsys, stored)
	return mute, err
}

// print prints the report, with at most top paths of each kind.
func (r *whyReport) print(w io.Writer, top int) error {
	fmt.Fprintf(w, "stored: %s; recorded as zeros, without space: %s\n\n", size(r.Total.Stored), size(r.Dropped))
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', tabwriter.AlignRight)
	row := func(s files.Space, name string) {
		fmt.Fprintf(t, "%s\t%s\t%s\t  %s\n", short(s.Stored), short(s.Equal), short(s.Zeros), name)
	}
	fmt.Fprintf(t, "stored\tas in base\tzeros\t  kind\n")
	for _, k := range r.Kinds {
		name := k.Kind.String()
		if k.Kind == files.Free {
			name += " (not trimmed: fstrim gives it back)"
		}
		row(k.Space, name)
	}
	for _, list := range []struct {
		title string
		paths []files.PathSpace
	}{{"directory, with all below", r.Dirs}, {"file", r.Files}} {
		if len(list.paths) == 0 {
			continue
		}
		fmt.Fprintf(t, "\t\t\t\nstored\tas in base\tzeros\t  %s\n", list.title)
		for i, p := range list.paths {
			if i == top && top > 0 {
				fmt.Fprintf(t, "\t\t\t  and %d more\n", len(list.paths)-i)
				break
			}
			row(p.Space, files.Quote(p.Path))
		}
	}
	return t.Flush()
}
