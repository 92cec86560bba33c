package exception

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"iter"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/cowdev/cowdev/block"
	"github.com/cowdev/cowdev/internal/disk"
)

// Why a change is refused. Each wraps the error number that tells a client.
var (
	// ErrFull: there is no room for a new exception. Nothing else is harmed,
	// and the same change succeeds once there is room.
	ErrFull = fmt.Errorf("the store is full: %w", syscall.ENOSPC)

	// ErrBroken: a sync or an append to the log failed. Nothing more is
	// written; what was not durable by then reads as an error.
	ErrBroken = fmt.Errorf("the store is broken since a sync failed: %w", syscall.EIO)

	// ErrReadOnly: the store was opened for reading, or is frozen.
	ErrReadOnly = fmt.Errorf("the store is read-only: %w", syscall.EPERM)
)

// DefaultLogSize is the length of the log, in bytes, unless Params say
// otherwise. It bounds what is replayed after a crash.
const DefaultLogSize = 16 << 20

// Params are what a new store is made with.
type Params struct {
	block.Geometry
	LogSize  int64  // bytes, whole pages of 4 KiB, at least 32 KiB; 0 for DefaultLogSize
	Base     []byte // the base's identity, at most MaxBase bytes
	BaseHint string // the base's name for messages; cut at MaxHint bytes
	UUID     UUID   // random where zero
	Parent   UUID
	Now      time.Time // when it is made; the present where zero
}

// Create writes an empty store into f, which holds nothing worth keeping. It
// is durable when Create returns nil; until then f does not open as a store.
func Create(f disk.File, p Params) error {
	h := Header{
		UUID: p.UUID, Parent: p.Parent, Generation: 1, State: Active, Clean: true,
		Base: p.Base, BaseHint: p.BaseHint[:min(len(p.BaseHint), MaxHint)],
		Geometry: p.Geometry, logLen: p.LogSize, tailSeq: 1,
	}
	if err := p.Geometry.Validate(); err != nil {
		return err
	}
	if h.logLen == 0 {
		h.logLen = DefaultLogSize
	}
	if h.logLen < minLog || h.logLen > maxLog || h.logLen%pageSize != 0 {
		return fmt.Errorf("log of %d bytes, expected whole pages from %d to %d", h.logLen, minLog, maxLog)
	}
	if len(p.Base) > MaxBase {
		return fmt.Errorf("base identity of %d bytes, expected at most %d", len(p.Base), MaxBase)
	}
	if h.UUID == (UUID{}) {
		rand.Read(h.UUID[:])
	}
	if p.Now.IsZero() {
		p.Now = time.Now()
	}
	h.Created = p.Now.UnixNano()
	if err := blank(f, &h); err != nil {
		return err
	}
	// The second superblock is written first: until the first is durable
	// too, either none is found or a whole store.
	for _, at := range []int64{superB, superA} {
		if _, err := f.WriteAt(encodeSuper(&h, at), at); err != nil {
			return fullError(err)
		}
		if err := f.Sync(); err != nil {
			return fullError(err)
		}
	}
	return nil
}

// blank makes the table and the log of a new store read as zeros, and gives
// the log's beginning its room, so that the first commits need none (R18).
func blank(f disk.File, h *Header) error {
	size, err := f.Size()
	if err != nil {
		return err
	}
	if size < h.slotsOff() { // first: a device that cannot grow stays as it is
		if err := f.Truncate(h.slotsOff()); err != nil {
			return err
		}
	}
	if end := min(size, h.slotsOff()); end > 0 {
		if err := f.PunchHole(0, end); err != nil {
			return err
		}
	}
	return fill(f, h.logOff(), h.step())
}

// fill writes n zeros at off.
func fill(f disk.File, off, n int64) error {
	zeros := make([]byte, min(n, 64<<10))
	for ; n > 0; n, off = n-int64(len(zeros)), off+int64(len(zeros)) {
		zeros = zeros[:min(n, int64(len(zeros)))]
		if _, err := f.WriteAt(zeros, off); err != nil {
			return fullError(err)
		}
	}
	return nil
}

// fullError makes every way in which a file says that it has no room ErrFull.
func fullError(err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) || errors.Is(err, syscall.EFBIG) {
		return fmt.Errorf("%w (%v)", ErrFull, err)
	}
	return err
}

// Options are how a store is opened.
type Options struct {
	// ReadOnly opens without writing a byte.
	ReadOnly bool

	// Memory keeps the live table, so that it outlives the process. Nil
	// keeps it on the heap.
	Memory Memory

	// Interval is how often changes that nobody flushed are committed, and
	// dropped slots given back; 0 for never.
	Interval time.Duration

	// Capacity is the room for the store in bytes where the file does not
	// grow: a block device. 0 where it does.
	Capacity int64

	// Log is told what happened, in one line each; it may be nil.
	Log func(format string, args ...any)
}

