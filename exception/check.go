package exception

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/cowdev/cowdev/block"
	"github.com/cowdev/cowdev/internal/disk"
)

// A Problem is one thing that Check found.
type Problem struct {
	What string // one line: what is wrong, and where

	// Harm says that bytes are lost or may be wrong. A problem without it
	// costs space or safety only.
	Harm bool

	// Fix says what Repair would do, or is empty where nothing is provably
	// safe.
	Fix string

	repair func(*repairer) error
}

// A Report is what Check found in a store.
type Report struct {
	Header   Header
	Problems []Problem

	Chunks  int64 // with an exception
	Stored  int64 // blocks stored
	Zero    int64 // blocks recorded as zeros
	Holes   int64 // of the stored blocks, those that are holes of the file, and so zeros; a sparse copy makes such
	Leaked  int64 // bytes of slots that nobody has
	Records int   // in the log, to be replayed
}

// Harmed reports whether a problem does harm.
func (r *Report) Harmed() bool {
	return slices.ContainsFunc(r.Problems, func(p Problem) bool { return p.Harm })
}

// Check looks for everything that can be wrong in the store in f, and changes
// nothing. Nobody else has the store open for writing. Its error is that of a
// file which is no store, or cannot be read; damage is in the report.
func Check(f disk.File) (*Report, error) {
	h, copies, err := readSuper(f)
	if err != nil {
		return nil, err
	}
	c := &checker{f: f, h: h, limits: h.limits(), report: &Report{Header: *h}, entries: make(map[block.Chunk]Entry), rows: make(map[int64]*[pageWords]uint64)}
	c.supers(copies)
	if size, err := f.Size(); err != nil {
		return nil, err
	} else if size < h.slotsOff() {
		c.harm("the file has %d bytes, its table and log end at %d", size, h.slotsOff())
		return c.report, nil
	}
	if err := c.table(); err != nil {
		return nil, err
	}
	if !h.Clean {
		if err := c.log(); err != nil {
			return nil, err
		}
	}
	if err := c.slots(); err != nil {
		return nil, err
	}
	return c.report, nil
}

type checker struct {
	f       disk.File
	h       *Header
	limits  limits
	report  *Report
	entries map[block.Chunk]Entry
	rows    map[int64]*[pageWords]uint64 // the pages of rows, by number, that are not all zeros
	inline  *overlay
}

func (c *checker) add(p Problem) { c.report.Problems = append(c.report.Problems, p) }

func (c *checker) harm(format string, args ...any) {
	c.add(Problem{What: fmt.Sprintf(format, args...), Harm: true})
}

// supers holds the two superblocks against each other.
func (c *checker) supers(copies []superCopy) {
	for _, s := range copies {
		if s.err == nil && s.header.UUID == c.h.UUID {
			continue // the older of two generations is what a crash between them leaves
		}
		what := fmt.Sprintf("superblock at %d: not of this store", s.at)
		if s.err != nil {
			what = fmt.Sprintf("superblock at %d: %v", s.at, s.err)
		}
		at := s.at
		c.add(Problem{What: what, Fix: "copy the other superblock over it", repair: func(r *repairer) error {
			return r.write(encodeSuper(c.h, at), at)
		}})
	}
}

// table reads every sector of the table, also behind a bad one.
func (c *checker) table() error {
	end := tableOff + c.h.tableLen()
	p := make([]byte, 256<<10)
	for off := int64(tableOff); off < end; {
		var err error
		if off, err = c.f.NextData(off); err != nil {
			return err
		}
		off = off / pageSize * pageSize
		if off >= end {
			return nil
		}
		q := p[:min(int64(len(p)), end-off)]
		if n, err := c.f.ReadAt(q, off); n < len(q) {
			c.harm("read the table at %d: %v", off, err)
			clear(q[n:])
		}
		for i := 0; i < len(q); i += sectorSize {
			c.sector(q[i:i+sectorSize], (off-tableOff+int64(i))/sectorSize)
		}
		off += int64(len(q))
	}
	return nil
}

func (c *checker) sector(p []byte, n int64) {
	if err := c.h.checkSector(p, n); err != nil {
		c.harm("%v", err)
		return
	}
	for i, w := range wordsOf(p) {
		at := n*sectorWords + int64(i)
		if at >= c.h.rowsAt() {
			*c.word(at) = w
			continue
		}
		chunk, e := block.Chunk(at), Entry(w)
		if err := c.limits.check(chunk, e); err != nil {
			c.harm("table sector %d: %v", n, err)
			continue
		}
		c.entries[chunk] = e
	}
}

