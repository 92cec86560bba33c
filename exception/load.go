package exception

import (
	"errors"
	"fmt"
	"io"
	"iter"
	"slices"
	"sync"
	"time"

	"github.com/cowdev/cowdev/block"
	"github.com/cowdev/cowdev/internal/disk"
)

// Open opens the store in f and owns f from then on, also when it fails. It
// changes nothing in the file (6); recovery after a crash is worked out in
// memory and written before the session's first change.
//
// Its error wraps ErrNotStore, ErrVersion or ErrCorrupt where the file is at
// fault.
func Open(f disk.File, o Options) (*Store, error) {
	s, err := open(f, o)
	if err != nil {
		f.Close()
		return nil, err
	}
	return s, nil
}

func open(f disk.File, o Options) (*Store, error) {
	h, copies, err := readSuper(f)
	if err != nil {
		return nil, err
	}
	if !o.ReadOnly && h.roCompat&^knownROCompat != 0 {
		return nil, fmt.Errorf("%w: feature %#x, it can be opened read-only", ErrVersion, h.roCompat&^knownROCompat)
	}
	if size, err := f.Size(); err != nil {
		return nil, err
	} else if size < h.slotsOff() {
		// Create gave it this much: so no length in a superblock makes us
		// take more memory than the file has bytes.
		return nil, fmt.Errorf("%w: the file has %d bytes, its table and log end at %d", ErrCorrupt, size, h.slotsOff())
	}
	if o.Memory == nil {
		o.Memory = Heap{}
	}
	memory := o.Memory
	if o.ReadOnly {
		o.Memory = copyOf{o.Memory}
	}
	if d, ok := f.(interface{ Split() error }); ok && !o.ReadOnly {
		if err := d.Split(); err != nil {
			return nil, fmt.Errorf("%w (is /proc mounted?)", err)
		}
	}
	s := newStore(f, h, o)
	s.believe(h, copies)
	if s.live, err = newLive(o.Memory, h); err != nil {
		return nil, fmt.Errorf("memory for %d chunks: %w", h.Chunks(), err)
	}
	s.adopted = !h.Clean && s.live.valid(h.UUID, h.epoch) && !s.isOlder()
	if !h.Clean && !s.adopted {
		s.lookElsewhere(memory)
	}
	keep := true // what another process left in memory
	switch {
	case s.adopted:
		s.live.adopt()
	case o.ReadOnly:
		s.live.forget() // in its copy
	default:
		err = s.distrust()
	}
	if err == nil {
		keep = s.adopted
		err = s.load()
	}
	if err != nil {
		s.live.release(keep)
		if s.comMem != nil {
			free(s.comMem)
		}
		return nil, err
	}
	if o.Interval > 0 && !o.ReadOnly {
		s.stop = make(chan struct{})
		s.ticker.Add(1)
		go s.tick()
	}
	return s, nil
}

// isOlder reports whether the file is older than the memory that was left of its
// session: a copy was put in its place.
func (s *Store) isOlder() bool {
	log, err := readLog(s.file, &s.shape)
	if err != nil {
		return false // the load will say so
	}
	_, next, err := scanLog(log, &s.shape)
	if err != nil || next.seq >= s.live.head[headSeq].Load() {
		return false
	}
	s.logf("the store is older than what its last server left in memory, which is passed over: a copy in its place?")
	return true
}

// lookElsewhere says where the last server's memory is, if this file cannot have
// it.
func (s *Store) lookElsewhere(m Memory) {
	e, ok := m.(interface{ Elsewhere(UUID, uint64) string })
	if !ok {
		return
	}
	if name := e.Elsewhere(s.header.UUID, s.header.epoch); name != "" {
		s.logf("the store was in use when it was copied, moved or given away; what had not been committed is in %s, and not here", name)
	}
}

