package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"github.com/urfave/cli/v2"

	"github.com/cowdev/cowdev/exception"
	"github.com/cowdev/cowdev/image"
	"github.com/cowdev/cowdev/merge"
)

func mergeCommand() *cli.Command {
	return &cli.Command{
		Name:      "merge",
		Usage:     "Fold COW into BASE, or into a new image",
		ArgsUsage: "BASE COW",
		Description: "In place, BASE gets the changes and COW is emptied. Interrupted, it can be run again;\n" +
			"until then BASE is good only together with COW. With --output both stay as they are.",
		Flags: append([]cli.Flag{
			&cli.StringFlag{Name: "output", Aliases: []string{"o"}, Usage: "write the merged image to `NEW`, which must not exist"},
			&cli.BoolFlag{Name: "delete", Usage: "remove COW when BASE has it all"},
			&cli.BoolFlag{Name: "dry-run", Aliases: []string{"n"}, Usage: "print what would be written, and change nothing"},
			jsonFlag,
		}, baseFlags()...),
		Action: func(c *cli.Context) error {
			args, err := arguments(c, c.Command.ArgsUsage)
			if err != nil {
				return err
			}
			o, err := viewOptionsOf(c)
			if err != nil {
				return err
			}
			if c.String("output") != "" && c.Bool("delete") {
				return usagef("merge: --output leaves COW as it is, and does not go with --delete")
			}
			return mergeView(c, args[0], args[1], o)
		},
	}
}

// mergeResult is what merge prints; the JSON names are part of the interface.
type mergeResult struct {
	Chunks int64  `json:"chunks"`
	Stored int64  `json:"stored-bytes"`
	Zero   int64  `json:"zero-bytes"`
	Pieces int64  `json:"pieces"`
	Target string `json:"target"`
	Done   bool   `json:"done"`
}

func mergeView(c *cli.Context, basePath, cowPath string, o viewOptions) (err error) {
	ctx, stop := untilSignal(c)
	defer stop()
	output, dry := c.String("output"), c.Bool("dry-run")
	o.existing = true
	o.readOnly, o.writable = output != "" || dry, output == "" && !dry
	v, err := openView(ctx, c, basePath, cowPath, o)
	if err != nil {
		return ifLocked(err, "merge when that process has ended")
	}
	defer func() { err = errors.Join(err, v.Close()) }()

	plan := merge.Survey(v.store)
	r := mergeResult{Chunks: plan.Chunks, Stored: plan.Stored, Zero: plan.Zero, Pieces: plan.Pieces, Target: absolute(basePath)}
	if output != "" {
		r.Target = absolute(output)
	}
	switch {
	case dry && output != "":
		err = merge.Free(output)
	case dry:
	case output != "":
		err = v.mergeTo(ctx, c, output, plan)
	default:
		err = v.mergeInto(ctx, c, cowPath, plan)
	}
	if err != nil {
		return err
	}
	r.Done = !dry
	if err = r.print(c); err != nil && r.Done {
		err = fmt.Errorf("%s is merged, but that could not be printed: %w", r.Target, err)
	}
	return err
}

// mergeTo writes the merged image to a new file.
func (v *view) mergeTo(ctx context.Context, c *cli.Context, path string, plan merge.Plan) error {
	p := newProgress(c, "merge", plan.Bytes())
	defer p.end()
	return merge.To(ctx, merge.View{Base: v.base, Store: v.store, Device: v.device}, path, merge.Options{Progress: p.set})
}

// mergeInto merges in place.
func (v *view) mergeInto(ctx context.Context, c *cli.Context, cowPath string, plan merge.Plan) error {
	remove := c.Bool("delete")
	if remove && v.file.IsDevice() {
		return usagef("--delete: %s is a block device and cannot be removed; without it the store is emptied", cowPath)
	}
	if remove {
		if err := onlyName(cowPath); err != nil {
			return err
		}
	}
	if plan.Chunks == 0 && !remove && v.store.Header().State == exception.Active {
		return nil
	}
	warn(c, "%s: every other overlay made over it becomes unusable", v.base.Path())
	p := newProgress(c, "merge", plan.Bytes())
	defer p.end()
	mo := merge.Options{Progress: p.set, Identify: v.identify}
	if remove {
		mo.Remove = func() error {
			if err := os.Remove(cowPath); err != nil {
				return err
			}
			return syncDir(filepath.Dir(cowPath))
		}
	}
	err := merge.Into(ctx, v.base.Disk(), v.store, mo)
	return unfinished(err, v.store.Header().State, v.base.Path(), cowPath)
}

// onlyName refuses a path whose removal would leave the store's file under
// another name: half merged for ever, over a base that has it all.
func onlyName(path string) error {
	info, err := os.Lstat(path)
	if err != nil {
		return err
	}
	if info.Mode()&fs.ModeSymlink != 0 {
		return usagef("--delete: %s is a symbolic link, expected the store's own name; without --delete the store is emptied", path)
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok && st.Nlink > 1 {
		return usagef("--delete: %s has %d names (hard links), expected one; without --delete the store is emptied", path, st.Nlink)
	}
	return nil
}

// unfinished adds to the error of a merge in place what is left behind.
func unfinished(err error, state exception.State, basePath, cowPath string) error {
	switch {
	case err == nil || state != exception.Merging:
		return err
	case errors.Is(err, context.Canceled):
		return fmt.Errorf("%w, run merge again to finish (%s)", err, halfMerged(basePath, cowPath))
	}
	return fmt.Errorf("%w (%s)", err, halfMerged(basePath, cowPath))
}

// identify returns the identity of the base as it is now.
func (v *view) identify() ([]byte, error) {
	id, err := v.base.Identify(image.DigestFull)
	return id.Encode(), err
}

func (r mergeResult) print(c *cli.Context) error {
	if c.Bool("json") {
		return printJSON(c.App.Writer, r)
	}
	verb := "merged into"
	if !r.Done {
		verb = "would be merged into"
	}
	_, err := fmt.Fprintf(c.App.Writer, "%s %s: %s written and %s zeroed in %d pieces\n",
		verb, printable(r.Target), size(r.Stored), size(r.Zero), r.Pieces)
	return err
}
