package exception

import (
	"io"
	"slices"
	"sync"

	"github.com/cowdev/cowdev/block"
)

// inlineLimit is how much dirty data, in bytes, a commit writes into the log
// with its mappings, for one device flush, rather than sync it in place.
const inlineLimit = 128 << 10

// commits is the queue of Flush callers, of whom one leads.
type commits struct {
	mu    sync.Mutex
	cond  sync.Cond
	begun uint64 // commits whose snapshot has begun
	ended uint64 // commits that have ended: all up to this one
	busy  bool   // one is running

	// The committer's own.
	inline bool   // a record since the last barrier holds data (R6)
	data   []byte // the memory of what a snapshot copies

	unsyncedMu sync.Mutex
	unsynced   []change   // what is not known to be in place, and durable there
	forgotten  int        // of it, how much came before and was synced
	checking   sync.Mutex // held by the checkpoint
	background sync.WaitGroup
	pending    bool // a checkpoint in the background has been asked for; under mu
}

// A change is what a snapshot found of a chunk: its entry, and the blocks
// written since the snapshot before.
type change struct {
	chunk block.Chunk
	mask  block.Mask
	entry Entry
}

// Flush returns when every change that was acknowledged before it was called
// is durable (3). Callers share commits: each waits for the first whose
// snapshot is not before its arrival (R3).
func (s *Store) Flush() error {
	if s.opts.ReadOnly {
		return nil
	}
	if !s.started.Load() {
		if s.shape.Clean {
			return nil // nothing was written since it was closed
		}
		if err := s.begin(); err != nil {
			return err
		}
	}
	c := &s.commits
	c.mu.Lock()
	defer c.mu.Unlock()
	for want := c.begun + 1; c.ended < want && s.broken.Load() == nil; {
		if c.busy {
			c.cond.Wait()
			continue
		}
		c.busy = true
		c.begun++
		c.mu.Unlock()
		s.commit()
		c.mu.Lock()
		c.busy = false
		c.ended = c.begun
		c.cond.Broadcast()
	}
	return s.Broken()
}

// commit makes the live table durable. An error has broken the store.
func (s *Store) commit() error {
	// Slots and rows given up are looked at before the marks: the commit then
	// covers every chunk that gave one up.
	slots, rows := s.slots.takePending(), s.rows.takePending()
	chunks := s.live.takeDirty()
	if len(chunks) == 0 && len(slots) == 0 && len(rows) == 0 {
		s.harvest()
		return nil
	}
	changes, data, whole := s.snapshot(chunks)
	var err error
	if whole {
		err = s.commitInline(changes, data)
	} else {
		err = s.commitInPlace(changes)
	}
	if err != nil {
		return err
	}
	epoch := s.readers.advance()
	s.slots.drainAfter(epoch, slots)
	s.rows.drainAfter(epoch, rows)
	s.harvest()
	if s.log.pending() > s.checkpointAfter() {
		s.checkpointSoon()
	}
	return nil
}

// snapshot takes the entries of chunks and clears their marks. Where little is
// dirty it also copies the dirty blocks, each chunk's under its claim so that
// no write is half in it (R7), and says that the copy is whole.
func (s *Store) snapshot(chunks []block.Chunk) (changes []change, data []byte, whole bool) {
	bs := s.geo.BlockSize()
	room := int(s.maxRecord()) - dataAt(len(chunks), len(chunks)*block.BlocksPerChunk)
	limit := min(room, inlineLimit)
	whole = limit > 0
	data = s.commits.data[:0]
	slices.Sort(chunks)
	changes = make([]change, 0, len(chunks))
	for _, c := range chunks {
		if !whole {
			m := s.live.unmark(c)
			changes = append(changes, change{c, m, s.live.load(c)})
			continue
		}
		s.Claim(c)
		m := s.live.unmark(c)
		e := s.live.load(c)
		changes = append(changes, change{c, m, e})
		for b := range block.BlocksPerChunk {
			if whole && (m & e.Stored()).Has(b) {
				data, whole = s.copyBlock(data, e, b, limit-bs)
			}
		}
		s.Release(c)
	}
	s.commits.unsyncedMu.Lock()
	for _, ch := range changes {
		// What was dropped before anybody asked for it is in no record
		// either, so that no checkpoint would come to forget it.
		if ch.mask&ch.entry.Stored() != 0 {
			s.commits.unsynced = append(s.commits.unsynced, ch)
		}
	}
	s.commits.unsyncedMu.Unlock()
	s.live.snapshotTaken()
	s.commits.data = data
	return changes, data, whole
}

