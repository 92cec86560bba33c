package crash

// A base that was changed under its store is refused with the place named, or
// found by a look at all of it.

import (
	"bytes"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// baseCase runs the program on a base and its store.
type baseCase struct {
	t           *testing.T
	base, store string
}

// run expects a status, and words in what is printed.
func (c baseCase) run(status int, words string, args ...string) {
	c.t.Helper()
	out, err := command(patience, program, args...)
	if got := exitStatus(err); got != status || !regexp.MustCompile(words).MatchString(out) {
		c.t.Fatalf("cowdev %s: status %d (%v), expected %d and %q:\n%s", strings.Join(args, " "), got, err, status, words, out)
	}
}

const statusWrongBase = 6

// TestBaseJournalReplay: a filesystem that was not unmounted is mounted
// read-only, and its journal is written all the same.
func TestBaseJournalReplay(t *testing.T) {
	dir := newSmallDisk(t, 64<<20) // where the copy of a mounted filesystem is at one instant
	img, at := filepath.Join(dir, "img"), filepath.Join(t.TempDir(), "at")
	must := func(name string, args ...string) {
		t.Helper()
		if out, err := command(patience, name, args...); err != nil {
			t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
		}
	}
	if err := os.Mkdir(at, 0o755); err != nil {
		t.Fatal(err)
	}
	must("truncate", "-s", "16M", img)
	must("mkfs.ext4", "-q", img)
	must("mount", "-o", "loop", img, at)
	unmounted := false
	t.Cleanup(func() {
		if !unmounted {
			command(patience, "umount", "-l", at)
		}
	})
	if err := os.WriteFile(filepath.Join(at, "file"), bytes.Repeat([]byte("journal "), 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	must("sync", "-f", at)
	c := baseCase{t, filepath.Join(dir, "base"), filepath.Join(t.TempDir(), "cow")}
	must("cp", img, c.base) // as a power cut would leave it
	must("umount", at)
	unmounted = true
	before, err := os.ReadFile(c.base)
	if err != nil {
		t.Fatal(err)
	}
	c.run(0, "", "create", "--format=raw", c.base, c.store)
	c.run(0, "", "check", "--deep", c.store, c.base)
	out, err := command(patience, "losetup", "--find", "--show", c.base)
	if err != nil {
		t.Fatalf("losetup: %v\n%s", err, out)
	}
	device := strings.TrimSpace(out)
	detached := false
	t.Cleanup(func() {
		if !detached {
			command(patience, "losetup", "-d", device)
		}
	})
	must("mount", "-o", "ro", device, at)
	must("umount", at)
	must("losetup", "-d", device)
	detached = true
	after, err := os.ReadFile(c.base)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Equal(before, after) {
		t.Skip("this kernel did not replay the journal")
	}
	c.run(statusWrongBase, "bytes [0-9]+ to [0-9]+ differ", "serve", "--format=raw", "--socket", filepath.Join(dir, "s"), c.base, c.store)
	c.run(statusWrongBase, "bytes [0-9]+ to [0-9]+ differ", "check", "--deep", c.store, c.base)
	c.run(statusWrongBase, "differ", "merge", "--format=raw", c.base, c.store)
	if now, err := os.ReadFile(c.base); err != nil || !bytes.Equal(now, after) {
		t.Errorf("the base was written by a refused command: %v", err)
	}
}

// TestBaseOneByte flips a byte in the middle and puts the time back: only a
// look at all of the base can find it.
func TestBaseOneByte(t *testing.T) {
	dir := t.TempDir()
	c := baseCase{t, filepath.Join(dir, "base"), filepath.Join(dir, "cow")}
	content := bytes.Repeat([]byte("content "), 9<<20/8)
	if err := os.WriteFile(c.base, content, 0o600); err != nil {
		t.Fatal(err)
	}
	c.run(0, "", "create", "--format=raw", c.base, c.store)
	c.run(0, "", "check", "--deep", "--format=raw", c.store, c.base)
	info, err := os.Stat(c.base)
	if err != nil {
		t.Fatal(err)
	}
	content[5<<20+12345] ^= 1
	change := func(mtime time.Time) {
		t.Helper()
		if err := os.WriteFile(c.base, content, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(c.base, mtime, mtime); err != nil {
			t.Fatal(err)
		}
	}
	change(info.ModTime())
	c.run(statusWrongBase, "bytes 4194304 to [0-9]+ differ", "check", "--deep", "--format=raw", c.store, c.base)
	change(time.Unix(1e9, 0))
	c.run(statusWrongBase, "bytes 4194304 to [0-9]+ differ", "check", "--format=raw", c.store, c.base)
	content[5<<20+12345] ^= 1
	change(time.Unix(1e9, 1)) // another time alone is accepted after a look at all
	c.run(0, "", "check", "--format=raw", c.store, c.base)
}
