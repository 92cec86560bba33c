package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/urfave/cli/v2"

	"github.com/cowdev/cowdev/files"
)

// diffFilesFlags are the flags of diff that go with --files.
func diffFilesFlags() []cli.Flag {
	return []cli.Flag{
		&cli.BoolFlag{Name: "files", Usage: "compare files instead of blocks"},
		partitionFlag,
		&cli.BoolFlag{Name: "all", Usage: "files: compare all, not only what the changed blocks can have touched"},
		&cli.BoolFlag{Name: "no-renames", Usage: "files: show a renamed file as removed and added"},
		&cli.BoolFlag{Name: "stat", Usage: "files: show the bytes changed per file, and sums"},
		&cli.BoolFlag{Name: "content", Usage: "files: show how the content of text files differs"},
		&cli.StringFlag{Name: "content-limit", Value: "1M", Usage: "files: largest text file whose content is compared"},
		&cli.StringFlag{Name: "tar", Usage: "files: write what changed to `OUT`, an OCI layer; - for stdout"},
	}
}

// diffFiles is diff --files BASE COW.
func diffFiles(c *cli.Context, basePath, cowPath string) (different bool, err error) {
	limit, err := parseSize(c.String("content-limit"))
	if err != nil {
		return false, usagef("--content-limit: %w", err)
	}
	if n := countSet(c, "stat", "content", "json"); n > 1 || n > 0 && c.String("tar") == "-" {
		return false, usagef("diff --files: --stat, --content, --json and --tar - each take all of the output, expected one of them")
	}
	v, err := openPair(c, basePath, cowPath)
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, v.close()) }()
	var r *files.Result
	var now files.FS
	err = v.settled(func() (err error) {
		r, now, err = v.compare(c)
		return err
	})
	if err != nil {
		return false, fmt.Errorf("compare %s with %s: %w", basePath, cowPath, err)
	}
	if err := writeDiffFiles(c, r, now, limit); err != nil {
		return false, err
	}
	if len(r.Encrypted) > 0 {
		return false, passedOver(c, r.Encrypted)
	}
	return len(r.Changes) > 0, nil
}

// passedOver tells of the paths that were not looked into. The status is that of
// what cannot be read, whatever was found elsewhere.
func passedOver(c *cli.Context, encrypted []string) error {
	for _, name := range encrypted {
		warn(c, "%s: encrypted, not looked into", files.Quote(name))
	}
	return quietError(exitFile)
}

// compare compares the base's files with those seen through the overlay.
func (v *lookView) compare(c *cli.Context) (*files.Result, files.FS, error) {
	overlay, err := v.overlay()
	if err != nil {
		return nil, nil, err
	}
	old, err := files.Open(v.base)
	if err != nil {
		return nil, nil, fmt.Errorf("base: %w", err)
	}
	now, err := files.Open(v)
	if err != nil {
		return nil, nil, fmt.Errorf("overlay: %w", err)
	}
	r, err := files.Compare(old, now, files.Options{Changed: overlay, All: c.Bool("all"), NoRenames: c.Bool("no-renames")})
	return r, now, err
}

// countSet returns how many of the flags are set.
func countSet(c *cli.Context, flags ...string) (n int) {
	for _, f := range flags {
		if c.Bool(f) {
			n++
		}
	}
	return n
}

// writeDiffFiles prints a result in the form that was asked for.
func writeDiffFiles(c *cli.Context, r *files.Result, now files.FS, limit int64) error {
	if out := c.String("tar"); out != "" {
		if err := writeLayer(c, r, now, out); err != nil || out == "-" {
			return err
		}
	}
	w := bufio.NewWriter(c.App.Writer)
	switch {
	case c.Bool("json"):
		list := r.Changes
		if list == nil {
			list = []*files.Change{}
		}
		if err := printJSON(w, map[string]any{"changes": list, "encrypted": append([]string{}, r.Encrypted...), "summary": r.Summary(), "fast": r.Fast}); err != nil {
			return err
		}
	case c.Bool("content"):
		if err := r.WriteContent(w, limit); err != nil {
			return err
		}
	case c.Bool("stat"):
		writeDiffStat(w, r)
	default:
		for _, ch := range r.Changes {
			fmt.Fprintln(w, ch)
		}
	}
	return w.Flush()
}

// writeDiffStat prints the bytes changed per file, and the sums.
func writeDiffStat(w io.Writer, r *files.Result) {
	for _, ch := range r.Changes {
		fmt.Fprintf(w, "%15d  %-10s  %s\n", ch.Bytes, ch.Status, files.Quote(ch.Path))
	}
	s := r.Summary()
	fmt.Fprintf(w, "%d added, %d removed, %d modified, %d renamed, %d with other attributes; %s changed\n",
		s.Added, s.Removed, s.Modified, s.Renamed, s.Attributes, size(s.Bytes))
}

// writeLayer writes the layer to a new file, or to stdout. Of a file that is
// not complete nothing is left, also after an interrupt.
func writeLayer(c *cli.Context, r *files.Result, now files.FS, out string) (err error) {
	w := c.App.Writer
	if out != "-" {
		f, openErr := os.OpenFile(out, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o666)
		if openErr != nil {
			return fmt.Errorf("--tar: %w", openErr)
		}
		ctx, stop := untilSignal(c)
		defer stop()
		defer func() {
			if err = errors.Join(err, f.Close()); err != nil {
				os.Remove(out)
			}
		}()
		w = untilWriter{ctx, f}
	}
	b := bufio.NewWriterSize(w, 1<<20)
	skipped, err := r.WriteTar(b, now)
	if err == nil {
		err = b.Flush()
	}
	for _, name := range skipped {
		warn(c, "%s: a socket, left out of the layer", files.Quote(name))
	}
	if err != nil {
		return fmt.Errorf("--tar %s: %w", out, err)
	}
	return nil
}

// untilWriter writes until ctx ends.
type untilWriter struct {
	ctx context.Context
	w   io.Writer
}

func (u untilWriter) Write(p []byte) (int, error) {
	if err := u.ctx.Err(); err != nil {
		return 0, err
	}
	return u.w.Write(p)
}
