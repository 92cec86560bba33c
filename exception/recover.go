package exception

import (
	"crypto/rand"
	"errors"
	"fmt"
	"math"
	"slices"

	"github.com/cowdev/cowdev/block"
	"github.com/cowdev/cowdev/internal/disk"
)

// overlay is the inline data of a log that recovery has yet to put in place:
// each block's last mention, no more than the log's length in all.
type overlay struct {
	blockSize int
	blocks    map[blockKey][]byte
}

type blockKey struct {
	chunk block.Chunk
	block uint8
}

func newOverlay(blockSize int) *overlay {
	return &overlay{blockSize, make(map[blockKey][]byte)}
}

func (o *overlay) clear() { clear(o.blocks) }

func (o *overlay) len() int { return len(o.blocks) }

// block returns the bytes of block b of chunk c, or nil if they are in place.
func (o *overlay) block(c block.Chunk, b int) []byte {
	if o == nil {
		return nil
	}
	return o.blocks[blockKey{c, uint8(b)}]
}

// add takes the data of run n from data and returns the rest.
func (o *overlay) add(n run, data []byte) []byte {
	for b := range block.BlocksPerChunk {
		if n.here.Has(b) {
			o.blocks[blockKey{n.chunk, uint8(b)}] = data[:o.blockSize]
			data = data[o.blockSize:]
		}
	}
	return data
}

// keep forgets the blocks that are not stored in the final mapping.
func (o *overlay) keep(stored func(block.Chunk) block.Mask) {
	for k := range o.blocks {
		if !stored(k.chunk).Has(int(k.block)) {
			delete(o.blocks, k)
		}
	}
}

// begin starts the session, once, before its first change: it ends the
// recovery, if the store was not closed in order, and makes a superblock
// durable with this session's epoch and an empty log, so that the log never
// holds records of two sessions (R9).
func (s *Store) begin() error {
	s.beginMu.Lock()
	defer s.beginMu.Unlock()
	if s.started.Load() {
		return nil
	}
	if err := s.Broken(); err != nil {
		return err // a recovery that failed is not taken up half way
	}
	if s.opts.ReadOnly || s.shape.State == Frozen {
		return ErrReadOnly
	}
	if err := s.giveRoom(); err != nil {
		return err
	}
	if err := s.getReady(); err != nil {
		return err
	}
	if !s.shape.Clean {
		if err := s.recover(); err != nil {
			return err
		}
	}
	var r [8]byte
	rand.Read(r[:])
	epoch := le.Uint64(r[:])
	first := s.shape.tailSeq
	if s.log.head.seq > first {
		first = s.log.head.seq
	}
	err := s.writeSuper(func(h *Header) {
		h.Clean, h.epoch, h.tail, h.tailSeq, h.chain = false, epoch, 0, first, 0
	})
	if err != nil {
		return err
	}
	s.epoch = epoch
	s.log.head = place{seq: first}
	s.log.applied, s.log.tail = s.log.head, s.log.head
	if s.log.written, err = s.writtenLog(); err != nil {
		return fullError(err)
	}
	size, err := s.file.Size()
	if err != nil {
		return err
	}
	s.sized.Store(size)
	if s.opts.Capacity > 0 {
		s.sized.Store(math.MaxInt64) // a device has the size that it has
	}
	if err := s.live.setValid(s.shape.UUID, epoch, first); err != nil {
		// Only the death of the process is worse for it.
		s.logf("memory for the live table: %v; changes that are not flushed die with the process", err)
	}
	if !s.shape.Clean {
		s.punchLeftovers(size)
	}
	s.started.Store(true)
	return nil
}

// punchLeftovers gives back the space of slots that nobody has, in a file of
// size bytes: a process that died had taken them and not said so, or had given
// them up and not punched them. Nothing durable names them by now, and nobody
// has taken one yet.
func (s *Store) punchLeftovers(size int64) {
	s.punchSlots(s.slots.free)
	if end := s.slotOff(s.slots.next); end < size {
		if data, err := s.file.NextData(end); err != nil || data < size {
			s.punch(end, roundUp(size, pageSize)-end) // the last page goes with its end
		}
	}
}

// getReady does, once, what comes before the first write of a superblock. The
// caller holds beginMu.
func (s *Store) getReady() error {
	if s.ready {
		return nil
	}
	for _, at := range []int64{superA, superB} {
		if err := s.own(at, at+pageSize, false); err != nil {
			return err
		}
	}
	// What a dead process wrote can be read, and yet not be durable (R13), the
	// superblocks themselves too.
	if err := s.sync(); err != nil {
		return err
	}
	if err := s.findBelieved(); err != nil {
		return err
	}
	s.ready = true
	return nil
}

// giveRoom gives their room to the log's first step and the table's pages, as
// getReady to the superblocks: a sparse copy made holes of zeros, and one by
// reflink shares its blocks with its original. All reads as before. So whoever
// writes over them needs none (R18), and a full disk is met here, where it
// harms nothing.
func (s *Store) giveRoom() error {
	log := s.shape.logOff()
	if err := s.own(log, log+s.shape.step(), false); err != nil {
		return err
	}
	// A page that is nothing but a hole gets its room with its first entry.
	return s.own(tableOff, tableOff+s.shape.tableLen(), true)
}