func newStore(f disk.File, h *Header, o Options) *Store {
	s := &Store{file: f, opts: o, geo: h.Geometry, shape: *h, header: *h, slotsOff: h.slotsOff(), logf: o.Log}
	s.slots.name, s.rows.name = "slots", "rows"
	if s.logf == nil {
		s.logf = func(string, ...any) {}
	}
	s.commits.cond.L = &s.commits.mu
	s.readers.epoch.Store(1)
	s.table.allocated = make(map[int64]bool)
	s.table.dirty = make(map[int64]bool)
	return s
}

// tick commits what nobody flushed.
func (s *Store) tick() {
	defer s.ticker.Done()
	t := time.NewTicker(s.opts.Interval)
	defer t.Stop()
	for {
		select {
		case <-s.stop:
			return
		case <-t.C:
			if s.started.Load() && (s.live.isDirty() || s.slots.waiting() || s.rows.waiting()) {
				s.Flush()
			}
		}
	}
}

// superCopy is one of the two superblocks as it was found.
type superCopy struct {
	at     int64
	header *Header
	err    error
}

// readSuper returns the newer of the two superblocks, and both as found. One
// that cannot be read does not matter while the other can (R16).
func readSuper(f disk.File) (*Header, []superCopy, error) {
	copies := []superCopy{{at: superA}, {at: superB}}
	var best *Header
	for i := range copies {
		c := &copies[i]
		p := make([]byte, pageSize)
		if n, err := f.ReadAt(p, c.at); n < pageSize {
			if err == nil || err == io.EOF {
				err = fmt.Errorf("%w: the file ends before %d", ErrNotStore, c.at+pageSize)
			}
			c.err = err
			continue
		}
		if c.header, c.err = decodeSuper(p, c.at); c.err == nil && (best == nil || c.header.Generation > best.Generation) {
			best = c.header
		}
	}
	if best != nil {
		return best, copies, nil
	}
	kinds := []error{ErrVersion, ErrCorrupt, ErrNotStore}
	for _, c := range copies {
		known := func(kind error) bool { return errors.Is(c.err, kind) }
		if !slices.ContainsFunc(kinds, known) { // what cannot be read may be sound
			return nil, copies, fmt.Errorf("read the superblock at %d: %w", c.at, c.err)
		}
	}
	for _, kind := range kinds {
		for _, c := range copies {
			if errors.Is(c.err, kind) {
				return nil, copies, c.err
			}
		}
	}
	panic("exception: a superblock neither good nor bad")
}

// load fills the live and the committed table from the file's table and log,
// or takes over what a dead process left.
func (s *Store) load() error {
	if s.opts.ReadOnly && s.adopted {
		// The copy of the live table is all there is to know; the table itself
		// is left for the next session that writes.
		err := (&loader{s: s, limits: s.shape.limits()}).countTaken()
		s.adopted = false
		return err
	}
	ld := &loader{s: s, limits: s.shape.limits(), pages: newPageSet(s.shape.tableLen())}
	defer ld.ahead.Wait()
	if !s.opts.ReadOnly {
		if !s.adopted {
			s.live.forget()
		}
		mem, err := zeroed(s.geo.Chunks() * 8)
		if err != nil {
			return err
		}
		s.comMem, s.committed = mem, asWords(mem)
		ld.into, ld.mem = s.committed.plain(), mem
	} else {
		ld.into, ld.mem = s.live.entries.plain(), s.live.area.Bytes()[areaHead:]
	}
	if err := ld.table(); err != nil {
		return err
	}
	if s.adopted {
		ld.findNewRows()
	}
	if !s.header.Clean {
		if err := ld.log(); err != nil {
			return err
		}
	}
	if !s.adopted {
		if err := ld.publish(); err != nil {
			return err
		}
	}
	return ld.countTaken()
}

// believe takes h, one of copies, for what the store is.
func (s *Store) believe(h *Header, copies []superCopy) {
	s.shape, s.header = *h, *h
	for _, c := range copies {
		if c.header == h {
			s.believed = c.at
		}
	}
}

