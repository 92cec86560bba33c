package cow

import (
	"bytes"
	"errors"
	"fmt"
	"syscall"
	"time"

	"github.com/cowdev/cowdev/block"
	"github.com/cowdev/cowdev/exception"
)

// WriteAt implements block.Device.
func (d *Device) WriteAt(p []byte, off int64) (int, error) { return d.writeAt(p, off, d.opts.Park) }

// writeAt is WriteAt that waits for room as long as park says.
func (d *Device) writeAt(p []byte, off int64, park time.Duration) (int, error) {
	if err := d.mayChange(off, int64(len(p))); err != nil {
		return 0, err
	}
	for pos := int64(0); pos < int64(len(p)); {
		s := d.SpanAt(off+pos, int64(len(p))-pos, pos)
		part := p[pos : pos+int64(s.N)]
		err := d.writeSpan(s.Chunk, s.Off, part, !d.opts.KeepZeroes)
		for full := (waiter{d: d, park: park}); err != nil && full.again(err); {
			err = d.writeSpan(s.Chunk, s.Off, part, !d.opts.KeepZeroes)
		}
		if err != nil {
			return int(pos), err
		}
		if d.full.Load() {
			d.roomAgain()
		}
		pos += int64(s.N)
	}
	return len(p), nil
}

// WriteBatch implements block.BatchWriter. Whole blocks that go to chunks which
// nobody else is changing are gathered; all else is done by WriteAt.
func (d *Device) WriteBatch(w []block.Write) {
	g := d.gatherers.Get().(*gatherer)
	defer d.gatherers.Put(g)
	for i := range w {
		if d.gather(g, &w[i]) {
			continue
		}
		d.writeGathered(g)
		if !d.gather(g, &w[i]) {
			d.writeAlone(&w[i])
		}
	}
	d.writeGathered(g)
}

// A gatherer is a batch of the store, and the writes that it has put off.
type gatherer struct {
	batch  *exception.Batch
	putOff []*block.Write
}

// gather adds w to the batch, if it can be.
func (d *Device) gather(g *gatherer, w *block.Write) bool {
	n := len(w.Data)
	if n == 0 || d.full.Load() || d.mayChange(w.Off, int64(n)) != nil {
		return false
	}
	s := d.SpanAt(w.Off, int64(n), 0)
	if s.N < n {
		return false
	}
	if _, filled := d.Cover(s.Chunk, s.Off, n); !d.opts.KeepZeroes && d.zeroBlocks(s.Off, w.Data, filled) != 0 {
		return false
	}
	added, putOff := g.batch.Add(s.Chunk, s.Off, w.Data)
	if putOff {
		g.putOff = append(g.putOff, w)
	}
	return added
}

// writeGathered does what the batch has put off, and one by one what it fails
// to do.
func (d *Device) writeGathered(g *gatherer) {
	if done, err := g.batch.Write(); err != nil {
		for _, w := range g.putOff[done:] {
			d.writeAlone(w)
		}
	}
	clear(g.putOff)
	g.putOff = g.putOff[:0]
}

// writeAlone does w, unless it would have to wait for room.
func (d *Device) writeAlone(w *block.Write) {
	if d.MayBlock() {
		w.Err = block.ErrAlone
		return
	}
	_, w.Err = d.writeAt(w.Data, w.Off, 0)
	if d.Parks() && errors.Is(w.Err, exception.ErrFull) {
		w.Err = block.ErrAlone
	}
}

// roomAgain ends the device counting as full, once the store has grown since.
func (d *Device) roomAgain() {
	if d.store.Grown() != d.fullAt.Load() && d.full.Swap(false) {
		d.opts.Log("a write found room in the store again")
	}
}

func (d *Device) mayChange(off, n int64) error {
	if d.ReadOnly() {
		return exception.ErrReadOnly
	}
	return d.check(off, n)
}

// writeSpan writes p at off of chunk c, with blocks of zeros recorded rather
// than stored if zeroes is set.
func (d *Device) writeSpan(c block.Chunk, off int, p []byte, zeroes bool) error {
	d.store.Claim(c)
	defer d.store.Release(c)
	touched, filled := d.Cover(c, off, len(p))
	if lacking := touched &^ filled &^ d.store.Entry(c).Stored(); lacking != 0 {
		buf := d.buffers.Get().(*[]byte)
		defer d.buffers.Put(buf)
		var err error
		if off, p, err = d.copyUp(*buf, c, off, p, touched, filled); err != nil {
			return err
		}
		filled = touched
	}
	var zero block.Mask
	if zeroes {
		zero = d.zeroBlocks(off, p, filled)
	}
	if zero == 0 {
		return d.store.Put(c, off, p)
	}
	if rest := touched &^ zero; rest != 0 {
		if err := d.putBlocks(c, off, p, rest); err != nil {
			return err
		}
	}
	return d.store.Zero(c, zero)
}

// putBlocks writes those blocks of p, which lies at off of chunk c, that are in
// m.
func (d *Device) putBlocks(c block.Chunk, off int, p []byte, m block.Mask) error {
	bs := d.BlockSize()
	for b := 0; b < block.BlocksPerChunk; {
		end, set := m.Run(b)
		if set {
			from, to := max(b*bs, off), min(end*bs, off+len(p))
			if err := d.store.Put(c, from, p[from-off:to-off]); err != nil {
				return err
			}
		}
		b = end
	}
	return nil
}

