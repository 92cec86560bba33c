package exception

import (
	"fmt"
	"math"
	"math/bits"
	"slices"

	"github.com/cowdev/cowdev/block"
)

// maxOverwrite is the longest write, in bytes, that is tried without a system
// call; the first copy to a page costs a fault, and a longer one more of them
// than one call would.
const maxOverwrite = 16 << 10

// Put writes p at off of chunk c, and makes the blocks it touches stored. The
// caller holds the claim; a block that is not stored yet is written whole, to
// its end or the device's.
//
// When Put returns nil the bytes are seen by every reader, outlive the process
// (if the memory lasts), and are durable after the next Flush. After an error
// that wraps ErrFull nothing has changed; after any other, each sector of the
// range is its old or its new self.
func (s *Store) Put(c block.Chunk, off int, p []byte) error {
	if err := s.writable(); err != nil {
		return err
	}
	touched, filled := s.geo.Cover(c, off, len(p))
	e := s.live.load(c)
	if part := touched &^ filled &^ e.Stored(); part != 0 {
		panic(fmt.Sprintf("exception: part of blocks %#x of chunk %d, which are not stored: %d bytes at %d", part, c, len(p), off))
	}
	slot := e.Slot()
	if slot == 0 {
		var err error
		if err = s.prepare(c); err != nil {
			return err
		}
		if slot, err = s.slots.take(); err != nil {
			return err
		}
		s.grow(slot)
	}
	at := s.slotsOff + int64(slot-1)*int64(s.geo.ChunkSize) + int64(off)
	if touched&^e.Stored() == 0 && s.overwrite != nil && len(p) <= maxOverwrite && s.overwrite(p, at) {
		s.live.mark(c, touched)
		return nil
	}
	if _, err := s.file.WriteAt(p, at); err != nil {
		// What was overwritten before the error can be read, so it is durable
		// after the next Flush, as all that is read.
		s.live.mark(c, touched&e.Stored())
		if e.Slot() == 0 {
			// What was written goes with the slot, which is punched before
			// anybody takes it again.
			s.slots.drop(slot)
		}
		return fmt.Errorf("write chunk %d to the store at %d: %w", c, at, fullError(err))
	}
	if n := makeEntry(slot, e.Stored()|touched, e.Zero()&^touched); n != e {
		s.live.set(c, n)
		s.grown.Add(1)
	}
	s.live.mark(c, touched)
	return nil
}

// growBy is how far ahead of need the file's size is set, in bytes: a sync
// after a write that changed the size writes the inode too.
const growBy = 16 << 20

// grow sets the file's size ahead of slot, which was just taken and is not
// written yet. Every write so far lies below the size that it sets, since a
// slot beyond came through here first. Where the size cannot be set, writes
// change it as they come.
func (s *Store) grow(slot uint32) {
	end := s.slotsOff + int64(slot)*int64(s.geo.ChunkSize)
	if end <= s.sized.Load() {
		return
	}
	s.sizeMu.Lock()
	defer s.sizeMu.Unlock()
	most := s.slotsOff + s.geo.Chunks()*int64(s.geo.ChunkSize) // unless dropped slots wait
	size := max(end, min(end+growBy, most))
	switch {
	case end <= s.sized.Load():
	case s.file.Truncate(size) == nil:
		s.sized.Store(size)
	default:
		s.sized.Store(math.MaxInt64)
	}
}

// Zero makes the blocks m of chunk c read as zeros, and gives up the space of
// those that were stored. The caller holds the claim. What it promises is as
// with Put.
func (s *Store) Zero(c block.Chunk, m block.Mask) error {
	return s.replace(c, m, m)
}

// Drop makes the blocks m of chunk c the origin's again, as though they had
// never been written. The caller holds the claim. What it promises is as with
// Put.
func (s *Store) Drop(c block.Chunk, m block.Mask) error {
	return s.replace(c, m, 0)
}

