package disktest

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"sync"
	"syscall"

	"github.com/cowdev/cowdev/internal/disk"
)

var _ disk.File = (*File)(nil)

// ErrClosed is returned by every method of a file after Close or Kill.
var ErrClosed = errors.New("disktest: file already closed")

// A File is a file in memory. Its methods may be called at once by several
// goroutines, as those of disk.File.
type File struct {
	// OnStep, when set, is called inside every operation at each of its
	// phases, with no lock held. Set it while no operation runs.
	OnStep func(Op, Phase)

	// OnFailed, when set, is called when a Sync has failed and not returned
	// yet, with no lock held. A process that dies there has been told of lost
	// data and can leave no word of it: none could do better.
	OnFailed func()

	// Inject, when set, is asked at the beginning of every operation what is
	// to go wrong; the zero Fault lets it succeed. Set it while no operation
	// runs.
	Inject func(Op) Fault

	mu       sync.Mutex
	seed     [2]uint64
	rng      *rand.Rand // of seed, decides what a failed sync leaves; nil until one does
	closed   bool
	view     pages // what ReadAt sees: the page cache
	size     int64
	durable  pages // what is there when nothing pending is
	durSize  int64
	pending  []change // in the order made
	lastSeq  uint64   // of the last change
	astray   bool     // view may differ from what is durable or pending
	lost     int      // times that a sync failed
	told     [2]int   // of them, those that were told by each way to sync
	ops      uint64   // operations begun
	maxPages int      // of view; 0 is no limit
	record   int      // operations kept; 0 none
	recorded []Op     // the last ones
}

// New returns an empty file. The seed decides only what failed syncs leave
// behind.
func New(seed uint64) *File {
	return &File{seed: [2]uint64{seed, 0}}
}

// FromBytes returns a file that holds a copy of p, all of it durable.
func FromBytes(seed uint64, p []byte) *File {
	f := New(seed)
	f.durable.put(f.durable.widen(p, 0))
	f.durSize = int64(len(p))
	f.revive()
	return f
}

// revive makes the view what the disk holds. f.mu is held, or f new.
func (f *File) revive() {
	f.view = f.durable.clone()
	f.size = f.durSize
	for i := range f.pending {
		f.pending[i].apply(&f.view, &f.size)
	}
}

// ReadAt follows io.ReaderAt.
func (f *File) ReadAt(p []byte, off int64) (int, error) {
	op, fault, err := f.begin(Read, off, int64(len(p)), nil)
	if err != nil {
		return 0, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	want := len(p)
	if fault.Err != nil {
		p = p[:min(int64(len(p)), fault.Done)]
	}
	n := int(max(0, min(int64(len(p)), f.size-off)))
	f.view.read(p[:n], off)
	switch {
	case fault.Err != nil:
		return n, fault.errorFor(op)
	case n < want:
		return n, io.EOF
	}
	return n, nil
}

// WriteAt writes all of p or returns an error and how much it wrote.
func (f *File) WriteAt(p []byte, off int64) (int, error) {
	op, fault, err := f.begin(Write, off, int64(len(p)), p)
	if err != nil {
		return 0, err
	}
	return f.write(op, fault, p, off)
}

// WriteVecAt writes all pieces of p, one behind the other.
func (f *File) WriteVecAt(p [][]byte, off int64) error {
	_, err := f.WriteAt(slices.Concat(p...), off)
	return err
}

// Share writes the n bytes of from, another File, at at.
func (f *File) Share(off int64, from disk.File, at, n int64) error {
	p := make([]byte, n)
	if _, err := from.ReadAt(p, at); err != nil {
		return err
	}
	_, err := f.WriteAt(p, off)
	return err
}

// WriteSync writes p and makes it durable. When a fault is injected after all
// of p was written, it is the sync that failed: the bytes may never reach the
// disk.
func (f *File) WriteSync(p []byte, off int64) error {
	op, fault, err := f.begin(WriteSync, off, int64(len(p)), p)
	if err != nil {
		return err
	}
	n, err := f.write(op, fault, p, off)
	f.mu.Lock()
	switch {
	case f.closed:
		err = ErrClosed
	case err == nil:
		f.settleOp(op)
		err = f.tell(op, alone)
	case n == len(p):
		f.doom(func(c *change) bool { return c.op == op.N })
		f.failed(alone)
	}
	f.mu.Unlock()
	if err == nil {
		f.step(op, Done)
	}
	return err
}

// write puts p into the page cache, in two halves when someone watches.
func (f *File) write(op Op, fault Fault, p []byte, off int64) (int, error) {
	if fault.Err != nil {
		p = p[:min(int64(len(p)), fault.Done)]
	}
	half := 0
	if f.OnStep != nil && len(p) > SectorSize {
		half = int(max(0, down(off+int64(len(p))/2)-off))
		if n, err := f.put(op, p[:half], off); err != nil {
			return n, err
		}
		f.step(op, Half)
	}
	n, err := f.put(op, p[half:], off+int64(half))
	n += half
	if err != nil {
		return n, err
	}
	f.step(op, Applied)
	if fault.Err != nil {
		return n, fault.errorFor(op)
	}
	return n, nil
}

// put writes what of p finds room.
func (f *File) put(op Op, p []byte, off int64) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return 0, ErrClosed
	}
	n := f.room(off, len(p))
	if n > 0 {
		f.addData(op, p[:n], off)
		f.addSize(op, max(f.size, off+int64(n)))
	}
	if n < len(p) {
		return n, noSpace(op)
	}
	return n, nil
}

