package cow

import (
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/cowdev/cowdev/block"
	"github.com/cowdev/cowdev/exception"
	"github.com/cowdev/cowdev/internal/disk"
)

// An Origin is where bytes come from that have no exception. It may also be a
// viewer, an extenter and a prefetcher.
type Origin interface{ block.Reader }

// viewer hands out the memory that bytes lie in, see block.Session.
type viewer interface {
	View(vecs [][]byte, off, n int64) ([][]byte, bool)
}

// extenter knows its holes.
type extenter interface {
	Extents(off, n int64, limit int) ([]block.Extent, error)
}

// prefetcher can be told what will be read.
type prefetcher interface {
	Prefetch(off, n int64) error
}

// Options are how a device behaves.
type Options struct {
	// ReadOnly refuses every change.
	ReadOnly bool

	// KeepZeroes stores blocks of zeros like any others.
	KeepZeroes bool

	// Park is how long a write waits for room in a full store before it is
	// answered ENOSPC; 0 not at all, negative for ever.
	Park time.Duration

	// View maps the store's file, for sessions; nil where it cannot be
	// mapped. The device closes it.
	View *disk.Mapping

	// Log is told what an operator should know; it may be nil.
	Log func(format string, args ...any)
}

// A Device is an origin with an exception store over it: a block.Device and a
// block.Sessioner.
type Device struct {
	block.Geometry
	origin    Origin
	view      viewer
	extents   extenter
	prefetch  prefetcher
	store     *exception.Store
	opts      Options
	zeros     []byte // a chunk of them
	buffers   sync.Pool
	gatherers sync.Pool

	parked  atomic.Int64  // writes that wait for room
	full    atomic.Bool   // the last change that needed room found none
	fullAt  atomic.Uint64 // how far the store had grown by then
	closing chan struct{}
	once    sync.Once
}

// New returns the device of s over origin, which is at least as large as the
// store's device. The device owns neither.
func New(origin Origin, s *exception.Store, o Options) *Device {
	d := &Device{Geometry: s.Geometry(), origin: origin, store: s, opts: o, closing: make(chan struct{})}
	d.view, _ = origin.(viewer)
	d.extents, _ = origin.(extenter)
	d.prefetch, _ = origin.(prefetcher)
	d.zeros = make([]byte, d.ChunkSize)
	d.buffers.New = func() any {
		b := make([]byte, d.ChunkSize)
		return &b
	}
	d.gatherers.New = func() any { return &gatherer{batch: s.NewBatch()} }
	if d.opts.Log == nil {
		d.opts.Log = func(string, ...any) {}
	}
	return d
}

// Store returns the exception store.
func (d *Device) Store() *exception.Store { return d.store }

// Size returns the device's size in bytes.
func (d *Device) Size() int64 { return d.Geometry.Size }

// ReadOnly reports whether every change is refused.
func (d *Device) ReadOnly() bool { return d.opts.ReadOnly || d.store.ReadOnly() }

// Full reports whether the last change that needed room found none.
func (d *Device) Full() bool { return d.full.Load() }

// Parked returns the number of writes that wait for room.
func (d *Device) Parked() int { return int(d.parked.Load()) }

// Parks reports whether a change may come to wait for room. WriteBatch leaves
// one that would.
func (d *Device) Parks() bool { return d.opts.Park != 0 }

// MayBlock reports whether a change may wait longer than the disk needs.
func (d *Device) MayBlock() bool { return d.Parks() && d.full.Load() }

// Release lets the writes that wait for room go, with ENOSPC. New ones do not
// wait.
func (d *Device) Release() { d.once.Do(func() { close(d.closing) }) }

// Close ends the device: nobody uses it, nor a session of it, any more. The
// store and the origin stay open.
func (d *Device) Close() error {
	d.Release()
	if d.opts.View != nil {
		return d.opts.View.Close()
	}
	return nil
}

// Flush returns when every change that was acknowledged before is durable (3).
func (d *Device) Flush() error { return d.store.Flush() }