// copyBlock appends block b of the slot of e to data, and reports whether it
// could, with at most limit bytes there already.
func (s *Store) copyBlock(data []byte, e Entry, b, limit int) ([]byte, bool) {
	if len(data) > limit {
		return data, false
	}
	bs := s.geo.BlockSize()
	n := len(data)
	data = slices.Grow(data, bs)[:n+bs]
	clear(data[n:])
	at, _ := s.Locate(e, b)
	got, err := s.file.ReadAt(data[n:], at)
	if err != nil && (err != io.EOF || got == 0) {
		return data, false
	}
	return data, true // the file may end inside the device's last block
}

// commitInline makes changes durable by one record that holds their data too.
func (s *Store) commitInline(changes []change, data []byte) error {
	runs := make([]run, 0, len(changes))
	var slots []uint32
	for _, ch := range changes {
		if here := ch.mask & ch.entry.Stored(); here != 0 || s.differs(ch) {
			r := run{ch.chunk, 1, ch.entry, here, s.unnamed(ch)}
			runs, slots = append(runs, r), s.appendSlots(slots, r)
		}
	}
	if len(runs) == 0 {
		return nil
	}
	if err := s.append(0, runs, slots, data); err != nil {
		return err
	}
	s.commits.inline = s.commits.inline || len(data) > 0
	s.apply(changes)
	return nil
}

// commitInPlace syncs the data where it lies and then records the mappings
// that changed, in as many records as they need, each a barrier: what older
// ones hold is in place by now (R6).
func (s *Store) commitInPlace(changes []change) error {
	if err := s.sync(); err != nil {
		return err
	}
	var runs []run
	var slots []uint32
	from := 0
	for i, ch := range changes {
		if !s.differs(ch) {
			continue
		}
		if n := len(runs); n > 0 && ch.entry.Stored() == 0 && ch.entry == runs[n-1].entry &&
			int64(ch.chunk) == int64(runs[n-1].chunk)+int64(runs[n-1].count) {
			runs[n-1].count++
			continue
		}
		if int64(dataAt(len(runs)+1, len(slots)+block.BlocksPerChunk)) > s.maxRecord() {
			if err := s.append(flagBarrier, runs, slots, nil); err != nil {
				return err
			}
			s.apply(changes[from:i])
			runs, slots, from = runs[:0], slots[:0], i
		}
		r := run{ch.chunk, 1, ch.entry, 0, s.unnamed(ch)}
		runs, slots = append(runs, r), s.appendSlots(slots, r)
	}
	if len(runs) == 0 && !s.commits.inline {
		return nil
	}
	if err := s.append(flagBarrier, runs, slots, nil); err != nil {
		return err
	}
	s.commits.inline = false
	s.apply(changes[from:])
	return nil
}

// unnamed returns the blocks whose slots a record of ch must name: those that
// its row has got since the last.
func (s *Store) unnamed(ch change) block.Mask {
	row, ok := ch.entry.row()
	if !ok {
		return 0
	}
	was := Entry(s.committed[ch.chunk].Load())
	if old, ok := was.row(); ok && old == row {
		return ch.entry.Stored() &^ was.Stored()
	}
	return ch.entry.Stored()
}

// appendSlots appends the slots that r names. The row names them as long as a
// commit runs that found it in an entry.
func (s *Store) appendSlots(slots []uint32, r run) []uint32 {
	for m := r.named; m != 0; m &= m - 1 {
		slots = append(slots, s.live.slot(r.entry, m.First()))
	}
	return slots
}

// differs reports whether the entry of ch is not the committed one.
func (s *Store) differs(ch change) bool {
	return Entry(s.committed[ch.chunk].Load()) != ch.entry
}

// apply makes changes, which are durable, the committed entries.
func (s *Store) apply(changes []change) {
	s.log.mu.Lock()
	defer s.log.mu.Unlock()
	for _, ch := range changes {
		if !s.differs(ch) {
			continue
		}
		if s.unnamed(ch) != 0 {
			row, _ := ch.entry.row()
			s.table.touch(s.rowPage(row))
		}
		s.committed[ch.chunk].Store(uint64(ch.entry))
		s.table.touch(int64(ch.chunk) / pageWords)
	}
	s.log.applied = s.log.head
}

// sync makes the data in place durable, for the committer and recovery. What
// is dirty from then on is what was written since it began.
func (s *Store) sync() error {
	return s.commits.syncing(func() error {
		if err := s.file.Sync(); err != nil {
			return s.fail("sync the store", err)
		}
		return nil
	})
}

