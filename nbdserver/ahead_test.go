package nbdserver_test

import (
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/cowdev/cowdev/internal/nbd"
	"github.com/cowdev/cowdev/internal/nbdclient"
)

// A client that flushes after each change has the device flushed before it asks
// for that, from the fifth time on. Not one that does so now and then, nor one
// beside another that flushes.
func TestFlushAhead(t *testing.T) {
	var fail atomic.Bool
	dev := newMemDevice(testSize)
	dev.before = func(op string, _, _ int64) error {
		if op == "flush" && fail.Load() {
			return syscall.EIO
		}
		return nil
	}
	r := serveDevice(t, dev)
	c, other := r.dial(structured), r.dial(structured)

	// change makes n changes, and reports whether the device was flushed by the
	// time the next request was served.
	change := func(n int) bool {
		t.Helper()
		before := dev.flushes.Load()
		for range n {
			expectError(t, c, 0, req{Type: nbd.CmdWrite, Payload: make([]byte, 4096)})
		}
		expectError(t, c, 0, req{Type: nbd.CmdRead, Length: 4096})
		return dev.flushes.Load() > before
	}
	flush := func(c *nbdclient.Client, want uint32) {
		t.Helper()
		before := dev.flushes.Load()
		expectError(t, c, want, req{Type: nbd.CmdFlush})
		if asked := dev.flushes.Load() > before; asked != (want == 0) {
			t.Errorf("a FLUSH answered with error %d, asked of the device: %v", want, asked)
		}
	}
	rounds := func(n, changes, from int) {
		t.Helper()
		for i := range n {
			if got := change(changes); got != (i >= from) {
				t.Errorf("round %d of %d changes, one that ends in a flush ahead from round %d on: %v", i, changes, from, got)
			}
			flush(c, 0)
		}
	}
	rounds(7, 1, 4)

	// What it met is told to the client's FLUSH, and only once.
	fail.Store(true)
	change(1)
	fail.Store(false)
	flush(c, nbd.EIO)
	flush(c, 0)

	rounds(7, 3, 4)
	change(3)
	rounds(3, 1, 3)  // after a change more than were expected
	rounds(9, 3, 8)  // it takes eight
	rounds(10, 2, 7) // and one less for each that was right
	flush(other, 0)
	flush(c, 0)
	for range 20 {
		if change(2) {
			t.Error("a flush ahead where another client flushes too")
		}
		flush(c, 0)
		flush(other, 0)
	}
}
