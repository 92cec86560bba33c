package main

// What the scripts cannot reach well: sizes, the order of flags, and which
// error has which status.

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/urfave/cli/v2"

	"github.com/cowdev/cowdev/block"
	"github.com/cowdev/cowdev/exception"
	"github.com/cowdev/cowdev/image"
	"github.com/cowdev/cowdev/internal/disk"
)

func TestParseSize(t *testing.T) {
	for s, want := range map[string]int64{
		"0": 0, "4096": 4096, "64K": 64 << 10, "64k": 64 << 10, "64KiB": 64 << 10, "64KB": 64 << 10, "1.5G": 3 << 29,
		"2T": 2 << 40, "1P": 1 << 50, "1E": 1 << 60, "10B": 10, "0.5K": 512,
	} {
		if got, err := parseSize(s); err != nil || got != want {
			t.Errorf("%q: %d, %v, expected %d", s, got, err, want)
		}
	}
	for _, s := range []string{"", "K", "B", "-1", "1.0001", "1e3", "1KK", "64 K", "0x10", "9E", "1/2", strings.Repeat("9", 40), "1..2", "."} {
		if got, err := parseSize(s); err == nil {
			t.Errorf("%q: %d, expected an error", s, got)
		}
	}
}

func TestReorder(t *testing.T) {
	commands := newApp(nil, nil).Commands
	for _, c := range []struct{ in, want string }{
		{"merge BASE COW --output NEW", "merge --output NEW -- BASE COW"},
		{"merge BASE --output=NEW COW -q", "merge --output=NEW -q -- BASE COW"},
		{"serve --read-only BASE --export x COW", "serve --read-only --export x -- BASE COW"},
		{"serve BASE -- --COW -x", "serve -- BASE --COW -x"},
		{"info -", "info -- -"},
		{"ls -lR IMAGE -Rl", "ls -l -R -R -l -- IMAGE"},
		{"--version", "--version"},
		{"nonsense --flag x", "nonsense --flag x"},
	} {
		got, err := reorder(append([]string{"cowdev"}, strings.Fields(c.in)...), commands)
		want := append([]string{"cowdev"}, strings.Fields(c.want)...)
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("%s: %q, %v, expected %q", c.in, got, err, want)
		}
	}
	for _, in := range []string{"serve BASE COW --socket", "serve --socket -- BASE COW", "ls -lx IMAGE", "merge -no BASE COW"} {
		if _, err := reorder(append([]string{"cowdev"}, strings.Fields(in)...), commands); exitStatus(err) != exitUsage {
			t.Errorf("%s: %v, expected a usage error", in, err)
		}
	}
}

// TestEmptyValues: a flag of any verb that is given an empty value is refused,
// in each form, but for --export, whose empty value is a name.
func TestEmptyValues(t *testing.T) {
	commands := newApp(nil, nil).Commands
	for _, c := range commands {
		for _, f := range c.Flags {
			if _, isBool := f.(*cli.BoolFlag); isBool {
				continue
			}
			for _, name := range f.Names() {
				dashed := strings.Repeat("-", min(len(name), 2)) + name
				for _, words := range [][]string{{dashed, ""}, {dashed + "="}} {
					_, err := reorder(append([]string{"cowdev", c.Name, "BASE", "COW"}, words...), commands)
					if name == "export" {
						if err != nil {
							t.Errorf("%s %q: %v", c.Name, words, err)
						}
						continue
					}
					want := fmt.Sprintf("%s: %s needs a value", c.Name, dashed)
					if exitStatus(err) != exitUsage || err.Error() != want {
						t.Errorf("%s %q: %v, expected the usage error %q", c.Name, words, err, want)
					}
				}
			}
		}
	}
}

// A name in a table stays in its line, and reaches no terminal as it is.
func TestTable(t *testing.T) {
	var out bytes.Buffer
	table := newTable(&out)
	table.line("base", "%s", "a\tb\nc\x1b[31m\xff \\ ü")
	if err := table.end(); err != nil {
		t.Fatal(err)
	}
	if want := `base:  a\tb\nc\x1b[31m\xff \ ü` + "\n"; out.String() != want {
		t.Errorf("%q, expected %q", out.String(), want)
	}
}

func TestExitStatus(t *testing.T) {
	for _, c := range []struct {
		err  error
		want int
	}{
		{nil, 0},
		{errors.New("other"), 1},
		{usagef("x"), 2},
		{fs.ErrPermission, 3},
		{syscall.EROFS, 3},
		{disk.ErrLocked, 4},
		{context.Canceled, 5},
		{image.ErrWrongBase, 6},
		{exception.ErrNotStore, 7},
		{exception.ErrVersion, 7},
		{exception.ErrCorrupt, 8},
		{exception.ErrFull, 9},
		{syscall.ENOSPC, 9},
		{quietError(exitRepaired), 10},
		// Interrupted is what counts, whatever went wrong on the way out.
		{errors.Join(context.Canceled, syscall.ENOSPC), 5},
	} {
		err := c.err
		if err != nil {
			err = fmt.Errorf("wrapped: %w", err)
		}
		if got := exitStatus(err); got != c.want {
			t.Errorf("%v: status %d, expected %d", c.err, got, c.want)
		}
	}
}