// distrust reads the superblock from the disk again, if a sync of the process
// before may have failed: then what is in the page cache is not what is on the
// disk (R26).
func (s *Store) distrust() error {
	if s.header.Clean && !s.live.wasBroken(s.header.UUID) {
		return nil
	}
	dropCache(s.file, 0, 0)
	h, copies, err := readSuper(s.file)
	if err != nil {
		return err
	}
	if h.UUID != s.shape.UUID || h.Geometry != s.shape.Geometry || h.logLen != s.shape.logLen {
		return fmt.Errorf("%w: the superblocks are of two stores", ErrCorrupt)
	}
	s.believe(h, copies)
	return nil
}

// findBelieved finds the better superblock again, on the disk: the one that
// Open took may be in the page cache alone, after a sync that failed in a
// process which could leave no word of it.
func (s *Store) findBelieved() error {
	for _, at := range []int64{superA, superB} {
		dropCache(s.file, at, pageSize)
	}
	h, copies, err := readSuper(s.file)
	if err != nil {
		return err
	}
	for _, c := range copies {
		if c.header == h {
			s.believed = c.at
		}
	}
	return nil
}

// dropCache makes [off, off+n) of f be read from the disk again; to the end
// where n is 0.
func dropCache(f disk.File, off, n int64) {
	if d, ok := f.(interface{ DropCache(off, n int64) error }); ok {
		d.DropCache(off, n)
	}
}

// loader is the state of one load. Nobody else knows the store yet.
type loader struct {
	s      *Store
	limits limits
	into   []uint64
	mem    []byte  // the memory of into
	pages  pageSet // of the table: those that hold, or held, an entry
	ahead  sync.WaitGroup
}

// put sets the entry of chunk c.
func (ld *loader) put(c block.Chunk, e Entry) {
	ld.into[c] = uint64(e)
	ld.pages.add(int64(c)/pageWords*pageSize, 1)
}

// table reads the file's table.
func (ld *loader) table() error {
	s := ld.s
	end := tableOff + s.shape.tableLen()
	size, err := s.file.Size()
	if err != nil {
		return err
	}
	buf := make([]byte, min(256<<10, s.shape.tableLen()))
	for off := int64(tableOff); ; {
		if off, err = s.file.NextData(off); err != nil {
			return fmt.Errorf("look for data in the table: %w", err)
		}
		off = tableOff + (off-tableOff)/pageSize*pageSize
		if off >= end || off >= size {
			return nil
		}
		p := buf[:min(int64(len(buf)), end-off)]
		if n, err := s.file.ReadAt(p, off); n < len(p) {
			if err != nil && err != io.EOF {
				return fmt.Errorf("read the table at %d: %w", off, err)
			}
			return fmt.Errorf("%w: the file ends at %d, inside the table", ErrCorrupt, off+int64(n))
		}
		if err := ld.sectors(p, (off-tableOff)/pageSize); err != nil {
			return err
		}
		off += int64(len(p))
	}
}

// populateFrom is how many pages of the table with entries, one after the
// other, make it worth to ask for the memory of all of them at once.
const populateFrom = 16

// sectors reads whole pages of the table, of which the first is number n.
func (ld *loader) sectors(p []byte, n int64) error {
	for len(p) > 0 {
		k := 0
		for k*pageSize < len(p) && !allZero(p[k*pageSize:][:pageSize]) {
			k++
		}
		if k >= populateFrom {
			ld.populate(n*pageWords*8, int64(k)*pageWords*8)
		}
		for i := range k {
			if err := ld.page(p[i*pageSize:][:pageSize], n+int64(i)); err != nil {
				return err
			}
		}
		k = min(k+1, len(p)/pageSize) // behind them is one of zeros
		p, n = p[k*pageSize:], n+int64(k)
	}
	return nil
}

// populate asks for the memory of [off, off+n) of the table that is filled and,
// at the same time, of the live table, which takes as long. What cannot be had
// for that, publish will be told.
func (ld *loader) populate(off, n int64) {
	if live := ld.s.live; !ld.s.adopted && off < int64(len(live.entries))*8 {
		n := min(n, int64(len(live.entries))*8-off)
		ld.ahead.Go(func() { _ = live.ask(areaHead+off, n) })
	}
	populate(ld.mem, off, n)
}

