package exception

import (
	"iter"
	"math/bits"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/cowdev/cowdev/block"
)

// A Memory keeps the live table: what readers see. It may outlive the process,
// so that the next one finds every acknowledged write (R4).
type Memory interface {
	// Attach returns n bytes for the store u: those that an earlier process
	// left, or zeros.
	Attach(u UUID, n int64) (Area, error)
}

// An Area is the memory of one live table.
type Area interface {
	// Bytes returns the memory. Only reserved parts may be touched: where
	// there is no room for a page, to read it is a SIGBUS too.
	Bytes() []byte

	// Reserve makes the pages that hold [off, off+n) safe to touch. It may
	// be called by several goroutines. After an error some of them may be.
	Reserve(off, n int64) error

	// Reserved reports whether Reserve was called for the page of off, by
	// this process or one before.
	Reserved(off int64) bool

	// Lasting reports whether the memory is found again after the death of
	// the process.
	Lasting() bool

	// Release ends the use of the memory, and forgets its contents unless
	// keep is set.
	Release(keep bool) error
}

// A Peeker is a Memory that can be looked at.
type Peeker interface {
	// Peek returns a copy, on the heap, of the n bytes that an earlier process
	// left for the store u, or zeros. It changes nothing.
	Peek(u UUID, n int64) (Area, error)
}

// copyOf is the memory of a store that is only read: what a dead process had
// acknowledged is seen, and left for the next that writes.
type copyOf struct{ m Memory }

func (c copyOf) Attach(u UUID, n int64) (Area, error) {
	if p, ok := c.m.(Peeker); ok {
		return p.Peek(u, n)
	}
	return Heap{}.Attach(u, n)
}

// Heap is a Memory that dies with the process.
type Heap struct{}

// Attach returns n zeros.
func (Heap) Attach(_ UUID, n int64) (Area, error) {
	b, err := zeroed(n)
	return &heapArea{bytes: b, reserved: newPageSet(n)}, err
}

type heapArea struct {
	bytes    []byte
	reserved pageSet
}

func (a *heapArea) Bytes() []byte              { return a.bytes }
func (a *heapArea) Reserve(off, n int64) error { a.reserved.add(off, n); return nil }
func (a *heapArea) Reserved(off int64) bool    { return a.reserved.has(off) }
func (a *heapArea) Lasting() bool              { return false }
func (a *heapArea) Release(bool) error         { return free(a.bytes) }

// pageSet is a set of pages of a memory, that grows while it is asked.
type pageSet words

func newPageSet(n int64) pageSet { return make(pageSet, n/pageSize/64+1) }

// add adds the pages that hold [off, off+n).
func (s pageSet) add(off, n int64) {
	for p := off / pageSize; p*pageSize < off+n; p++ {
		s[p/64].Or(1 << (p % 64))
	}
}

func (s pageSet) has(off int64) bool { return s[off/pageSize/64].Load()>>(off/pageSize%64)&1 != 0 }

// runs yields the runs of pages, [first, end), in order.
func (s pageSet) runs() iter.Seq2[int64, int64] {
	return func(yield func(first, end int64) bool) {
		pages := int64(len(s)) * 64
		for n := int64(0); n < pages; {
			if w := s[n/64].Load() >> (n % 64); w == 0 {
				n += 64 - n%64
				continue
			} else {
				n += int64(bits.TrailingZeros64(w))
			}
			first := n
			for n < pages && s.has(n*pageSize) {
				n++
			}
			if !yield(first, n) {
				return
			}
		}
	}
}

// hasAll reports whether the pages that hold [off, off+n) are in the set.
func (s pageSet) hasAll(off, n int64) bool {
	for p := off / pageSize; p*pageSize < off+n; p++ {
		if !s.has(p * pageSize) {
			return false
		}
	}
	return true
}

// mappedFrom is the size from which memory is mapped rather than allocated, so
// that what is never touched costs nothing.
const mappedFrom = 1 << 20

