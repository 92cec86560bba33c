package crash

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"syscall"

	"github.com/cowdev/cowdev/block"
	"github.com/cowdev/cowdev/internal/disktest"
)

// A client works on the device of a session until it is over.
type client struct {
	w   *world
	id  int
	dev block.Device
	rng *rand.Rand
}

func (c *client) run() {
	steps := 1 + c.rng.IntN(c.w.cfg.Steps)
	if c.w.decided() {
		steps = c.w.cfg.Steps
	}
	for range steps {
		if c.w.over() {
			return
		}
		c.one()
	}
}

// over reports whether the session is dead, or a violation was found.
func (w *world) over() (over bool) {
	w.oracle.While(func() { over = w.dead != nil || w.failed != nil })
	return over
}

// one does one thing.
func (c *client) one() {
	switch k := c.rng.IntN(100); {
	case k < 30:
		c.change("write", c.write)
	case k < 40:
		c.batch()
	case k < 50:
		c.change("trim", c.trim)
	case k < 56: // a slot is given up
		cs := int64(c.w.geo.ChunkSize)
		off := c.rng.Int64N(c.w.geo.Chunks()) * cs
		c.changeAt("trim", c.trim, off, min(cs, c.w.geo.Size-off))
	case k < 64:
		c.change("zero", c.zero)
	case k < 69: // with FUA: the server's write and flush
		c.change("write", c.write)
		c.flush()
	case k < 81:
		c.flush()
	default:
		c.read()
	}
}

// place chooses a range: often few blocks in one chunk, sometimes across
// chunks, sometimes not on a sector's beginning.
func (c *client) place() (off, n int64) {
	size, bs, cs := c.w.geo.Size, int64(c.w.geo.BlockSize()), int64(c.w.geo.ChunkSize)
	chunk := c.rng.Int64N(c.w.geo.Chunks()) * cs
	switch c.rng.IntN(8) {
	case 0: // any bytes
		off = c.rng.Int64N(size)
		n = 1 + c.rng.Int64N(3*bs)
	case 1: // a whole chunk, or two
		off = chunk
		n = cs * (1 + c.rng.Int64N(2))
	case 2: // across the end of a chunk
		off = chunk - bs*c.rng.Int64N(4)
		n = bs * (1 + c.rng.Int64N(8))
	default: // few blocks of a chunk, near its beginning so that they meet
		off = chunk + bs*c.rng.Int64N(5)
		n = bs * (1 + c.rng.Int64N(4))
	}
	off = min(max(off, 0), size-1)
	return off, min(n, size-off)
}

// change does one change of the device somewhere.
func (c *client) change(what string, do func(p []byte, off int64) error) {
	off, n := c.place()
	c.changeAt(what, do, off, n)
}

// changeAt does one change with what the oracle must know of it.
func (c *client) changeAt(what string, do func(p []byte, off int64) error, off, n int64) {
	p, off, ch := c.begin(what, off, n)
	if ch == nil {
		return
	}
	c.end(what, p, off, ch, do(p, off))
}

// batch does several writes at once, of which some may overlap.
func (c *client) batch() {
	var writes []block.Write
	var changes []*Change
	for range 2 + c.rng.IntN(5) {
		off, n := c.place()
		if p, off, ch := c.begin("write", off, n); ch != nil {
			writes, changes = append(writes, block.Write{Data: p, Off: off}), append(changes, ch)
		}
	}
	c.dev.(block.BatchWriter).WriteBatch(writes)
	for i, w := range writes {
		c.end("write", w.Data, w.Off, changes[i], w.Err)
	}
}

// begin tells the oracle of a change that begins, and returns what is to be
// written where; no change if the oracle cannot follow it.
func (c *client) begin(what string, off, n int64) (p []byte, at int64, ch *Change) {
	w := c.w
	p = make([]byte, n)
	if what == "write" && c.rng.IntN(16) > 0 {
		Stamp(p, off, w.nextStamp())
	}
	ch, ok := w.oracle.Write(p, off)
	if !ok { // what surrounds it is not certain: whole sectors then
		end := min(w.geo.Size, (off+n+sectorSize-1)/sectorSize*sectorSize)
		off = off / sectorSize * sectorSize
		p = make([]byte, end-off)
		if what == "write" {
			Stamp(p, off, w.nextStamp())
		}
		if ch, ok = w.oracle.Write(p, off); !ok {
			return nil, 0, nil
		}
	}
	w.note("%d: %s %d+%d %s", c.id, what, off, len(p), Describe(p[:min(len(p), sectorSize)]))
	return p, off, ch
}