// page reads page n of the table, which is not all zeros.
func (ld *loader) page(p []byte, n int64) error {
	ld.s.table.allocated[n] = true
	ofRows := n*pageWords >= ld.s.live.rowsAt
	if !ofRows {
		ld.pages.add(n*pageSize, 1)
	}
	for i := range int64(pageSize / sectorSize) {
		sector := n*pageSize/sectorSize + i
		q := p[i*sectorSize:][:sectorSize]
		if err := ld.s.shape.checkSector(q, sector); err != nil {
			return err
		}
		first := sector * sectorWords
		if ofRows {
			if err := ld.rows(q, first); err != nil {
				return err
			}
			continue
		}
		for k, w := range wordsOf(q) {
			c, e := block.Chunk(first+int64(k)), Entry(w)
			if err := ld.limits.check(c, e); err != nil {
				return fmt.Errorf("%w: table sector %d: %v", ErrCorrupt, sector, err)
			}
			ld.into[c] = w
		}
	}
	return nil
}

// rows reads a sector of rows, of which the first word is number n.
func (ld *loader) rows(q []byte, n int64) error {
	live := ld.s.live
	words := min(sectorWords, live.rowsAt+int64(len(live.rows))-n)
	if words <= 0 {
		return nil // the rest of the table's last page
	}
	if ld.s.adopted { // what is in memory is newer
		for i := range words {
			if live.rowWord(n+i) != le.Uint64(q[i*8:]) {
				ld.s.table.dirty[n/pageWords] = true
			}
		}
		return nil
	}
	if err := live.ask(areaHead+n*8, words*8); err != nil {
		return fmt.Errorf("memory for the live table: %w", err)
	}
	to := live.rows.plain()[n-live.rowsAt:]
	for i := range words {
		to[i] = le.Uint64(q[i*8:])
	}
	return nil
}

// findNewRows marks the pages of rows that the memory of a dead process has
// and the file's table has not. One without a row is none of these, though a
// page of memory, which is larger, was made for its neighbours: there may be no
// room for it in the file.
func (ld *loader) findNewRows() {
	live, t := ld.s.live, &ld.s.table
	end := live.rowsAt + int64(len(live.rows))
	for first := live.rowsAt; first < end; first += pageWords {
		if t.allocated[first/pageWords] {
			continue
		}
		for n := first; n < min(first+pageWords, end); n++ {
			if at := areaHead + n*8; !live.area.Reserved(at) {
				n += (pageSize-at%pageSize)/8 - 1
			} else if live.rowWord(n) != 0 {
				t.dirty[first/pageWords] = true
				break
			}
		}
	}
}

// log replays the log: first the final mapping of all chunks, then what inline
// data is still its block's last mention (R12).
func (ld *loader) log() error {
	s := ld.s
	log, err := readLog(s.file, &s.shape)
	if err != nil {
		return err
	}
	records, next, err := scanLog(log, &s.shape)
	if err != nil {
		return err
	}
	o := newOverlay(s.geo.BlockSize())
	for _, r := range records {
		if r.flags&flagBarrier != 0 {
			o.clear()
		}
		data := r.data
		for _, n := range r.runs {
			for i := range n.count {
				c := n.chunk + block.Chunk(i)
				ld.put(c, n.entry)
				s.table.dirty[int64(c)/pageWords] = true
			}
			data = o.add(n, data)
		}
	}
	s.log.head = next
	if s.adopted {
		return nil // the page cache is newer than any record (R4)
	}
	for r, slots := range names(records, func(c block.Chunk) Entry { return Entry(ld.into[c]) }) {
		if err := ld.name(r, slots); err != nil {
			return err
		}
	}
	o.keep(func(c block.Chunk) block.Mask { return Entry(ld.into[c]).Stored() })
	if o.len() > 0 {
		s.replayed.Store(o)
	}
	return nil
}