func zeroed(n int64) ([]byte, error) {
	if n < mappedFrom {
		return make([]byte, n), nil
	}
	return unix.Mmap(-1, 0, int(n), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
}

// populate asks for the pages of memory that lie in [off, off+n) of b, if b is
// mapped: many at once cost a third of a fault each.
func populate(b []byte, off, n int64) {
	if len(b) < mappedFrom {
		return
	}
	at := (off + pageSize - 1) / pageSize * pageSize
	if end := min(off+n, int64(len(b))) / pageSize * pageSize; at < end {
		_ = unix.Madvise(b[at:end], unix.MADV_POPULATE_WRITE) // else by faults
	}
}

func free(b []byte) error {
	if len(b) < mappedFrom {
		return nil
	}
	return unix.Munmap(b)
}

// words is a table of 64-bit words, one a chunk.
type words []atomic.Uint64

func asWords(b []byte) words {
	if len(b) < 8 {
		return nil
	}
	return unsafe.Slice((*atomic.Uint64)(unsafe.Pointer(unsafe.SliceData(b))), len(b)/8)
}

// plain returns the table for use by one goroutine while nobody else knows it:
// a million atomic stores are most of the time that it takes to read a table.
func (w words) plain() []uint64 {
	return unsafe.Slice((*uint64)(unsafe.Pointer(unsafe.SliceData(w))), len(w))
}

// The live memory begins with a page that says whose it is; the words of the
// table follow: the entries, eight bytes a chunk, and the rows.
const (
	areaMagic = 0x65766c5665764977
	areaHead  = pageSize
)

// words of the head page of the live memory.
const (
	headMagic = iota
	headEpoch
	headValid // stateValid once recovery has finished
	headUUID  // two words
	_
	headSeq // number of the log's next record
)

// values of headValid.
const (
	stateValid  = 1
	stateBroken = 2
)

// live is the live table and, a word for each chunk beside it, what its
// writers and the committer need to know.
type live struct {
	area    Area
	there   pageSet // of area: what may be touched; the others are zeros
	head    words
	entries words
	rows    words // a row has rowWords of them
	rowsAt  int64 // the word of the table with which they begin

	chunks   words // dirty mask, flags: below
	chunkMem []byte

	wait [64]stripe

	mu    sync.Mutex
	dirty []block.Chunk // every chunk with flagQueued that is not in taken
	taken []block.Chunk // those whose snapshot is being taken
}

type stripe struct {
	mu   sync.Mutex
	cond sync.Cond
}

// A chunk's word: the blocks written since the last snapshot in the lowest 16
// bits, and flags.
const (
	dirtyBits   = 1<<block.BlocksPerChunk - 1
	flagQueued  = 1 << 16 // in live.dirty: something changed since the last snapshot
	flagClaimed = 1 << 17
	flagWaiting = 1 << 18 // somebody waits for the claim
)

func newLive(m Memory, h *Header) (*live, error) {
	chunks, rowsAt := h.Chunks(), h.rowsAt()
	n := areaHead + h.words()*8
	area, err := m.Attach(h.UUID, n)
	if err != nil {
		return nil, err
	}
	mem, err := zeroed(chunks * 8)
	if err != nil {
		return nil, err
	}
	table := asWords(area.Bytes()[areaHead:])
	l := &live{
		area: area, there: newPageSet(n), head: asWords(area.Bytes()[:areaHead]),
		entries: table[:chunks], rows: table[rowsAt:], rowsAt: rowsAt,
		chunks: asWords(mem), chunkMem: mem,
	}
	for i := range l.wait {
		l.wait[i].cond.L = &l.wait[i].mu
	}
	return l, nil
}

// ask makes the pages of the area that hold [off, off+n) safe to touch.
func (l *live) ask(off, n int64) error {
	if l.there.hasAll(off, n) {
		return nil
	}
	if err := l.area.Reserve(off, n); err != nil {
		return err
	}
	l.there.add(off, n)
	return nil
}

// adopt takes what an earlier process left for the table.
func (l *live) adopt() {
	for off := int64(0); off < int64(len(l.area.Bytes())); off += pageSize {
		if l.area.Reserved(off) {
			l.there.add(off, 1)
		}
	}
}

// valid reports whether the memory was left by a process that served the
// session epoch of store u, and had finished its recovery.
func (l *live) valid(u UUID, epoch uint64) bool {
	return l.area.Reserved(0) && l.head[headMagic].Load() == areaMagic && l.head[headValid].Load() == stateValid &&
		l.head[headEpoch].Load() == epoch && l.isOf(u)
}

// setValid marks the memory as that of the session epoch of store u, whose next
// record has number seq.
func (l *live) setValid(u UUID, epoch, seq uint64) error {
	if err := l.ask(0, areaHead); err != nil {
		return err
	}
	l.head[headEpoch].Store(epoch)
	l.head[headSeq].Store(seq)
	l.head[headUUID].Store(le.Uint64(u[:]))
	l.head[headUUID+1].Store(le.Uint64(u[8:]))
	l.head[headMagic].Store(areaMagic)
	l.head[headValid].Store(stateValid)
	return nil
}

// appended notes the number of the log's next record.
func (l *live) appended(seq uint64) {
	if l.there.has(0) {
		l.head[headSeq].Store(seq)
	}
}

// invalidate makes sure that nobody adopts the memory.
func (l *live) invalidate() {
	if l.area.Reserved(0) {
		l.head[headValid].Store(0)
	}
}

// setBroken leaves word that a sync failed: nobody adopts the memory, and who
// opens the store in this boot does not trust cached pages (R26).
func (l *live) setBroken(u UUID) {
	if l.ask(0, areaHead) == nil {
		l.head[headValid].Store(stateBroken)
		l.head[headUUID].Store(le.Uint64(u[:]))
		l.head[headUUID+1].Store(le.Uint64(u[8:]))
		l.head[headMagic].Store(areaMagic)
	}
}

// wasBroken reports whether the memory was left by a process whose store u
// was broken.
func (l *live) wasBroken(u UUID) bool {
	return l.area.Reserved(0) && l.head[headMagic].Load() == areaMagic && l.head[headValid].Load() == stateBroken && l.isOf(u)
}

func (l *live) isOf(u UUID) bool {
	return l.head[headUUID].Load() == le.Uint64(u[:]) && l.head[headUUID+1].Load() == le.Uint64(u[8:])
}

// forget makes the table empty again: what an earlier process left is not
// adopted.
func (l *live) forget() {
	l.invalidate()
	for c := range l.from(0) {
		l.set(c, 0)
	}
	for i := 0; i < len(l.rows); {
		at := areaHead + (l.rowsAt+int64(i))*8
		end := min(i+int(pageSize-at%pageSize)/8, len(l.rows))
		if l.area.Reserved(at) {
			clear(l.rows[i:end].plain())
		}
		i = end
	}
}

// entriesPerPage is the number of live entries in a page of memory.
const entriesPerPage = pageSize / 8

func (l *live) release(keep bool) error {
	free(l.chunkMem)
	return l.area.Release(keep)
}

// from yields the entries that are not zero, from chunk c on, in order.
func (l *live) from(c block.Chunk) iter.Seq2[block.Chunk, Entry] {
	return func(yield func(block.Chunk, Entry) bool) {
		for i := int(c); i < len(l.entries); {
			if !l.area.Reserved(int64(areaHead + i*8)) {
				i = (i/entriesPerPage + 1) * entriesPerPage
				continue
			}
			if e := Entry(l.entries[i].Load()); e != 0 && !yield(block.Chunk(i), e) {
				return
			}
			i++
		}
	}
}

func (l *live) load(c block.Chunk) Entry {
	if !l.there.has(areaHead + int64(c)*8) {
		return 0
	}
	return Entry(l.entries[c].Load())
}

// reserve makes the entry of c safe to set.
func (l *live) reserve(c block.Chunk) error {
	return l.ask(areaHead+int64(c)*8, 8)
}

func (l *live) set(c block.Chunk, e Entry) { l.entries[c].Store(uint64(e)) }

// reserveRow makes row r safe to set.
func (l *live) reserveRow(r uint32) error {
	return l.ask(areaHead+(l.rowsAt+int64(r)*rowWords)*8, rowWords*8)
}

// clearRow makes row r name no slot. No entry names it.
func (l *live) clearRow(r uint32) {
	for i := range rowWords {
		l.rows[int(r)*rowWords+i].Store(0)
	}
}

// rowSlot returns the slot that row r names for block b, or 0.
func (l *live) rowSlot(r uint32, b int) uint32 {
	word, shift := rowPlace(r, b)
	return uint32(l.rows[word].Load() >> shift)
}

// setRowSlot makes row r name the slot for block b. Only the claim's holder, or
// who loads the table, calls it; but in a load the row names none for the block
// so far: whoever sees a block stored finds its slot, and the same as long as
// the chunk has the row.
func (l *live) setRowSlot(r uint32, b int, slot uint32) {
	word, shift := rowPlace(r, b)
	l.rows[word].Store(withSlot(l.rows[word].Load(), shift, slot))
}

// rowWord returns word n of the table, one of a row.
func (l *live) rowWord(n int64) uint64 {
	if !l.area.Reserved(areaHead + n*8) {
		return 0
	}
	return l.rows[n-l.rowsAt].Load()
}

// rowHasNone reports whether row r names no slot for any block of m.
func (l *live) rowHasNone(r uint32, m block.Mask) bool {
	for ; m != 0; m &= m - 1 {
		if l.rowSlot(r, m.First()) != 0 {
			return false
		}
	}
	return true
}

// slot returns the slot of block b, which e stores.
func (l *live) slot(e Entry, b int) uint32 {
	if r, ok := e.row(); ok {
		return l.rowSlot(r, b)
	}
	return e.straightSlot(b)
}

// run returns the slot of block b, which e stores, and the end of the run of
// stored blocks from b on whose slots follow one another.
func (l *live) run(e Entry, b int) (slot uint32, end int) {
	slot = l.slot(e, b)
	end, _ = e.Stored().Run(b)
	if r, ok := e.row(); ok {
		for k := b + 1; k < end; k++ {
			if l.rowSlot(r, k) != slot+uint32(k-b) {
				return slot, k
			}
		}
	}
	return slot, end
}

// claim waits until nobody else holds the claim of chunk c, and takes it.
func (l *live) claim(c block.Chunk) {
	w := &l.chunks[c]
	for {
		v := w.Load()
		if v&flagClaimed == 0 {
			if w.CompareAndSwap(v, v|flagClaimed) {
				return
			}
			continue
		}
		s := &l.wait[c%block.Chunk(len(l.wait))]
		s.mu.Lock()
		if v = w.Load(); v&flagClaimed != 0 && w.CompareAndSwap(v, v|flagWaiting) {
			s.cond.Wait()
		}
		s.mu.Unlock()
	}
}

// tryClaim takes the claim of chunk c if nobody holds it.
func (l *live) tryClaim(c block.Chunk) bool {
	w := &l.chunks[c]
	for v := w.Load(); v&flagClaimed == 0; v = w.Load() {
		if w.CompareAndSwap(v, v|flagClaimed) {
			return true
		}
	}
	return false
}

func (l *live) unclaim(c block.Chunk) {
	w := &l.chunks[c]
	for {
		v := w.Load()
		if !w.CompareAndSwap(v, v&^(flagClaimed|flagWaiting)) {
			continue
		}
		if v&flagWaiting != 0 {
			s := &l.wait[c%block.Chunk(len(l.wait))]
			s.mu.Lock()
			s.cond.Broadcast()
			s.mu.Unlock()
		}
		return
	}
}

// mark notes that blocks of chunk c changed, or (m is 0) only its mapping. The
// caller has written the data and set the entry, and has not replied yet (R2).
func (l *live) mark(c block.Chunk, m block.Mask) {
	old := l.chunks[c].Or(uint64(m) | flagQueued)
	if old&flagQueued != 0 {
		return
	}
	l.mu.Lock()
	l.dirty = append(l.dirty, c)
	l.mu.Unlock()
}

// takeDirty returns the chunks that changed since it was last called. Each
// still has its marks: unmark takes them.
func (l *live) takeDirty() []block.Chunk {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.taken, l.dirty = l.dirty, nil
	return l.taken
}

// snapshotTaken ends what takeDirty began.
func (l *live) snapshotTaken() {
	l.mu.Lock()
	l.taken = nil
	l.mu.Unlock()
}

// isDirty reports whether anything changed since the last takeDirty.
func (l *live) isDirty() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.dirty) > 0
}

// unmark clears the marks of chunk c and returns the blocks written since they
// were last cleared. An entry that is loaded after it is at least as new as
// the marks.
func (l *live) unmark(c block.Chunk) block.Mask {
	return block.Mask(l.chunks[c].And(^uint64(dirtyBits|flagQueued)) & dirtyBits)
}
