package crash

// Merges on filesystems whose files can have blocks in common.

import "testing"

// TestMergeShares: what was written in large pieces is not written again by a
// merge where the filesystem knows reflinks.
func TestMergeShares(t *testing.T) {
	for mkfs, size := range map[string]int64{"mkfs.xfs": 320 << 20, "mkfs.btrfs": 256 << 20} {
		t.Run(mkfs, func(t *testing.T) {
			c := newFullCaseOn(t, newDisk(t, size, mkfs, "-q", "-f"))
			for off := int64(8 << 20); off < 40<<20; off += 1 << 20 {
				c.mustWrite(off, 1<<20)
			}
			for off := int64(48 << 20); off < 56<<20; off += 1 << 20 {
				c.mustWrite(off+blockSize, blockSize)
			}
			if err := c.server.close(); err != nil {
				t.Fatal(err)
			}
			c.bringBase()
			before := c.written()
			if out, err := c.merge(); err != nil {
				t.Fatalf("merge: %v\n%s", err, out)
			}
			written := c.written() - before
			t.Logf("%d KiB written to the disk", written>>10)
			if written > 16<<20 {
				t.Errorf("the merge wrote %d bytes, expected less than half of 32 MiB", written)
			}
			c.checkMerged()
		})
	}
}