// names yields the runs that name slots, with those slots, whose chunk has the
// row in its final entry. What others say of a row may be older than what the
// table says of it: it was given to another chunk since.
func names(records []*record, final func(block.Chunk) Entry) iter.Seq2[run, []uint32] {
	return func(yield func(run, []uint32) bool) {
		for _, r := range records {
			slots := r.slots
			for _, n := range r.runs {
				k := n.named.Count()
				if k > 0 && final(n.chunk).home() == n.entry.home() && !yield(n, slots[:k]) {
					return
				}
				slots = slots[k:]
			}
		}
	}
}

// name makes the row of r name the slots for the blocks that r names.
func (ld *loader) name(r run, slots []uint32) error {
	row, _ := r.entry.row()
	ld.s.table.dirty[ld.s.rowPage(row)] = true
	if err := ld.s.live.reserveRow(row); err != nil {
		return fmt.Errorf("memory for the live table: %w", err)
	}
	for m := r.named; m != 0; m &= m - 1 {
		ld.s.live.setRowSlot(row, m.First(), slots[0])
		slots = slots[1:]
	}
	return nil
}

// readLog returns the log's bytes.
func readLog(f disk.File, h *Header) ([]byte, error) {
	log := make([]byte, h.logLen)
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	for off, end := h.logOff(), h.logOff()+h.logLen; ; {
		if off, err = f.NextData(off); err != nil {
			return nil, fmt.Errorf("look for data in the log: %w", err)
		}
		if off >= end || off >= size {
			return log, nil
		}
		p := log[off-h.logOff():]
		p = p[:min(1<<20, len(p))]
		n, err := f.ReadAt(p, off)
		if n < len(p) && err != io.EOF {
			return nil, fmt.Errorf("read the log at %d: %w", off, err)
		}
		off += int64(len(p))
	}
}

// scanLog returns the records from the tail on, and where the next one would
// go. The first place without a valid record is the end, but a later valid one
// of the session proves that one is missing: an append begins only after the
// one before is durable (R11).
func scanLog(log []byte, h *Header) ([]*record, place, error) {
	at := place{pos: h.tail, seq: h.tailSeq, chain: h.chain}
	var records []*record
	for at.total < h.logLen {
		r, n, err := decodeRecord(log, h, at.pos)
		if err == nil && (r.epoch != h.epoch || r.seq != at.seq || r.prev != at.chain) {
			err = errNoRecord
		}
		if errors.Is(err, errNoRecord) {
			break
		}
		if err != nil {
			return nil, at, err
		}
		records = append(records, r)
		if r.flags&flagPad != 0 {
			n = h.logLen - at.pos
		}
		at = place{pos: (at.pos + n) % h.logLen, total: at.total + n, seq: at.seq + 1, chain: r.sum}
	}
	for pos := int64(0); pos < h.logLen; pos += pageSize {
		p := log[pos:]
		if le.Uint32(p) != logMagic || le.Uint64(p[8:]) != h.epoch || le.Uint64(p[16:]) < at.seq {
			continue
		}
		if _, _, err := decodeRecord(log, h, pos); errors.Is(err, errNoRecord) {
			continue
		}
		if le.Uint64(p[16:]) == at.seq && pos == at.pos {
			continue
		}
		return nil, at, fmt.Errorf("%w: log record %d at %d, but a later one (%d) is there", ErrCorrupt, at.seq, at.pos, le.Uint64(p[16:]))
	}
	return records, at, nil
}

// publish makes what was read the live table.
func (ld *loader) publish() error {
	ld.ahead.Wait()
	live := ld.s.live
	for from, to := range ld.runs() {
		if err := live.ask(areaHead+from*8, (to-from)*8); err != nil {
			return fmt.Errorf("memory for the live table: %w", err)
		}
		copy(live.entries.plain()[from:to], ld.into[from:to])
	}
	return nil
}

// runs yields the chunks, [from, to), of runs of pages that were read; the
// first and the last of each have an entry.
func (ld *loader) runs() iter.Seq2[int64, int64] {
	return func(yield func(from, to int64) bool) {
		for first, end := range ld.pages.runs() {
			from, to := first*pageWords, min(end*pageWords, int64(len(ld.into)))
			for from < to && ld.into[from] == 0 {
				from++
			}
			for from < to && ld.into[to-1] == 0 {
				to--
			}
			if from < to && !yield(from, to) {
				return
			}
		}
	}
}