// A Store is an open exception store. Its methods may be called by any number
// of goroutines at once, those that say so under the chunk's claim.
type Store struct {
	file disk.File
	opts Options
	geo  block.Geometry
	logf func(string, ...any)

	shape    Header // what of the header never changes
	slotsOff int64
	epoch    uint64 // of this session, once it has begun

	live      *live
	committed words // what a durable record says; the committer's and the checkpoint's
	comMem    []byte
	slots     space
	rows      space
	readers   readers
	table     tablePages
	log       logRing
	commits   commits

	replayed atomic.Pointer[overlay] // inline data that recovery has still to put in place

	beginMu sync.Mutex  // the session's start: recovery, a new epoch
	ready   bool        // it may write
	started atomic.Bool // it is done

	believed int64 // the offset of the superblock that Open took
	superMu  sync.Mutex
	header   Header

	besideMu sync.Mutex // held while what runs beside the committer syncs

	broken  atomic.Pointer[breakage]
	adopted bool // the live table is that of a dead process
	short   bool // the file ends before a stored block does; opened read-only

	grown atomic.Uint64 // writes that made a block stored

	sizeMu sync.Mutex
	sized  atomic.Int64 // the file's size, or more where it is not set ahead

	stop   chan struct{}
	ticker sync.WaitGroup
}

// Header returns what the superblock says now.
func (s *Store) Header() Header {
	s.superMu.Lock()
	defer s.superMu.Unlock()
	return s.header
}

// Geometry returns the device's shape.
func (s *Store) Geometry() block.Geometry { return s.geo }

// ReadOnly reports whether every change is refused.
func (s *Store) ReadOnly() bool { return s.opts.ReadOnly }

// Lasting reports whether changes that were not flushed outlive the process.
func (s *Store) Lasting() bool { return s.live.area.Lasting() }

// Adopted reports whether the store was taken over from a process that died,
// with everything that it had acknowledged.
func (s *Store) Adopted() bool { return s.adopted }

// Grown returns how many writes of this session made a block stored.
func (s *Store) Grown() uint64 { return s.grown.Load() }

// Entry returns the live entry of chunk c, below Geometry().Chunks().
func (s *Store) Entry(c block.Chunk) Entry { return s.live.load(c) }

// Entries yields the live entries that are not zero, from chunk c on, in order.
// One that changes meanwhile is seen as it was or as it is.
func (s *Store) Entries(c block.Chunk) iter.Seq2[block.Chunk, Entry] { return s.live.from(c) }

// Claim waits for the right to change chunk c, and takes it. Release ends it.
func (s *Store) Claim(c block.Chunk) { s.live.claim(c) }

// Release gives up the claim of chunk c.
func (s *Store) Release(c block.Chunk) { s.live.unclaim(c) }

// Locate returns where in the file block b lies, which e stores, and the end of
// the run of stored blocks from b on that lie one behind the other.
func (s *Store) Locate(e Entry, b int) (off int64, end int) {
	slot, end := s.live.run(e, b)
	return s.slotOff(slot), end
}

// InFile reports whether every stored block's bytes are in its slot. Before
// the first change after a crash some may still be in the log alone:
// ReadStored finds them, who reads the file itself does not. Nor are they where
// the file was cut short: behind its end a mapping shows zeros to the page's.
func (s *Store) InFile() bool {
	return !s.short && s.replayed.Load() == nil && s.broken.Load() == nil
}

// ReadStored fills p with the bytes of chunk c from off on, which e, loaded
// under the same pin, has stored.
func (s *Store) ReadStored(p []byte, c block.Chunk, e Entry, off int) error {
	bs := s.geo.BlockSize()
	if b := s.broken.Load(); b != nil {
		touched := block.Bits(off/bs, (off+len(p)+bs-1)/bs-off/bs)
		if lost := b.lost[c] & touched; lost != 0 {
			return fmt.Errorf("chunk %d, blocks %#x: %w", c, lost, ErrBroken)
		}
	}
	for o := s.replayed.Load(); len(p) > 0; {
		b := off / bs
		at, end := s.Locate(e, b)
		if o != nil {
			end = b + 1
		}
		n := min(len(p), end*bs-off)
		if data := o.block(c, b); data != nil {
			copy(p[:n], data[off-b*bs:])
		} else if err := s.readFile(p[:n], c, at+int64(off-b*bs)); err != nil {
			return err
		}
		p, off = p[n:], off+n
	}
	return nil
}

// ShareStored makes [off, off+n) of target the same blocks as the n bytes at at
// in the store's file, where Locate found them and InFile says that they are.
func (s *Store) ShareStored(target disk.Sharer, off, at, n int64) error {
	return target.Share(off, s.file, at, n)
}