// Sync makes durable what was done before it was called. When a fault is
// injected, what it covered is on the disk or never will be, by chance.
func (f *File) Sync() error { return f.sync(alone) }

// SyncBeside is Sync, but that what failed in the other is told here too.
func (f *File) SyncBeside() error { return f.sync(beside) }

// The two ways to sync.
const (
	alone = iota
	beside
)

// failed notes that a sync failed, and was told.
func (f *File) failed(way int) {
	f.lost++
	f.told[way] = f.lost
}

// tell returns an error if a sync failed by the other way since the last time
// that something was told by this one.
func (f *File) tell(op Op, way int) error {
	if f.told[way] == f.lost {
		return nil
	}
	f.told[way] = f.lost
	return Fault{Err: syscall.EIO}.errorFor(op)
}

func (f *File) sync(way int) error {
	f.mu.Lock()
	mark := f.lastSeq // as it was when Sync was called, whatever happens meanwhile
	f.mu.Unlock()
	op, fault, err := f.begin(Sync, 0, 0, nil)
	if err != nil {
		return err
	}
	f.step(op, Applied)
	f.mu.Lock()
	switch {
	case f.closed:
		err = ErrClosed
	case fault.Err != nil:
		f.doom(func(c *change) bool { return c.seq <= mark })
		f.failed(way)
		err = fault.errorFor(op)
	default:
		f.settle(mark)
		err = f.tell(op, way)
	}
	f.mu.Unlock()
	switch {
	case err == nil:
		f.step(op, Done)
	case err != ErrClosed && f.OnFailed != nil:
		f.OnFailed()
	}
	return err
}

// PunchHole makes [off, off+n) zeros and its whole pages free: the last one too,
// where the file ends in it and the hole goes on to its end. The size stays.
func (f *File) PunchHole(off, n int64) error {
	op, fault, err := f.begin(Punch, off, n, nil)
	if err != nil {
		return err
	}
	f.mu.Lock()
	if fault.Err != nil {
		n = min(n, fault.Done)
	}
	if n = min(n, (f.size+pageSize-1)/pageSize*pageSize-off); n > 0 && off < f.size {
		f.addZeros(op, off, n)
	}
	f.mu.Unlock()
	f.step(op, Applied)
	if fault.Err != nil {
		return fault.errorFor(op)
	}
	return nil
}

// Truncate sets the size.
func (f *File) Truncate(size int64) error {
	op, fault, err := f.begin(Truncate, size, 0, nil)
	if err != nil {
		return err
	}
	if fault.Err != nil {
		return fault.errorFor(op)
	}
	f.mu.Lock()
	if size < f.size {
		f.addZeros(op, size, (f.size+pageSize-1)/pageSize*pageSize-size)
	}
	f.addSize(op, size)
	f.mu.Unlock()
	f.step(op, Applied)
	return nil
}

// Size returns the file's size in bytes.
func (f *File) Size() (int64, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return 0, ErrClosed
	}
	return f.size, nil
}

// NextData returns the first offset at or after off whose page takes space,
// or the file's size.
func (f *File) NextData(off int64) (int64, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return 0, ErrClosed
	}
	if i := f.view.next(off / pageSize); i >= 0 {
		return min(f.size, max(off, i*pageSize)), nil
	}
	return f.size, nil
}

// Close ends the use of the file. What was not synced stays pending: take the
// file up again by Kill.
func (f *File) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return ErrClosed
	}
	f.closed = true
	return nil
}

// Allocated returns the bytes that the file takes up.
func (f *File) Allocated() int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return int64(f.view.n) * pageSize
}

// Bytes returns a copy of what the file reads as.
func (f *File) Bytes() []byte {
	f.mu.Lock()
	defer f.mu.Unlock()
	p := make([]byte, f.size)
	f.view.read(p, 0)
	return p
}

func up(off int64) int64   { return (off + SectorSize - 1) / SectorSize * SectorSize }
func down(off int64) int64 { return off / SectorSize * SectorSize }

// begin counts and records an operation and asks what is to become of it.
func (f *File) begin(kind Kind, off, n int64, p []byte) (Op, Fault, error) {
	if off < 0 || n < 0 {
		panic(fmt.Sprintf("disktest: %v of %d bytes at %d", kind, n, off))
	}
	f.mu.Lock()
	if f.closed {
		f.mu.Unlock()
		return Op{}, Fault{}, ErrClosed
	}
	f.ops++
	op := Op{N: f.ops, Kind: kind, Off: off, Len: n}
	f.keep(op, p)
	f.mu.Unlock()

	f.step(op, Begin)
	if f.Inject == nil {
		return op, Fault{}, nil
	}
	fault := f.Inject(op)
	if fault.Err != nil {
		f.fail(op)
	}
	return op, fault, nil
}

func (f *File) step(op Op, phase Phase) {
	if f.OnStep != nil {
		f.OnStep(op, phase)
	}
}