// countTaken finds which slots and rows are taken, and refuses a store in which
// two blocks have the same slot or two chunks the same row, or a block lies
// behind the file's end.
func (ld *loader) countTaken() error {
	s := ld.s
	size, err := s.file.Size()
	if err != nil {
		return err
	}
	inFile := (size - s.slotsOff) / int64(s.geo.BlockSize()) // slots, and perhaps a part of one
	slots, rows := newBitmap(ld.limits.slots), newBitmap(ld.limits.rows)
	take := func(c block.Chunk, e Entry) error {
		stored := e.Stored()
		var last uint32 // slot that it may have
		if row, ok := e.row(); ok {
			if !rows.set(row+1, 1) {
				return fmt.Errorf("%w: chunk %d has row %d, which another has too", ErrCorrupt, c, row)
			}
			for ; stored != 0; stored &= stored - 1 {
				slot := s.live.slot(e, stored.First())
				if err := ld.limits.checkSlot(c, int64(slot)); err != nil {
					return fmt.Errorf("%w: row %d: %v", ErrCorrupt, row, err)
				}
				if !slots.set(slot, 1) {
					return fmt.Errorf("%w: chunk %d has slot %d, which another block has too", ErrCorrupt, c, slot)
				}
				last = max(last, slot)
			}
		} else if stored != 0 {
			first := e.straightSlot(stored.First())
			if !slots.set(first, uint64(stored>>stored.First())) {
				return fmt.Errorf("%w: chunk %d has a slot from %d on that another has too", ErrCorrupt, c, first)
			}
			last = e.straightSlot(block.BlocksPerChunk - 1)
		}
		if int64(last) > inFile {
			return ld.checkEnd(c, e, size)
		}
		return nil
	}
	if s.adopted {
		for c, e := range s.live.from(0) {
			err := ld.limits.check(c, e)
			if err == nil {
				err = take(c, e)
			}
			if err != nil {
				return fmt.Errorf("live table in memory: %w", err)
			}
		}
	} else {
		for from, to := range ld.runs() {
			for c := from; c < to; c++ {
				if err := take(block.Chunk(c), Entry(ld.into[c])); err != nil {
					return err
				}
			}
		}
	}
	limit := ld.limits.slots
	if s.opts.Capacity > 0 {
		limit = min(limit, max(0, s.opts.Capacity-s.slotsOff)/int64(s.geo.BlockSize()))
	}
	s.slots.fill(slots, limit)
	s.rows.fill(rows, ld.limits.rows)
	return nil
}

// checkEnd refuses an entry with a block that lies behind the file's end at
// size, and not in the log: what is written next would make a hole of it. Who
// only reads meets an error there, and is told now.
func (ld *loader) checkEnd(c block.Chunk, e Entry, size int64) error {
	s := ld.s
	bs := s.geo.BlockSize()
	for m := e.Stored(); m != 0; m &= m - 1 {
		b := m.First()
		at, _ := s.Locate(e, b)
		// The device may end inside the block, and the file with it.
		n := min(int64(bs), s.geo.Size-s.geo.Offset(c)-int64(b*bs))
		if at+n <= size || s.replayed.Load().block(c, b) != nil {
			continue
		}
		err := fmt.Errorf("%w: chunk %d is stored up to %d, and the file ends at %d: cut short, or copied in part", ErrCorrupt, c, at+n, size)
		if !s.opts.ReadOnly {
			return fmt.Errorf("%w; what is left can be read read-only", err)
		}
		if !s.short {
			s.short = true
			s.logf("%v; what is left can be read", err)
		}
	}
	return nil
}

func allZero(p []byte) bool {
	for len(p) >= pageSize {
		if [pageSize]byte(p) != zeroPage {
			return false
		}
		p = p[pageSize:]
	}
	return string(p) == string(zeroPage[:len(p)])
}
