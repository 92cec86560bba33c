package merge

import (
	"bytes"
	"context"
	"fmt"
	"iter"
	"sync"
	"sync/atomic"

	"github.com/cowdev/cowdev/block"
	"github.com/cowdev/cowdev/exception"
	"github.com/cowdev/cowdev/internal/disk"
)

const (
	batchSize = 4 << 20  // bytes read from the store before they are written
	batchRuns = 64 << 10 // pieces of a batch, if they are small
	batches   = 3        // one being read, one being written, one between
	syncAhead = 16 << 20 // bytes written before the disk is set to work on them
)

// A run is a run of blocks of one chunk that are stored, or that are zero.
type run struct {
	state block.State
	chunk block.Chunk
	entry exception.Entry
	in    int   // bytes from the chunk's beginning
	off   int64 // bytes from the device's beginning
	n     int   // bytes
	first bool  // of its chunk
}

// runs yields every run of s in order of their offsets.
func runs(s *exception.Store) iter.Seq[run] {
	g := s.Geometry()
	bs := g.BlockSize()
	return func(yield func(run) bool) {
		for c, e := range s.Entries(0) {
			first := true
			for b := 0; b*bs < g.Len(c); {
				state, end := e.State(b), b+1
				for end < block.BlocksPerChunk && e.State(end) == state {
					end++
				}
				if state != block.FromBase {
					in := b * bs
					n := min(end*bs, g.Len(c)) - in
					if !yield(run{state, c, e, in, g.Offset(c) + int64(in), n, first}) {
						return
					}
					first = false
				}
				b = end
			}
		}
	}
}

// place returns where in the store's file the run lies, if all of it does in
// one piece.
func (r run) place(s *exception.Store) (at int64, whole bool) {
	if r.state != block.Stored {
		return 0, false
	}
	bs := s.Geometry().BlockSize()
	at, end := s.Locate(r.entry, r.in/bs)
	return at, end*bs >= r.in+r.n
}

// sharing says what is shared with the target rather than copied: stretches of
// at least so many bytes, since what was written here and there would lie in
// the base as it lay in the store; and in multiples of a filesystem's blocks.
var sharing = struct{ least, align int64 }{1 << 20, 4 << 10}

// maxStretch bounds the runs of a stretch.
const maxStretch = 1024

// A stretch is runs that lie one behind the other both on the device and in the
// store's file.
type stretch struct {
	runs       []run
	off, at, n int64
}

// precedes reports whether a run that lies at at in the file can be added.
func (st *stretch) precedes(r run, at int64) bool {
	return len(st.runs) < maxStretch && r.off == st.off+st.n && at == st.at+st.n
}

func (st *stretch) add(r run, at int64) {
	if len(st.runs) == 0 {
		st.off, st.at = r.off, at
	}
	st.runs = append(st.runs, r)
	st.n += int64(r.n)
}

func (st *stretch) clear() { *st = stretch{runs: st.runs[:0]} }

// A batch is a list of pieces to be written, with the bytes of all of them.
type batch struct {
	pieces []piece
	buf    []byte
	n      int
	shared int64 // bytes that need not be written any more
}

// A piece is a run of bytes for the target, or of zeros.
type piece struct {
	off  int64
	n    int64
	zero bool
}

// add adds a piece, to the last one where it follows it.
func (b *batch) add(p piece) {
	if k := len(b.pieces); k > 0 {
		if last := &b.pieces[k-1]; last.zero == p.zero && last.off+last.n == p.off {
			last.n += p.n
			return
		}
	}
	b.pieces = append(b.pieces, p)
}

// apply writes every exception of s into target: one goroutine reads, this one
// writes. What can be shared with sharer, which is target or nil, is.
func apply(ctx context.Context, target disk.File, sharer disk.Sharer, s *exception.Store, progress func(int64)) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	free, full := make(chan *batch, batches), make(chan *batch, batches)
	for range batches {
		free <- &batch{buf: make([]byte, batchSize)}
	}
	fd := feeder{s: s, free: free, full: full}
	if s.InFile() {
		fd.sharer = sharer
	}
	var readErr error // the feeder's, once full is closed
	go func() {
		defer close(full)
		readErr = fd.readAll(ctx)
	}()
	w := writer{target: target, progress: progress}
	defer w.syncing.Wait()
	var err error
	for b := range full {
		if err == nil {
			if err = w.write(b); err != nil {
				cancel()
			}
		}
		b.pieces, b.n, b.shared = b.pieces[:0], 0, 0
		free <- b
	}
	if err != nil {
		return err
	}
	return readErr
}