// own sees to it that writing over [from, to) needs no room, or, if pages is set,
// over those pages of it that are no holes.
func (s *Store) own(from, to int64, pages bool) error {
	if err := s.fillHoles(from, to, pages); err != nil {
		return fmt.Errorf("room for what a session writes over: %w", fullError(err))
	}
	return nil
}

func (s *Store) fillHoles(from, to int64, pages bool) error {
	for off := from; off < to; {
		data, err := s.file.NextData(off)
		if err != nil {
			return err
		}
		data = min(data, to)
		holes := [][2]int64{{off, data}}
		if pages {
			head := min(roundUp(off, pageSize), data)
			holes = [][2]int64{{off, head}, {max(head, data/pageSize*pageSize), data}}
		}
		for _, h := range holes {
			if err := fill(s.file, h[0], h[1]-h[0]); err != nil {
				return err
			}
		}
		if off, err = nextHole(s.file, data); err != nil {
			return err
		}
		if err := unshare(s.file, data, min(off, to)-data); err != nil {
			return err
		}
	}
	return nil
}

// nextHole returns where a hole may begin at or after off, which is data.
func nextHole(f disk.File, off int64) (int64, error) {
	if h, ok := f.(interface {
		NextHole(off int64) (int64, error)
	}); ok {
		return h.NextHole(off)
	}
	return off/pageSize*pageSize + pageSize, nil
}

// unshare gives f blocks of its own for n bytes of data at off.
func unshare(f disk.File, off, n int64) error {
	if u, ok := f.(interface{ Unshare(off, n int64) error }); ok {
		return u.Unshare(off, n)
	}
	return nil
}

// writtenLog returns how far from its beginning the log has its room: what a
// session begins with. The log is empty.
func (s *Store) writtenLog() (int64, error) {
	off, n := s.shape.logOff(), s.shape.step()
	if s.shape.Clean {
		return n, nil // giveRoom saw to it
	}
	return n, fill(s.file, off, n)
}

// recover makes the file say by itself what its log, or the memory of a dead
// process, says. What can be read is durable: getReady saw to it. It may be cut
// off anywhere and begun again.
func (s *Store) recover() error {
	if s.adopted {
		s.commitAdopted()
	} else if o := s.replayed.Load(); o != nil {
		if err := s.putInPlace(o); err != nil {
			return err
		}
		if err := s.sync(); err != nil {
			return err
		}
	}
	pages := s.table.takeDirty()
	for n := range pages {
		if err := s.table.allocate(s.file, n); err != nil {
			s.table.dirty = pages
			return fullError(err)
		}
	}
	// The entries of a dead process are in no record: what they say of rows is
	// durable before them.
	rows := make(map[int64]bool)
	for n := range pages {
		if n >= s.live.rowsAt/pageWords {
			rows[n] = true
			delete(pages, n)
		}
	}
	for _, pages := range []map[int64]bool{rows, pages} {
		if err := s.writeTable(pages); err != nil {
			return err
		}
	}
	s.replayed.Store(nil)
	return nil
}

// commitAdopted makes every live entry a committed one: all data is durable.
// Which pages of rows differ from the file's is known since the load.
func (s *Store) commitAdopted() {
	gone := make(map[int64]bool)
	for n := range s.table.allocated {
		gone[n] = true
	}
	for n := range s.table.dirty {
		gone[n] = true
	}
	set := func(c block.Chunk) {
		e := s.live.load(c)
		if s.differs(change{chunk: c, entry: e}) {
			s.committed[c].Store(uint64(e))
			s.table.touch(int64(c) / pageWords)
		}
	}
	for n := range gone {
		for c := n * pageWords; c < min((n+1)*pageWords, s.geo.Chunks()); c++ {
			if s.live.area.Reserved(areaHead + c*8) {
				set(block.Chunk(c))
			}
		}
	}
	for c := range s.live.from(0) {
		set(c)
	}
}

// putInPlace writes the overlay's blocks where they belong.
func (s *Store) putInPlace(o *overlay) error {
	keys := make([]blockKey, 0, len(o.blocks))
	for k := range o.blocks {
		keys = append(keys, k)
	}
	slices.SortFunc(keys, func(a, b blockKey) int {
		return int((int64(a.chunk)-int64(b.chunk))*block.BlocksPerChunk) + int(a.block) - int(b.block)
	})
	for _, k := range keys {
		at, _ := s.Locate(s.live.load(k.chunk), int(k.block))
		if _, err := s.file.WriteAt(o.blocks[k], at); err != nil {
			err = fullError(err)
			if errors.Is(err, ErrFull) {
				return err
			}
			return s.fail(fmt.Sprintf("put chunk %d of the log in place", k.chunk), err)
		}
	}
	return nil
}