// syncing runs sync, and notes what it made durable.
func (c *commits) syncing(sync func() error) error {
	c.unsyncedMu.Lock()
	upTo := c.forgotten + len(c.unsynced)
	c.unsyncedMu.Unlock()
	if err := sync(); err != nil {
		return err
	}
	c.unsyncedMu.Lock()
	if n := upTo - c.forgotten; n > 0 { // else another sync noted it
		c.unsynced = slices.Delete(c.unsynced, 0, n)
		c.forgotten = upTo
	}
	c.unsyncedMu.Unlock()
	return nil
}

// syncBeside makes what was written durable, for what runs beside the
// committer. They take turns, and none goes on after the failure of another:
// it may have been told of what this one relies on. The committer is told by
// the file itself (R8).
func (s *Store) syncBeside(what string) error {
	s.besideMu.Lock()
	defer s.besideMu.Unlock()
	if err := s.Broken(); err != nil {
		return err
	}
	if err := s.file.SyncBeside(); err != nil {
		return s.fail(what, err)
	}
	return nil
}

// unsyncedBlocks returns the stored blocks that were written since the last
// sync that succeeded began.
func (c *commits) unsyncedBlocks(s *Store) map[block.Chunk]block.Mask {
	lost := make(map[block.Chunk]block.Mask)
	c.unsyncedMu.Lock()
	for _, ch := range c.unsynced {
		lost[ch.chunk] |= ch.mask
	}
	c.unsyncedMu.Unlock()
	s.live.mu.Lock()
	for _, ch := range s.live.dirty {
		lost[ch] |= block.Mask(s.live.chunks[ch].Load() & dirtyBits)
	}
	for _, ch := range s.live.taken { // their marks may be gone already
		lost[ch] |= block.AllBlocks
	}
	s.live.mu.Unlock()
	return lost
}

// checkpointSoon begins a checkpoint in the background, unless one is under way.
func (s *Store) checkpointSoon() {
	c := &s.commits
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.pending {
		return
	}
	c.pending = true
	c.background.Add(1)
	go func() {
		defer c.background.Done()
		s.checkpoint() // its error has broken the store, which says so
		c.mu.Lock()
		c.pending = false
		c.mu.Unlock()
	}()
}

// wait returns when nothing runs in the background.
func (c *commits) wait() { c.background.Wait() }

// checkpoint brings the table up to the log's applied end and frees the log up
// to there (R15). It runs beside a commit, never beside another checkpoint.
func (s *Store) checkpoint() error {
	c, l := &s.commits, &s.log
	c.checking.Lock()
	defer c.checking.Unlock()
	if b := s.broken.Load(); b != nil {
		return b.err
	}
	l.mu.Lock()
	to := l.applied
	pages := s.table.takeDirty()
	idle := to.total == l.tail.total && len(pages) == 0
	l.mu.Unlock()
	if idle {
		return nil
	}
	if err := c.syncing(func() error { return s.syncBeside("sync the store") }); err != nil {
		return err
	}
	if err := s.writeTable(pages); err != nil {
		return err
	}
	if err := s.writeSuper(func(h *Header) { h.tail, h.tailSeq, h.chain = to.pos, to.seq, to.chain }); err != nil {
		return err
	}
	l.mu.Lock()
	l.tail = to
	l.mu.Unlock()
	return nil
}

// writeTable writes pages of the table from the committed entries and syncs
// them.
func (s *Store) writeTable(pages map[int64]bool) error {
	if len(pages) == 0 {
		return nil
	}
	order := make([]int64, 0, len(pages))
	for n := range pages {
		order = append(order, n)
	}
	slices.Sort(order)
	p := make([]byte, pageSize)
	for _, n := range order {
		s.encodePage(p, n)
		if _, err := s.file.WriteAt(p, tableOff+n*pageSize); err != nil {
			return s.fail("write the table", err)
		}
	}
	return s.syncBeside("sync the table")
}

// encodePage writes page n of the table into p.
func (s *Store) encodePage(p []byte, n int64) {
	for i := range int64(pageSize / sectorSize) {
		sector := n*pageSize/sectorSize + i
		encodeSector(p[i*sectorSize:], s.shape.UUID, sector, func(k int) uint64 {
			return s.committedWord(sector*sectorWords + int64(k))
		})
	}
}

// committedWord returns word n of the table as the log's records make it. A row
// is as its chunk has it now: it names more slots than are committed, perhaps,
// but never another for a block that is.
func (s *Store) committedWord(n int64) uint64 {
	switch row := n - s.live.rowsAt; {
	case n < int64(len(s.committed)):
		return s.committed[n].Load()
	case row < 0 || row >= int64(len(s.live.rows)):
		return 0
	}
	return s.live.rowWord(n)
}
