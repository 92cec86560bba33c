package crash

// Merges on filesystems whose files can have blocks in common.

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// TestMergeShares: what was written in large pieces is not written again by a
// merge where the filesystem knows reflinks.
func TestMergeShares(t *testing.T) {
	for mkfs, size := range map[string]int64{"mkfs.xfs": 320 << 20, "mkfs.btrfs": 256 << 20} {
		t.Run(mkfs, func(t *testing.T) {
			dir := newDisk(t, size, mkfs, "-q", "-f")
			c := &fullCase{t: t, dir: dir, known: newKnown(64 << 20)}
			c.base, c.store = filepath.Join(shortDir(t), "base"), filepath.Join(dir, "cow")
			if err := os.WriteFile(filepath.Join(dir, "base"), c.content, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink(filepath.Join(dir, "base"), c.base); err != nil {
				t.Fatal(err)
			}
			c.start()
			for off := int64(8 << 20); off < 40<<20; off += 1 << 20 {
				c.mustWrite(off, 1<<20)
			}
			for off := int64(48 << 20); off < 56<<20; off += 1 << 20 {
				c.mustWrite(off+blockSize, blockSize)
			}
			if err := c.server.close(); err != nil {
				t.Fatal(err)
			}
			before := c.written()
			if out, err := command(patience, program, "merge", "--quiet", "--format=raw", "--base-digest=sample", c.base, c.store); err != nil {
				t.Fatalf("merge: %v\n%s", err, out)
			}
			written := c.written() - before
			t.Logf("%d KiB written to the disk", written>>10)
			if written > 16<<20 {
				t.Errorf("the merge wrote %d bytes, expected less than half of 32 MiB", written)
			}
			got, err := os.ReadFile(c.base)
			if err != nil {
				t.Fatal(err)
			}
			if at := differs(got, c.content); at >= 0 {
				t.Fatalf("sector %d reads as %s, was written as %s", at, describe(got, at), describe(c.content, at))
			}
			c.check()
		})
	}
}

// written returns the bytes that were ever written to the disk of the case's
// filesystem, of which nothing is left to be written.
func (c *fullCase) written() int64 {
	c.t.Helper()
	if out, err := command(patience, "sync", "-f", c.dir); err != nil {
		c.t.Fatalf("sync: %v\n%s", err, out)
	}
	source, err := command(patience, "findmnt", "-n", "-o", "SOURCE", c.dir)
	if err != nil {
		c.t.Fatalf("findmnt: %v\n%s", err, source)
	}
	stat, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(strings.TrimSpace(source)), "stat"))
	if err != nil {
		c.t.Fatal(err)
	}
	const sectorsWritten = 6 // Documentation/block/stat.rst
	n, err := strconv.ParseInt(strings.Fields(string(stat))[sectorsWritten], 10, 64)
	if err != nil {
		c.t.Fatal(err)
	}
	return n * 512
}