// A feeder fills batches with the exceptions of s. What it can, it shares with
// the target.
type feeder struct {
	s          *exception.Store
	b          *batch
	free, full chan *batch
	sharer     disk.Sharer // the target; nil where nothing can be shared
	stretch    stretch     // what may become one shared piece
}

// readAll reads every exception.
func (fd *feeder) readAll(ctx context.Context) error {
	fd.b = <-fd.free
	for r := range runs(fd.s) {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := fd.take(r); err != nil {
			return err
		}
	}
	if err := fd.endStretch(); err != nil {
		return err
	}
	fd.full <- fd.b
	return nil
}

// take reads a run, or puts it off to be shared with others.
func (fd *feeder) take(r run) error {
	if fd.sharer == nil {
		return fd.read(r)
	}
	at, whole := r.place(fd.s)
	if !whole || !fd.stretch.precedes(r, at) {
		if err := fd.endStretch(); err != nil {
			return err
		}
	}
	if !whole || fd.sharer == nil {
		return fd.read(r)
	}
	fd.stretch.add(r, at)
	return nil
}

// endStretch shares the runs that were put off, or reads them.
func (fd *feeder) endStretch() error {
	st := &fd.stretch
	defer st.clear()
	if fd.sharer != nil && st.n >= sharing.least && (st.off|st.at|st.n)%sharing.align == 0 {
		if fd.s.ShareStored(fd.sharer, st.off, st.at, st.n) == nil {
			fd.b.shared += st.n
			fd.pass()
			return nil
		}
		fd.sharer = nil // what is wrong will be said by reading and writing it
	}
	for _, r := range st.runs {
		if err := fd.read(r); err != nil {
			return err
		}
	}
	return nil
}

// read adds a run to the batch, or to the next.
func (fd *feeder) read(r run) error {
	if fd.b.n+r.n > len(fd.b.buf) || len(fd.b.pieces) == batchRuns {
		fd.pass()
	}
	return fd.b.read(fd.s, r)
}

// pass hands the batch to the writer and begins another.
func (fd *feeder) pass() {
	fd.full <- fd.b
	fd.b = <-fd.free
}

// read adds a run to the batch.
func (b *batch) read(s *exception.Store, r run) error {
	p := piece{off: r.off, n: int64(r.n), zero: r.state == block.Zero}
	if !p.zero {
		buf := b.buf[b.n : b.n+r.n]
		if err := s.ReadStored(buf, r.chunk, r.entry, r.in); err != nil {
			return err
		}
		if p.zero = isZero(buf); !p.zero {
			b.n += r.n
		}
	}
	b.add(p)
	return nil
}

// isZero reports whether p is all zeros.
func isZero(p []byte) bool {
	return len(p) == 0 || p[0] == 0 && bytes.Equal(p[1:], p[:len(p)-1])
}

// A writer writes batches into a merge's target.
type writer struct {
	target   disk.File
	progress func(int64)
	done     int64 // bytes dealt with
	ahead    int64 // bytes written since the disk was last set to work

	syncing sync.WaitGroup
	busy    atomic.Bool // the disk is being set to work
}

// starter can set the disk to work on what was written, without waiting for it.
// With many small pieces that takes longer than to write them.
type starter interface{ StartSync() }

func (w *writer) write(b *batch) error {
	data := b.buf
	w.done += b.shared
	for _, p := range b.pieces {
		if p.zero {
			if err := w.zero(p); err != nil {
				return err
			}
		} else {
			if _, err := w.target.WriteAt(data[:p.n], p.off); err != nil {
				return fmt.Errorf("merge %d bytes at %d: %w", p.n, p.off, err)
			}
			data = data[p.n:]
			w.ahead += p.n
		}
		w.done += p.n
	}
	if st, ok := w.target.(starter); ok && w.ahead >= syncAhead && w.busy.CompareAndSwap(false, true) {
		w.ahead = 0
		w.syncing.Go(func() {
			st.StartSync()
			w.busy.Store(false)
		})
	}
	if w.progress != nil {
		w.progress(w.done)
	}
	return nil
}

// zero makes a hole, but where there is one already.
func (w *writer) zero(p piece) error {
	end := p.off + p.n
	data, err := w.target.NextData(p.off)
	if err == nil && data < end {
		err = w.target.PunchHole(p.off, p.n)
	}
	if err != nil {
		return fmt.Errorf("merge %d zeros at %d: %w", p.n, p.off, err)
	}
	return nil
}