// TestDiffStatus: 1 says that there are differences and nothing else.
func TestDiffStatus(t *testing.T) {
	for _, c := range []struct {
		different bool
		err       error
		want      int
	}{
		{false, nil, 0},
		{true, nil, 1},
		{false, syscall.EIO, 3},
		{true, syscall.EIO, 3},
		{false, io.ErrUnexpectedEOF, 3},
		{true, exception.ErrCorrupt, 8},
		{true, context.Canceled, 5},
		{false, usagef("x"), 2},
	} {
		err := differ(c.different, c.err)
		if got := exitStatus(err); got != c.want || c.err != nil && !errors.Is(err, c.err) {
			t.Errorf("%v, %v: status %d, %v, expected %d", c.different, c.err, got, err, c.want)
		}
	}
}

// TestInterrupted: a merge that is interrupted says so, and what to do, in one
// line and in no other words than its user's.
func TestInterrupted(t *testing.T) {
	for _, c := range []struct {
		err   error
		state exception.State
		want  string
	}{
		{context.Canceled, exception.Merging, "cowdev: interrupted, run merge again to finish (b is half merged and usable only with c until merge is run again)\n"},
		{context.Canceled, exception.Active, "cowdev: interrupted\n"},
		{syscall.EIO, exception.Merging, "cowdev: input/output error (b is half merged and usable only with c until merge is run again)\n"},
		{syscall.EIO, exception.Active, "cowdev: input/output error\n"},
		{nil, exception.Active, ""},
	} {
		var b strings.Builder
		err := unfinished(c.err, c.state, "b", "c")
		if err != nil {
			report(&b, err)
		}
		if b.String() != c.want || !errors.Is(err, c.err) {
			t.Errorf("%v, %v: %q, expected %q", c.err, c.state, b.String(), c.want)
		}
	}
}

// A message is one line, in which nothing is that a terminal would obey.
func TestReport(t *testing.T) {
	const name = "a\nb\x1b[2J\r\x9b\t"
	open := &fs.PathError{Op: "open", Path: name, Err: syscall.ENOENT}
	const told = `open a\nb\x1b[2J\r\x9b\t: no such file or directory`
	for _, c := range []struct {
		err  error
		want string
	}{
		{open, told},
		{errors.Join(open, errors.New("x")), told + "; x"},
		{fmt.Errorf("first: %w, %w", errors.Join(open, errors.Join(errors.New("x"), open)), io.EOF), "first: " + told + "; x; " + told + ", EOF"},
		{errors.New(`é "quoted" \d \n C:\\x`), `é "quoted" \d \n C:\\x`},
	} {
		var b strings.Builder
		report(&b, c.err)
		if got := b.String(); got != "cowdev: "+c.want+"\n" {
			t.Errorf("%q is told as\n%sexpected\n%s", c.err, got, c.want)
		}
	}
	var b strings.Builder
	app := newApp(io.Discard, &b)
	warn(cli.NewContext(app, nil, nil), "%s: passed over", name)
	if got, want := b.String(), `cowdev: a\nb\x1b[2J\r\x9b\t: passed over`+"\n"; got != want {
		t.Errorf("a warning is %q, expected %q", got, want)
	}
}

func TestBlockBytes(t *testing.T) {
	g := block.Geometry{Size: 64<<10 + 5000, ChunkSize: 64 << 10}
	for _, c := range []struct {
		chunk block.Chunk
		mask  block.Mask
		want  int64
	}{{0, block.AllBlocks, 64 << 10}, {0, 1, 4096}, {1, 1, 4096}, {1, 2, 904}, {1, 3, 5000}, {1, 0, 0}} {
		if got := blockBytes(g, c.chunk, c.mask); got != c.want {
			t.Errorf("chunk %d, blocks %#x: %d bytes, expected %d", c.chunk, c.mask, got, c.want)
		}
	}
}

// Clients are told of the base in a string that the protocol allows.
func TestDescription(t *testing.T) {
	for base, want := range map[string]string{
		"/vm/base.img":                 "copy-on-write overlay of /vm/base.img",
		"b\xe9se\xff.img":              "copy-on-write overlay of b\uFFFDse\uFFFD.img",
		strings.Repeat("d", 231):       "copy-on-write overlay of " + strings.Repeat("d", 231),
		strings.Repeat("d", 4095):      "copy-on-write overlay of " + strings.Repeat("d", 228) + "…",
		"x" + strings.Repeat("é", 500): "copy-on-write overlay of x" + strings.Repeat("é", 113) + "…",
	} {
		if got := description(base); got != want {
			t.Errorf("%.40q: %q, expected %q", base, got, want)
		}
	}
}

func TestURIs(t *testing.T) {
	lc := listenConfig{export: "a b/c", tls: true}
	if got, want := lc.unixURI("/run/my disk.sock"), "nbds+unix:///a%20b%2Fc?socket=/run/my%20disk.sock"; got != want {
		t.Errorf("%s, expected %s", got, want)
	}
	lc = listenConfig{}
	if got, want := lc.unixURI("/a&b+c#d?e%f g\n;=é~.sock"), "nbd+unix:///?socket=/a%26b%2Bc%23d%3Fe%25f%20g%0A%3B%3D%C3%A9~.sock"; got != want {
		t.Errorf("%s, expected %s", got, want)
	}
	if got, want := shellWord("it's"), `'it'\''s'`; got != want {
		t.Errorf("%s, expected %s", got, want)
	}
}