// replace ends the blocks m of chunk c being stored, and makes zero those of
// zero, a part of m.
func (s *Store) replace(c block.Chunk, m, zero block.Mask) error {
	if err := s.writable(); err != nil {
		return err
	}
	m &= s.geo.Blocks(c)
	e := s.live.load(c)
	n := makeEntry(e.Slot(), e.Stored()&^m, e.Zero()&^m|zero&m)
	if n == e {
		return nil
	}
	if e == 0 {
		if err := s.prepare(c); err != nil {
			return err
		}
	}
	s.live.set(c, n)
	// The mark comes before the slot is given up, so that a commit which
	// finds the slot given up finds the chunk too.
	s.live.mark(c, 0)
	switch gone := e.Stored() & m; {
	case gone == 0:
	case n.Slot() == 0:
		s.slots.drop(e.Slot())
	default:
		s.noteHoles(c, gone)
	}
	return nil
}

// writable reports why nothing may be changed, or nil; the first change of a
// session begins it.
func (s *Store) writable() error {
	if s.broken.Load() != nil {
		return ErrBroken
	}
	if s.started.Load() {
		return nil
	}
	return s.begin()
}

// prepare makes room for the entry of chunk c in the live table and in the
// file's, so that neither a commit nor a checkpoint finds none (R18).
func (s *Store) prepare(c block.Chunk) error {
	if err := s.live.reserve(c); err != nil {
		return fmt.Errorf("%w: memory for the live table: %v", ErrFull, err)
	}
	if err := s.table.allocate(s.file, int64(c)/pageEntries); err != nil {
		return fmt.Errorf("make room for chunk %d in the table: %w", c, fullError(err))
	}
	return nil
}

// noteHoles remembers zeroed blocks of a slot that stays owned.
func (s *Store) noteHoles(c block.Chunk, m block.Mask) {
	s.holesMu.Lock()
	defer s.holesMu.Unlock()
	if s.holes == nil {
		s.holes = make(map[block.Chunk]block.Mask)
	}
	s.holes[c] |= m
}

// harvest gives back the space of what no durable record names and no reader
// sees (5). Only a committer calls it.
func (s *Store) harvest() {
	drained := s.slots.takeDrained(s.readers.oldest())
	slices.Sort(drained)
	s.punchSlots(drained)
	s.slots.add(drained)
	s.punchHoles()
}

// punchSlots gives back the space of slots, neighbours together.
func (s *Store) punchSlots(slots []uint32) {
	size := int64(s.geo.ChunkSize)
	for len(slots) > 0 {
		n := 1
		for n < len(slots) && slots[n] == slots[n-1]+1 {
			n++
		}
		s.punch(s.slotsOff+int64(slots[0]-1)*size, int64(n)*size)
		slots = slots[n:]
	}
}

func (s *Store) punch(off, n int64) {
	if err := s.file.PunchHole(off, n); err != nil {
		s.logf("give back %d bytes of the store at %d: %v; they stay taken", n, off, err)
	}
}

// punchHoles punches the blocks that became zero in slots which stay owned. It
// takes the claim and looks again, at the live and the committed entry (R20).
func (s *Store) punchHoles() {
	s.holesMu.Lock()
	holes := s.holes
	s.holes = nil
	s.holesMu.Unlock()
	bs := s.geo.BlockSize()
	for c, m := range holes {
		s.Claim(c)
		e, durable := s.live.load(c), Entry(s.committed[c].Load())
		m &^= e.Stored()
		if e.Slot() != 0 && m != 0 {
			if wait := m & durable.Stored(); wait != 0 || durable.Slot() != e.Slot() {
				s.noteHoles(c, m)
				m = 0
			}
			for b := 0; m>>b != 0; {
				b += bits.TrailingZeros16(uint16(m >> b))
				end, _ := m.Run(b)
				s.punch(s.SlotOffset(e)+int64(b*bs), int64((end-b)*bs))
				b = end
				if b >= block.BlocksPerChunk {
					break
				}
			}
		}
		s.Release(c)
	}
}
