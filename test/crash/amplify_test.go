package crash

import (
	"testing"

	"github.com/cowdev/cowdev/block"
	"github.com/cowdev/cowdev/internal/crash"
)

// TestOverwritesWriteThemselves: of short overwrites that come together, in
// data that was written in large pieces, little more than themselves is
// written to the disk.
func TestOverwritesWriteThemselves(t *testing.T) {
	const together, apart = 32, 64 << 10
	c := newFullCaseOn(t, newSmallDisk(t, 256<<20))
	for off := int64(0); off < 32<<20; off += 1 << 20 {
		c.mustWrite(off, 1<<20)
	}
	c.mustFlush()
	before := c.written()
	n := int64(0)
	for off := int64(0); off < 32<<20; off += together * apart {
		batch := make([]block.Write, together)
		c.stamp++
		for i := range batch {
			at := off + int64(i)*apart
			p := c.content[at:][:blockSize]
			crash.Stamp(p, at, c.stamp)
			batch[i] = block.Write{Data: p, Off: at}
			n += blockSize
		}
		c.dev.WriteBatch(batch)
		for _, w := range batch {
			if w.Err != nil {
				t.Fatalf("overwrite at %d: %v", w.Off, w.Err)
			}
		}
	}
	c.mustFlush()
	written := c.written() - before
	t.Logf("%.2f bytes written for each of %d", float64(written)/float64(n), n)
	if written > 3*n {
		t.Errorf("%d bytes written for %d, expected about as many", written, n)
	}
	c.compare(0, 0)
	if err := c.server.close(); err != nil {
		t.Fatal(err)
	}
}
