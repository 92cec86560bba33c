package nbdserver_test

import (
	"slices"
	"sync"
	"sync/atomic"

	"github.com/cowdev/cowdev/block"
)

// memDevice is a device in memory. Its hooks make it slow, failing or cold.
type memDevice struct {
	mu     sync.RWMutex
	data   []byte
	state  []block.Extent // what Extents answers; nil: all FromBase
	cached []block.Extent // what Cache was asked for
	zeroed []block.ZeroFlags
	trims  int

	before   func(op string, off, n int64) error // called first by every method that does something
	cold     func(off, n int64) bool             // View refuses
	pieces   int                                 // bytes of a piece of View; 0: one piece
	readOnly bool
	blocking bool

	flushes  atomic.Int64
	sessions atomic.Int64 // open
	shown    atomic.Int64 // sessions that have not said Done
}

// newMemDevice returns a device in which every page differs from those near it.
func newMemDevice(size int64) *memDevice {
	var counting [4096 + 256]byte
	for i := range counting {
		counting[i] = byte(i)
	}
	d := &memDevice{data: make([]byte, size)}
	page := 0
	for p := range slices.Chunk(d.data, 4096) {
		copy(p, counting[byte(page*31):])
		page++
	}
	return d
}

func (d *memDevice) hook(op string, off, n int64) error {
	if d.before == nil {
		return nil
	}
	return d.before(op, off, n)
}

func (d *memDevice) Size() int64    { return int64(len(d.data)) }
func (d *memDevice) ReadOnly() bool { return d.readOnly }
func (d *memDevice) MayBlock() bool { return d.blocking }

func (d *memDevice) ReadAt(p []byte, off int64) (int, error) {
	if err := d.hook("read", off, int64(len(p))); err != nil {
		return 0, err
	}
	d.mu.RLock()
	defer d.mu.RUnlock()
	return copy(p, d.data[off:]), nil
}

func (d *memDevice) WriteAt(p []byte, off int64) (int, error) {
	if err := d.hook("write", off, int64(len(p))); err != nil {
		return 0, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return copy(d.data[off:off+int64(len(p))], p), nil
}

func (d *memDevice) zero(op string, off, n int64) error {
	if err := d.hook(op, off, n); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	clear(d.data[off : off+n])
	return nil
}

func (d *memDevice) WriteZeroes(off, n int64, flags block.ZeroFlags) error {
	if err := d.zero("zero", off, n); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.zeroed = append(d.zeroed, flags)
	return nil
}

func (d *memDevice) Trim(off, n int64) error {
	if err := d.zero("trim", off, n); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.trims++
	return nil
}

func (d *memDevice) Flush() error {
	err := d.hook("flush", 0, 0)
	d.flushes.Add(1)
	return err
}

func (d *memDevice) Prefetches() bool { return d.cold != nil }

func (d *memDevice) Cache(off, n int64) error {
	if err := d.hook("cache", off, n); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.cached = append(d.cached, block.Extent{Off: off, N: n})
	return nil
}

func (d *memDevice) Extents(off, n int64, limit int) ([]block.Extent, error) {
	if err := d.hook("extents", off, n); err != nil {
		return nil, err
	}
	all := d.state
	if all == nil {
		all = []block.Extent{{N: d.Size()}}
	}
	var found []block.Extent
	for _, e := range all {
		from, to := max(e.Off, off), min(e.End(), off+n)
		if from < to && len(found) < limit {
			e.Off, e.N = from, to-from
			found = append(found, e)
		}
	}
	return found, nil
}

func (d *memDevice) Session() block.Session {
	d.sessions.Add(1)
	return &memSession{d: d}
}

type memSession struct {
	d     *memDevice
	shown bool
}

func (s *memSession) View(vecs [][]byte, off, n int64) ([][]byte, bool) {
	if s.d.cold != nil && s.d.cold(off, n) {
		return vecs, false
	}
	if !s.shown {
		s.shown = true
		s.d.shown.Add(1)
	}
	p := s.d.data[off : off+n]
	if s.d.pieces == 0 {
		return append(vecs, p), true
	}
	return slices.AppendSeq(vecs, slices.Chunk(p, s.d.pieces)), true
}

func (s *memSession) Done() {
	if s.shown {
		s.shown = false
		s.d.shown.Add(-1)
	}
}

func (s *memSession) Close() { s.d.sessions.Add(-1) }

// plainDevice hides that a device has sessions.
type plainDevice struct{ block.Device }
