package exception

import (
	"errors"
	"fmt"
	"math"

	"github.com/cowdev/cowdev/block"
)

// Put writes p at off of chunk c, and makes the blocks it touches stored. The
// caller holds the claim; a block that is not stored yet is written whole, to
// its end or the device's.
//
// When Put returns nil the bytes are seen by every reader, outlive the process
// (if the memory lasts), and are durable after the next Flush. After an error
// each sector of the range is its old or its new self.
func (s *Store) Put(c block.Chunk, off int, p []byte) error {
	if err := s.writable(); err != nil {
		return err
	}
	touched, filled := s.geo.Cover(c, off, len(p))
	if part := touched &^ filled &^ s.live.load(c).Stored(); part != 0 {
		panic(fmt.Sprintf("exception: part of blocks %#x of chunk %d, which are not stored: %d bytes at %d", part, c, len(p), off))
	}
	for bs := s.geo.BlockSize(); len(p) > 0; {
		e, b := s.live.load(c), off/bs
		var n int
		var err error
		if e.Stored().Has(b) {
			slot, end := s.live.run(e, b)
			n = min(len(p), end*bs-off)
			err = s.putAgain(c, off, p[:n], s.slotOff(slot)+int64(off-b*bs))
		} else {
			end, _ := e.Stored().Run(b)
			n, err = s.putNew(c, b, p[:min(len(p), end*bs-off)])
		}
		if err != nil {
			return err
		}
		p, off = p[n:], off+n
	}
	return nil
}

// putAgain writes p, which lies at off of chunk c, over stored blocks whose
// bytes lie at the offset at.
func (s *Store) putAgain(c block.Chunk, off int, p []byte, at int64) error {
	touched, _ := s.geo.Cover(c, off, len(p))
	if _, err := s.file.WriteAt(p, at); err != nil {
		// What was overwritten before the error can be read, so it is
		// durable after the next Flush, as all that is read.
		s.live.mark(c, touched)
		return s.writeError(c, at, err)
	}
	s.live.mark(c, touched)
	return nil
}

// putNew writes p to new slots for the blocks of chunk c from b on, of which
// none is stored, and returns how much of p it could: as much as free
// neighbours hold.
func (s *Store) putNew(c block.Chunk, b int, p []byte) (int, error) {
	if err := s.prepare(c); err != nil {
		return 0, err
	}
	bs := s.geo.BlockSize()
	x, err := s.slots.take(uint32((len(p)+bs-1)/bs), 1)
	if err != nil {
		return 0, err
	}
	s.grow(x)
	p = p[:min(len(p), int(x.n)*bs)]
	at := s.slotOff(x.first)
	for rest, to := p, at; len(rest) > 0 && err == nil; {
		n := min(len(rest), maxNew)
		_, err = s.file.WriteAt(rest[:n], to)
		rest, to = rest[n:], to+int64(n)
	}
	if err != nil {
		err = s.writeError(c, at, err)
	} else {
		err = s.publish(c, b, x)
	}
	if err != nil {
		s.slots.drop(x) // punched before anybody takes it again
		return 0, err
	}
	return len(p), nil
}

// publish makes the blocks of chunk c from b on stored in the slots x, which
// hold their bytes.
func (s *Store) publish(c block.Chunk, b int, x extent) error {
	e, m := s.live.load(c), block.Bits(b, int(x.n))
	home := e.home()
	old, hasRow := e.row()
	moved := false
	switch {
	case e.Stored() == 0:
		home = straight(x.first, b)
	case !hasRow && home == straight(x.first, b):
	case hasRow && s.live.rowHasNone(old, m):
		s.setRow(old, b, x)
	default:
		row, err := s.newRow()
		if errors.Is(err, ErrFull) {
			return s.straighten(c, b, x)
		} else if err != nil {
			return err
		}
		for m := e.Stored(); m != 0; m &= m - 1 {
			s.live.setRowSlot(row, m.First(), s.live.slot(e, m.First()))
		}
		s.setRow(row, b, x)
		home, moved = homeRow|row, hasRow
	}
	s.live.set(c, makeEntry(home, e.Stored()|m, e.Zero()&^m))
	s.live.mark(c, m)
	if moved {
		s.rows.drop(extent{old + 1, 1})
	}
	s.grown.Add(1)
	return nil
}

// straighten publishes as publish does, for want of a row: it copies all stored
// blocks of chunk c to slots that follow one another.
func (s *Store) straighten(c block.Chunk, b int, x extent) error {
	e, added := s.live.load(c), block.Bits(b, int(x.n))
	all := e.Stored() | added
	span := uint32(all.Last() - all.First() + 1)
	to, err := s.slots.take(span, span)
	if err != nil {
		return err
	}
	s.grow(to)
	home := straight(to.first, all.First())
	n := makeEntry(home, all, e.Zero()&^added)
	buf := make([]byte, s.geo.BlockSize())
	for m := all; m != 0 && err == nil; m &= m - 1 {
		k := m.First()
		from := x.first + uint32(k-b)
		if e.Stored().Has(k) {
			from = s.live.slot(e, k)
		}
		err = s.copySlot(buf[:min(len(buf), s.geo.Len(c)-k*len(buf))], from, n.straightSlot(k))
	}
	if err != nil {
		s.slots.drop(to)
		return fmt.Errorf("move chunk %d: %w", c, fullError(err))
	}
	s.live.set(c, n)
	s.live.mark(c, all)
	s.giveUp(e, e.Stored())
	// Those between the blocks, which nothing was written to.
	s.giveUp(makeEntry(home, ^all, 0), block.Bits(all.First(), all.Last()-all.First())&^all)
	s.slots.drop(x)
	s.grown.Add(1)
	return nil
}