// Cache sets the disks to work on what would be read.
func (d *Device) Cache(off, n int64) error {
	if err := d.check(off, n); err != nil {
		return err
	}
	w := walker{d: d, off: off, end: off + n}
	for p, ok := w.next(); ok; p, ok = w.next() {
		var err error
		switch {
		case p.state == block.FromBase && d.prefetch != nil:
			err = d.prefetch.Prefetch(p.off, p.n)
		case p.state == block.Stored && d.opts.View != nil:
			// The slot may have been given up since; then this is in vain.
			err = d.opts.View.Prefetch(p.at, p.n)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// Prefetches reports whether Cache sets a disk to work on what lies in the origin.
func (d *Device) Prefetches() bool { return d.prefetch != nil }

func (d *Device) check(off, n int64) error {
	if !d.Contains(off, n) {
		return fmt.Errorf("%d bytes at %d of a device of %d: %w", n, off, d.Geometry.Size, syscall.EINVAL)
	}
	return nil
}

// ReadAt follows io.ReaderAt.
func (d *Device) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, d.check(off, 0)
	}
	if off >= d.Geometry.Size && len(p) > 0 {
		return 0, io.EOF
	}
	want := p[:min(int64(len(p)), d.Geometry.Size-off)]
	if n, err := d.read(want, off); err != nil {
		return n, err
	}
	if len(want) < len(p) {
		return len(want), io.EOF
	}
	return len(p), nil
}

func (d *Device) read(p []byte, off int64) (int, error) {
	pin := d.store.Pin()
	defer pin.Close()
	pin.Enter()
	done := 0
	w := walker{d: d, off: off, end: off + int64(len(p))}
	for r, ok := w.next(); ok; r, ok = w.next() {
		if err := d.readPiece(p[done:done+int(r.n)], r); err != nil {
			return done, err
		}
		done += int(r.n)
	}
	return done, nil
}

// readPiece fills p with the piece's bytes.
func (d *Device) readPiece(p []byte, r piece) error {
	switch r.state {
	case block.Zero:
		clear(p)
	case block.Stored:
		if err := d.store.ReadStored(p, r.chunk, r.entry, r.in); err != nil {
			return err
		}
		if d.opts.View != nil && d.store.InFile() {
			d.opts.View.Prove(r.at, r.n)
		}
	default:
		n, err := d.origin.ReadAt(p, r.off)
		if n < len(p) {
			if err == nil || err == io.EOF {
				err = fmt.Errorf("the origin ends at %d: %w", r.off+int64(n), syscall.EIO)
			}
			return fmt.Errorf("read the origin at %d: %w", r.off, err)
		}
	}
	return nil
}

// A piece is a run of bytes in one place. A stored one lies in one chunk.
type piece struct {
	state  block.State
	off, n int64
	chunk  block.Chunk
	entry  exception.Entry
	in     int   // bytes from the chunk's beginning
	at     int64 // where stored bytes lie in the store's file
}

// A walker cuts a range into pieces, and loads each chunk's entry once for
// every piece of it.
type walker struct {
	d        *Device
	off, end int64
	ahead    piece
	has      bool
}

// next returns the next piece, or false at the end.
func (w *walker) next() (piece, bool) {
	p, ok := w.one()
	if !ok {
		return p, false
	}
	for p.state != block.Stored {
		q, ok := w.one()
		if !ok {
			break
		}
		if q.state != p.state {
			w.ahead, w.has = q, true
			break
		}
		p.n += q.n
	}
	return p, true
}

// one returns the next run of blocks of one chunk.
func (w *walker) one() (piece, bool) {
	if w.has {
		w.has = false
		return w.ahead, true
	}
	if w.off >= w.end {
		return piece{}, false
	}
	s := w.d.SpanAt(w.off, w.end-w.off, 0)
	e := w.d.store.Entry(s.Chunk)
	p := piece{off: w.off, n: int64(s.N), chunk: s.Chunk, entry: e, in: s.Off}
	if e != 0 {
		bs := w.d.BlockSize()
		b := s.Off / bs
		p.state = e.State(b)
		end := b + 1
		if p.state == block.Stored {
			p.at, end = w.d.store.Locate(e, b)
			p.at += int64(s.Off - b*bs)
		} else {
			for end < block.BlocksPerChunk && e.State(end) == p.state {
				end++
			}
		}
		p.n = min(p.n, int64(end*bs-s.Off))
	}
	w.off += p.n
	return p, true
}

// Extents implements block.Device.
func (d *Device) Extents(off, n int64, limit int) ([]block.Extent, error) {
	if err := d.check(off, n); err != nil {
		return nil, err
	}
	var out []block.Extent
	for end := off + n; off < end; {
		run := d.run(off, end)
		runs := []block.Extent{run}
		if run.State == block.FromBase && d.extents != nil {
			var err error
			if runs, err = d.extents.Extents(run.Off, run.N, limit-len(out)+1); err != nil {
				return nil, fmt.Errorf("extents of the origin at %d: %w", run.Off, err)
			}
		}
		for _, r := range runs {
			if k := len(out); k > 0 && out[k-1].State == r.State && out[k-1].Hole == r.Hole {
				out[k-1].N += r.N
			} else if k == limit {
				return out, nil
			} else {
				out = append(out, r)
			}
			off = r.End()
		}
	}
	return out, nil
}

// run returns the extent that begins at off and ends at end at the latest.
func (d *Device) run(off, end int64) block.Extent {
	w := walker{d: d, off: off, end: end}
	p, _ := w.one()
	if p.entry == 0 {
		// Nothing until the next chunk that has an entry.
		for c := range d.store.Entries(p.chunk) {
			end = min(end, max(d.Offset(c), off+p.n))
			break
		}
		return block.Extent{Off: off, N: end - off, State: block.FromBase}
	}
	return block.Extent{Off: p.off, N: p.n, State: p.state, Hole: p.state == block.Zero}
}