// log replays the log over the entries.
func (c *checker) log() error {
	log, err := readLog(c.f, c.h)
	if err != nil {
		return err
	}
	records, _, err := scanLog(log, c.h)
	if err != nil {
		c.harm("%v", err)
		return nil
	}
	c.report.Records = len(records)
	c.inline = newOverlay(c.h.BlockSize())
	for _, r := range records {
		if r.flags&flagBarrier != 0 {
			c.inline.clear()
		}
		data := r.data
		for _, n := range r.runs {
			for i := range n.count {
				c.entries[n.chunk+block.Chunk(i)] = n.entry
			}
			data = c.inline.add(n, data)
		}
	}
	for r, slots := range names(records, func(chunk block.Chunk) Entry { return c.entries[chunk] }) {
		for m := r.named; m != 0; m &= m - 1 {
			c.name(r.entry, m.First(), slots[0])
			slots = slots[1:]
		}
	}
	return nil
}

// name makes the row of e name the slot for block b.
func (c *checker) name(e Entry, b int, slot uint32) {
	row, _ := e.row()
	n, shift := rowPlace(row, b)
	w := c.word(c.h.rowsAt() + n)
	*w = withSlot(*w, shift, slot)
}

// word returns word n of the table, one of a row.
func (c *checker) word(n int64) *uint64 {
	p := c.rows[n/pageWords]
	if p == nil {
		p = new([pageWords]uint64)
		c.rows[n/pageWords] = p
	}
	return &p[n%pageWords]
}

// slot returns the slot of block b, which e stores.
func (c *checker) slot(e Entry, b int) uint32 {
	row, ok := e.row()
	if !ok {
		return e.straightSlot(b)
	}
	n, shift := rowPlace(row, b)
	n += c.h.rowsAt()
	if p := c.rows[n/pageWords]; p != nil {
		return uint32(p[n%pageWords] >> shift)
	}
	return 0
}

// A stored is a block and the slot that it has.
type stored struct {
	slot  uint32
	chunk block.Chunk
	block uint8
}

// slots holds the entries against each other and against the file: a slot is
// one block's, and a row one chunk's; stored blocks lie in the file, and what is
// not stored takes no space.
func (c *checker) slots() error {
	var all []stored
	rows := make(map[uint32]block.Chunk)
	for chunk, e := range c.entries {
		if e == 0 {
			continue
		}
		c.report.Chunks++
		c.report.Stored += int64(e.Stored().Count())
		c.report.Zero += int64(e.Zero().Count())
		if row, ok := e.row(); ok {
			if other, taken := rows[row]; taken {
				c.harm("chunks %d and %d both have row %d", min(chunk, other), max(chunk, other), row)
			}
			rows[row] = chunk
		}
		for m := e.Stored(); m != 0; m &= m - 1 {
			x := stored{c.slot(e, m.First()), chunk, uint8(m.First())}
			if err := c.limits.checkSlot(chunk, int64(x.slot)); err != nil {
				c.harm("%v", err)
				continue
			}
			all = append(all, x)
		}
	}
	slices.SortFunc(all, func(a, b stored) int {
		return cmp.Or(cmp.Compare(a.slot, b.slot), cmp.Compare(a.chunk, b.chunk), cmp.Compare(a.block, b.block))
	})
	for i := range all[:max(1, len(all))-1] {
		if a, b := all[i], all[i+1]; a.slot == b.slot {
			c.harm("block %d of chunk %d and block %d of chunk %d both have slot %d", a.block, a.chunk, b.block, b.chunk, a.slot)
		}
	}
	return c.space(all)
}

// space walks the data of the file's slots. all are the stored blocks, in the
// order of their slots.
func (c *checker) space(all []stored) error {
	size, err := c.f.Size()
	if err != nil {
		return err
	}
	holes, knows := c.f.(interface {
		NextHole(off int64) (int64, error)
	})
	var data spans
	for off := c.h.slotsOff(); off < size; {
		if off, err = c.f.NextData(off); err != nil {
			return err
		}
		if off >= size {
			break
		}
		end := off + pageSize
		if knows {
			if end, err = holes.NextHole(off); err != nil {
				return err
			}
		}
		end = min(max(end, off+1), size)
		data.add(off, end)
		off = end
	}
	for _, x := range all {
		c.missing(x, data, size)
	}
	// A device tells no holes: all of it looks taken.
	if d, ok := c.f.(interface{ IsDevice() bool }); !ok || !d.IsDevice() {
		c.leaks(all, data)
	}
	return nil
}