// copyUp fills buf with the blocks that p touches, whole: p, and round it what
// is there now. It returns where they begin in the chunk, and the bytes. The
// caller holds the claim.
func (d *Device) copyUp(buf []byte, c block.Chunk, off int, p []byte, touched, filled block.Mask) (int, []byte, error) {
	bs := d.BlockSize()
	first := off / bs * bs
	end := min((off+len(p)+bs-1)/bs*bs, d.Len(c))
	buf = buf[:end-first]
	for b := first / bs; b*bs < end; b++ {
		if !(touched &^ filled).Has(b) {
			continue
		}
		to := min((b+1)*bs, end)
		w := walker{d: d, off: d.Offset(c) + int64(b*bs), end: d.Offset(c) + int64(to)}
		r, _ := w.one() // a block is in one state
		if err := d.readPiece(buf[b*bs-first:to-first], r); err != nil {
			return 0, nil, fmt.Errorf("copy up chunk %d: %w", c, err)
		}
	}
	copy(buf[off-first:], p)
	return first, buf, nil
}

// zeroBlocks returns those blocks of m, all of which p (at off of a chunk)
// covers, that p makes zero.
func (d *Device) zeroBlocks(off int, p []byte, m block.Mask) block.Mask {
	bs := d.BlockSize()
	var zero block.Mask
	for b := off / bs; b < block.BlocksPerChunk && b*bs < off+len(p); b++ {
		if !m.Has(b) {
			continue
		}
		q := p[b*bs-off : min((b+1)*bs-off, len(p))]
		if q[0] == 0 && bytes.Equal(q, d.zeros[:len(q)]) {
			zero |= 1 << b
		}
	}
	return zero
}

// Trim implements block.Device.
func (d *Device) Trim(off, n int64) error { return d.zero(off, n, false) }

// WriteZeroes implements block.Device. Without NoHole it is always fast.
func (d *Device) WriteZeroes(off, n int64, flags block.ZeroFlags) error {
	if flags&block.NoHole != 0 && flags&block.FastZero != 0 {
		return fmt.Errorf("zeros that keep their space are as slow as a write: %w", syscall.ENOTSUP)
	}
	return d.zero(off, n, flags&block.NoHole != 0)
}

func (d *Device) zero(off, n int64, store bool) error {
	if err := d.mayChange(off, n); err != nil {
		return err
	}
	for pos := int64(0); pos < n; {
		s := d.SpanAt(off+pos, n-pos, pos)
		err := d.zeroSpan(s, store)
		for full := (waiter{d: d, park: d.opts.Park}); err != nil && full.again(err); {
			err = d.zeroSpan(s, store)
		}
		if err != nil {
			return err
		}
		pos += int64(s.N)
	}
	return nil
}

// zeroSpan makes a span zero: stored as such, or recorded, where blocks that
// it covers in part are written.
func (d *Device) zeroSpan(s block.Span, store bool) error {
	if store {
		return d.writeSpan(s.Chunk, s.Off, d.zeros[:s.N], false)
	}
	touched, filled := d.Cover(s.Chunk, s.Off, s.N)
	if filled == touched {
		return d.zeroBlocksOf(s.Chunk, filled)
	}
	bs := d.BlockSize()
	for off := s.Off; off < s.Off+s.N; {
		end := min((off/bs+1)*bs, s.Off+s.N)
		if filled.Has(off / bs) {
			stop, _ := filled.Run(off / bs)
			end = min(stop*bs, s.Off+s.N)
			if err := d.zeroBlocksOf(s.Chunk, filled&block.Bits(off/bs, stop-off/bs)); err != nil {
				return err
			}
		} else if err := d.writeSpan(s.Chunk, off, d.zeros[:end-off], true); err != nil {
			return err
		}
		off = end
	}
	return nil
}

func (d *Device) zeroBlocksOf(c block.Chunk, m block.Mask) error {
	d.store.Claim(c)
	defer d.store.Release(c)
	return d.store.Zero(c, m)
}

// waiter is one change's patience with a full store. It holds nothing (R23).
type waiter struct {
	d         *Device
	park      time.Duration // as Options.Park
	harvested bool
	parked    bool
	until     time.Time
}

// parkPoll is how often a parked write looks for room.
const parkPoll = 50 * time.Millisecond

// again waits as far as it may, and reports whether the change that failed
// with err should be tried again.
func (w *waiter) again(err error) bool {
	d := w.d
	if !errors.Is(err, exception.ErrFull) {
		return false
	}
	if !w.harvested {
		// What was given up comes back with a commit.
		w.harvested = true
		d.fullAt.Store(d.store.Grown())
		if !d.full.Swap(true) {
			d.opts.Log("%v; %s", err, d.policy())
		}
		if err := d.store.Flush(); !errors.Is(err, exception.ErrFull) {
			return err == nil
		} // else there is no room to begin the session, for which it may wait
	}
	if w.park == 0 {
		return false
	}
	if !w.parked {
		w.parked = true
		w.until = time.Now().Add(w.park)
	}
	if w.park > 0 && time.Now().After(w.until) {
		return false
	}
	d.parked.Add(1)
	defer d.parked.Add(-1)
	select {
	case <-time.After(parkPoll):
		d.store.Flush()
		return true
	case <-d.closing:
		return false
	}
}

func (d *Device) policy() string {
	if d.opts.Park == 0 {
		return "writes that need room are answered ENOSPC until there is some"
	}
	return "writes that need room wait for it, reads go on"
}