func (s *Store) readFile(p []byte, c block.Chunk, at int64) error {
	n, err := s.file.ReadAt(p, at)
	if n == len(p) {
		return nil
	}
	if err == io.EOF {
		err = fmt.Errorf("%w: the store ends before it, was it truncated? %w", ErrCorrupt, syscall.EIO)
	}
	return fmt.Errorf("read chunk %d in the store at %d: %w", c, at, err)
}

// SetBase records the base's identity; it is durable when SetBase returns nil.
func (s *Store) SetBase(base []byte) error {
	if len(base) > MaxBase {
		return fmt.Errorf("base identity of %d bytes, expected at most %d", len(base), MaxBase)
	}
	return s.changeSuper(func(h *Header) { h.Base = base })
}

// SetState records the state, with the base's identity that goes with it
// unless base is nil; both are durable when SetState returns nil.
func (s *Store) SetState(st State, base []byte) error {
	if len(base) > MaxBase {
		return fmt.Errorf("base identity of %d bytes, expected at most %d", len(base), MaxBase)
	}
	return s.changeSuper(func(h *Header) {
		h.State = st
		if base != nil {
			h.Base = base
		}
	})
}

func (s *Store) changeSuper(change func(*Header)) error {
	if s.opts.ReadOnly {
		return ErrReadOnly
	}
	if s.broken.Load() != nil {
		return ErrBroken
	}
	s.beginMu.Lock()
	err := s.getReady()
	s.beginMu.Unlock()
	if err != nil {
		return err
	}
	return s.writeSuper(change)
}

// writeSuper changes the header and writes both superblocks, one after the
// other and each made durable, so that losing either loses nothing (R16). A
// failure breaks the store.
func (s *Store) writeSuper(change func(*Header)) error {
	s.superMu.Lock()
	defer s.superMu.Unlock()
	h := s.header
	change(&h)
	h.Generation++
	// The copy that was believed comes last: the other may be torn.
	for _, at := range []int64{superA + superB - s.believed, s.believed} {
		if _, err := s.file.WriteAt(encodeSuper(&h, at), at); err != nil {
			return s.fail("write superblock", err)
		}
		if err := s.syncBeside("sync superblock"); err != nil {
			return err
		}
	}
	s.header = h
	return nil
}

// Close commits what is left, writes the table, marks the store as cleanly
// closed, and closes the file. Nobody uses the store or a pin any more.
func (s *Store) Close() error {
	if s.stop != nil {
		close(s.stop)
		s.ticker.Wait()
	}
	var err error
	if s.started.Load() || s.adopted {
		err = s.settle()
	}
	return errors.Join(err, s.drop(s.adoptable(err)))
}

// settle is the orderly end of a session.
func (s *Store) settle() error {
	if err := s.Flush(); err != nil {
		return err
	}
	s.commits.wait()
	if err := s.checkpoint(); err != nil {
		return err
	}
	s.harvest()
	s.punchPages()
	if err := s.writeSuper(func(h *Header) { h.Clean = true }); err != nil {
		return err
	}
	s.shrinkLog()
	return nil
}

// shrinkLog gives back the space of the log, which is empty, but for what the
// next session begins with.
func (s *Store) shrinkLog() {
	if first := s.shape.step(); s.log.written > first {
		s.punch(s.shape.logOff()+first, s.log.written-first)
	}
}

// adoptable reports whether the next process should find the live table: the
// session neither ended in order nor broke. A session that never began leaves
// what it found.
func (s *Store) adoptable(err error) bool {
	if s.broken.Load() != nil {
		return true // so that the next open in this boot knows
	}
	return err != nil
}

// Abandon closes the file and leaves everything as the death of the process
// would: the live table is there for the next. It is for a hand-over, after
// which this process writes nothing more.
func (s *Store) Abandon() error {
	if s.stop != nil {
		close(s.stop)
		s.ticker.Wait()
	}
	s.commits.wait()
	return s.drop(true)
}

func (s *Store) drop(keep bool) error {
	s.commits.wait()
	if s.comMem != nil {
		free(s.comMem)
	}
	return errors.Join(s.live.release(keep), s.file.Close())
}

// breakage is why a store is broken, and which stored blocks cannot be
// trusted: those written since the last sync that succeeded (R26).
type breakage struct {
	err  error
	lost map[block.Chunk]block.Mask
}

// fail makes the store broken: err came when doing what.
func (s *Store) fail(what string, err error) error {
	err = fmt.Errorf("%s: %w: %w", what, err, ErrBroken)
	b := &breakage{err: err, lost: s.commits.unsyncedBlocks(s)}
	if s.broken.CompareAndSwap(nil, b) {
		s.live.setBroken(s.shape.UUID)
		s.logf("%v; nothing more is written, restart after the disk is mended", err)
	}
	return err
}

// Broken returns why the store is broken, or nil.
func (s *Store) Broken() error {
	if b := s.broken.Load(); b != nil {
		return b.err
	}
	return nil
}