// missing reports a stored block that lies behind the file's end, and counts one
// in a hole.
func (c *checker) missing(x stored, data spans, size int64) {
	if c.inline.block(x.chunk, int(x.block)) != nil {
		return
	}
	bs := int64(c.h.BlockSize())
	off := c.h.slotOff(x.slot)
	end := off + min(bs, c.h.Size-c.h.Offset(x.chunk)-int64(x.block)*bs)
	switch {
	case end > size:
		c.harm("chunk %d: block %d in slot %d lies behind the file's end at %d", x.chunk, x.block, x.slot, size)
	case c.h.Clean && !data.meets(off, end):
		c.report.Holes++
	}
}

// leaks reports space of slots that no chunk has.
func (c *checker) leaks(all []stored, data spans) {
	// Space is taken in pages, of which one may hold several short slots.
	pages := func(x stored) (from, to int64) {
		off := c.h.slotOff(x.slot)
		return off / pageSize * pageSize, roundUp(off+int64(c.h.BlockSize()), pageSize)
	}
	var lost spans
	for _, s := range data {
		for off := s.off; off < s.end; {
			from, to := s.end, s.end
			if len(all) > 0 {
				from, to = pages(all[0])
			}
			if to <= off {
				all = all[1:]
				continue
			}
			if end := min(from, s.end); off < end {
				lost.add(off, end)
				c.report.Leaked += end - off
			}
			off = to
		}
	}
	if c.report.Leaked == 0 || !c.h.Clean {
		return // after a crash they are taken again before new ones
	}
	p := Problem{What: fmt.Sprintf("%d bytes of slots that no chunk has", c.report.Leaked)}
	if !c.report.Harmed() && c.report.Holes == 0 { // else they may be those of a chunk whose entry is damaged
		p.Fix, p.repair = "give them back", func(r *repairer) error { return r.punch(lost) }
	}
	c.add(p)
}

// spans are ranges of the file in order, neighbours joined.
type spans []span

type span struct{ off, end int64 }

func (s *spans) add(off, end int64) {
	if n := len(*s); n > 0 && (*s)[n-1].end == off {
		(*s)[n-1].end = end
		return
	}
	*s = append(*s, span{off, end})
}

// meets reports whether a byte of [off, end) is in s.
func (s spans) meets(off, end int64) bool {
	i, _ := slices.BinarySearchFunc(s, off, func(x span, off int64) int {
		if x.end <= off {
			return -1
		}
		return 1
	})
	return i < len(s) && s[i].off < end
}

// Repair mends what is provably safe to mend of what Check reported, and
// returns the problems it mended. What it overwrites it first writes to keep,
// as lines that name the offset, each followed by the bytes. The store is open
// nowhere else.
func Repair(f disk.File, rep *Report, keep io.Writer) ([]Problem, error) {
	if err := f.Sync(); err != nil { // what is good may be in the page cache alone (R13)
		return nil, err
	}
	r := &repairer{f: f, keep: keep}
	var done []Problem
	for _, p := range rep.Problems {
		if p.repair == nil {
			continue
		}
		if err := p.repair(r); err != nil {
			return done, fmt.Errorf("repair %q: %w", p.What, err)
		}
		done = append(done, p)
	}
	return done, f.Sync()
}

type repairer struct {
	f    disk.File
	keep io.Writer
}

// save keeps n bytes at off.
func (r *repairer) save(off, n int64) error {
	if _, err := fmt.Fprintf(r.keep, "%d bytes at %d:\n", n, off); err != nil {
		return err
	}
	if _, err := io.Copy(r.keep, io.NewSectionReader(r.f, off, n)); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	_, err := io.WriteString(r.keep, "\n")
	return err
}

func (r *repairer) write(p []byte, off int64) error {
	if err := r.save(off, int64(len(p))); err != nil {
		return err
	}
	_, err := r.f.WriteAt(p, off)
	return err
}

func (r *repairer) punch(s spans) error {
	for _, x := range s {
		if err := r.save(x.off, x.end-x.off); err != nil {
			return err
		}
		// The last page goes with its end.
		if err := r.f.PunchHole(x.off, roundUp(x.end, pageSize)-x.off); err != nil {
			return err
		}
	}
	return nil
}