// copySlot copies what fills buf from one slot to another.
func (s *Store) copySlot(buf []byte, from, to uint32) error {
	if n, err := s.file.ReadAt(buf, s.slotOff(from)); n < len(buf) {
		return err
	}
	_, err := s.file.WriteAt(buf, s.slotOff(to))
	return err
}

// giveUp gives up the slots of those blocks of e that are in m, and its row if
// they are all that are stored. The chunk is marked.
func (s *Store) giveUp(e Entry, m block.Mask) {
	for b := 0; b < block.BlocksPerChunk; {
		end, set := m.Run(b)
		for set && b < end {
			slot, stop := s.live.run(e, b)
			stop = min(stop, end)
			s.slots.drop(extent{slot, uint32(stop - b)})
			b = stop
		}
		b = end
	}
	if row, ok := e.row(); ok && m == e.Stored() {
		s.rows.drop(extent{row + 1, 1})
	}
}

// setRow makes the row name the slots x for the blocks from b on.
func (s *Store) setRow(row uint32, b int, x extent) {
	for i := range x.n {
		s.live.setRowSlot(row, b+int(i), x.first+i)
	}
}

// newRow returns a row that no entry names and that names no slot.
func (s *Store) newRow() (uint32, error) {
	x, err := s.rows.take(1, 1)
	if err != nil {
		return 0, err
	}
	row := x.first - 1
	if err = s.live.reserveRow(row); err != nil {
		err = fmt.Errorf("%w: memory for the live table: %v", ErrFull, err)
	} else if err = s.table.allocate(s.file, s.rowPage(row)); err != nil {
		err = fmt.Errorf("make room for row %d in the table: %w", row, fullError(err))
	}
	if err != nil {
		s.rows.add([]extent{x})
		return 0, err
	}
	s.live.clearRow(row)
	return row, nil
}

// rowPage returns the number of the table's page that holds a row.
func (s *Store) rowPage(row uint32) int64 {
	return (s.live.rowsAt + int64(row)*rowWords) / pageWords
}

func (s *Store) slotOff(slot uint32) int64 {
	return s.slotsOff + int64(slot-1)*int64(s.geo.BlockSize())
}

func (s *Store) writeError(c block.Chunk, at int64, err error) error {
	return fmt.Errorf("write chunk %d to the store at %d: %w", c, at, fullError(err))
}

// growBy is how far ahead of need the file's size is set, in bytes: a sync
// after a write that changed the size writes the inode too.
const growBy = 16 << 20

// grow sets the file's size ahead of the slots x, which were just taken and are
// not written yet. Every write so far lies below the size that it sets, since
// a slot beyond came through here first. Where the size cannot be set, writes
// change it as they come.
func (s *Store) grow(x extent) {
	end := s.slotOff(x.end())
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
	n := makeEntry(e.home(), e.Stored()&^m, e.Zero()&^m|zero&m)
	if n == e {
		return nil
	}
	if e == 0 {
		if err := s.prepare(c); err != nil {
			return err
		}
	}
	s.live.set(c, n)
	// The mark comes before the slots are given up, so that a commit which
	// finds a slot given up finds the chunk too.
	s.live.mark(c, 0)
	s.giveUp(e, e.Stored()&m)
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
	if err := s.table.allocate(s.file, int64(c)/pageWords); err != nil {
		return fmt.Errorf("make room for chunk %d in the table: %w", c, fullError(err))
	}
	return nil
}

// harvest gives back the space of what no durable record names and no reader
// sees (5). Only a committer calls it.
func (s *Store) harvest() {
	oldest := s.readers.oldest()
	drained := s.slots.takeDrained(oldest)
	if per := pageSize / s.geo.BlockSize(); per > 1 {
		drained = s.slots.withPages(drained, uint32(per))
	}
	s.punchSlots(drained)
	s.slots.add(drained)
	s.rows.add(s.rows.takeDrained(oldest))
}

// punchSlots gives back the space of slots.
func (s *Store) punchSlots(slots []extent) {
	for _, x := range slots {
		s.punch(s.slotOff(x.first), int64(x.n)*int64(s.geo.BlockSize()))
	}
}

// punchPages gives back pages of which no slot is taken, where slots are shorter:
// what harvest could not, beside those that were never used. Nobody takes any
// meanwhile.
func (s *Store) punchPages() {
	if s.geo.BlockSize() >= pageSize {
		return
	}
	for _, x := range s.slots.free {
		from, to := s.slotOff(x.first), s.slotOff(x.end())
		if x.end() == s.slots.next {
			to = roundUp(to, pageSize)
		}
		if roundUp(from, pageSize) < to/pageSize*pageSize {
			s.punch(from, to-from)
		}
	}
}

// punch gives back [off, off+n) of the file. A block device keeps its room: what
// is there is not read before it is written again, writing zeros to all of it
// may take hours, and of one that is thin, others could have taken the room by
// then.
func (s *Store) punch(off, n int64) {
	if s.opts.Capacity > 0 {
		return
	}
	if err := s.file.PunchHole(off, n); err != nil {
		s.logf("give back %d bytes of the store at %d: %v; they stay taken", n, off, err)
	}
}