// end tells the oracle how a change went.
func (c *client) end(what string, p []byte, off int64, ch *Change, err error) {
	w := c.w
	ch.Done(err)
	w.note("%d: %s %d+%d -> %v", c.id, what, off, len(p), err)
	w.oracle.While(func() {
		switch what {
		case "write":
			w.stats.Writes++
		case "trim":
			w.stats.Trims++
		default:
			w.stats.Zeroes++
		}
		w.began = w.began || err == nil
		w.violated(w.unexpected(err))
	})
	if err != nil && w.cfg.Clients == 1 && !w.over() {
		c.settle(off, int64(len(p)))
	}
}

func (c *client) write(p []byte, off int64) error {
	_, err := c.dev.WriteAt(p, off)
	return err
}

func (c *client) trim(p []byte, off int64) error { return c.dev.Trim(off, int64(len(p))) }

func (c *client) zero(p []byte, off int64) error {
	flags := []block.ZeroFlags{0, block.NoHole, block.FastZero}[c.rng.IntN(3)]
	return c.dev.WriteZeroes(off, int64(len(p)), flags)
}

func (w *world) nextStamp() uint64 {
	w.traceMu.Lock()
	defer w.traceMu.Unlock()
	w.stamp++
	return w.stamp
}

// settle looks at what a change that failed has made of its range.
func (c *client) settle(off, n int64) {
	end := min(c.w.geo.Size, (off+n+sectorSize-1)/sectorSize*sectorSize)
	off = off / sectorSize * sectorSize
	if p := c.readAt(off, end-off); p != nil {
		c.w.oracle.Observe(p, off)
	}
}

func (c *client) read() {
	off, n := c.place()
	end := min(c.w.geo.Size, (off+n+sectorSize-1)/sectorSize*sectorSize)
	off = off / sectorSize * sectorSize
	c.readAt(off, end-off)
}

// readAt reads whole sectors and checks them. It returns nil if it could not.
func (c *client) readAt(off, n int64) []byte {
	w := c.w
	p := make([]byte, n)
	r := w.oracle.Reading()
	_, err := c.dev.ReadAt(p, off)
	if err != nil {
		p = nil
	}
	wrong := r.Done(p, off)
	w.oracle.While(func() {
		w.stats.Reads++
		w.violated(w.unexpected(err))
		if w.dead == nil && wrong != nil {
			w.violated(fmt.Errorf("client %d reads %d+%d: %w", c.id, off, n, wrong))
		}
	})
	return p
}

func (c *client) flush() {
	w := c.w
	w.note("%d: flush", c.id)
	f := w.oracle.Flush()
	err := c.dev.Flush()
	f.Done(err)
	w.note("%d: flush -> %v", c.id, err)
	w.oracle.While(func() {
		w.stats.Flushes++
		w.began = w.began || err == nil
		w.violated(w.unexpected(err))
	})
}

// unexpected returns an error if nothing that was done to the session explains
// err. It is called inside While.
func (w *world) unexpected(err error) error {
	switch {
	case err == nil || w.dead != nil:
		return nil
	case errors.Is(err, syscall.ENOSPC) && w.full:
		return nil
	case errors.Is(err, syscall.EIO) && w.faulted:
		return nil
	}
	return fmt.Errorf("an error that nothing explains: %w", err)
}

// inject makes one operation of the session fail, if it was planned.
func (w *world) inject(op disktest.Op) (fault disktest.Fault) {
	w.oracle.While(func() {
		if w.fault--; w.fault != 0 {
			return
		}
		w.stats.Faults++
		w.faulted = true
		fault = disktest.Fault{Err: syscall.EIO}
		if op.Len > 0 && w.rng.IntN(2) == 0 {
			end := op.Off + w.rng.Int64N(op.Len+1)
			if end < op.Off+op.Len {
				end = end / sectorSize * sectorSize
			}
			fault.Done = max(0, end-op.Off)
		}
		if op.Kind == disktest.Sync || op.Kind == disktest.WriteSync {
			w.broken = true
			w.stats.Broken++
		}
		w.note("  fault in %v after %d bytes", op, fault.Done)
	})
	return fault
}
