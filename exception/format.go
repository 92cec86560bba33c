package exception

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"iter"
	"math"

	"github.com/cowdev/cowdev/block"
)

// Where things lie in a store. All integers are little-endian.
const (
	pageSize   = 4096 // superblocks, table and log are written in whole pages
	sectorSize = 512  // what a disk writes whole or not at all

	superA   = 0
	superB   = 64 << 10
	tableOff = 128 << 10

	sectorWords = 63 // of a table sector: 504 bytes, then checksum and position
	pageWords   = sectorWords * pageSize / sectorSize

	rowWords = block.BlocksPerChunk / 2 // a row names two slots in each

	recordHead = 64 // bytes of a record before its runs
	runSize    = 24 // bytes of a run
	slotSize   = 4  // bytes of a slot's number
)

// Format constants.
const (
	Version  = 2
	MaxBase  = 512 // bytes kept for the base's identity
	MaxHint  = 512 // bytes kept of the base's file name
	minLog   = 8 * pageSize
	maxLog   = 1 << 30
	superMag = "cowdevCS"
	logMagic = 0x524c5743 // "CWLR"
)

// incompatible, read-only-compatible features known to this version.
const (
	knownIncompat = 0
	knownROCompat = 0
)

var (
	crcTable = crc32.MakeTable(crc32.Castagnoli)
	le       = binary.LittleEndian
)

// Why a store is refused. A message that wraps one of them names what was
// looked at and where.
var (
	ErrNotStore = errors.New("not a cowdev store")
	ErrVersion  = errors.New("made by another version of cowdev")
	ErrCorrupt  = errors.New("damaged")
)

// State is what a store may be used for.
type State uint32

// States of a store.
const (
	Active  State = 1 + iota // takes writes
	Frozen                   // never changes again
	Merging                  // a merge has begun and not ended: the base is partly changed
)

func (s State) String() string {
	switch s {
	case Active:
		return "active"
	case Frozen:
		return "frozen"
	case Merging:
		return "merging"
	}
	return fmt.Sprintf("State(%d)", uint32(s))
}

// UUID names a store, or an epoch's owner.
type UUID [16]byte

func (u UUID) String() string {
	return fmt.Sprintf("%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:])
}

// A Header is what a superblock says.
type Header struct {
	UUID       UUID
	Parent     UUID
	Generation uint64 // raised at every write of a superblock
	State      State
	Clean      bool   // closed in order: the log is empty
	Created    int64  // Unix time in nanoseconds
	Base       []byte // the base's identity, as package image wrote it
	BaseHint   string // the base's file name, for messages only: never opened
	block.Geometry

	compat, roCompat, incompat uint64

	logLen  int64
	tail    int64  // offset in the log of the first record to replay
	tailSeq uint64 // its sequence number
	chain   uint32 // checksum of the record before it
	epoch   uint64 // of the session whose records the log may hold
}

// The table is a sequence of words: an entry for each chunk, and from rowsAt
// on the rows, rowWords each.

// rowsAt returns the number of the word with which the rows begin: they have
// pages of their own.
func (h *Header) rowsAt() int64 { return roundUp(h.Chunks(), pageWords) }

// rows returns the number of rows: one for each chunk, and some more, since
// dropped ones wait to be given back.
func (h *Header) rows() int64 {
	n := h.Chunks()
	return min(n+min(4*n, rowSlack), 1<<31)
}

// rowSlack is how many rows more than one a chunk a store has at most.
const rowSlack = 1 << 16

// words returns the number of the table's words.
func (h *Header) words() int64 { return h.rowsAt() + h.rows()*rowWords }

// tableLen returns the bytes of the table: whole pages.
func (h *Header) tableLen() int64 { return roundUp(h.words(), pageWords) / pageWords * pageSize }

func (h *Header) logOff() int64 { return roundUp(tableOff+h.tableLen(), 64<<10) }

func (h *Header) slotsOff() int64 { return roundUp(h.logOff()+h.logLen, 64<<10) }

// slotOff returns where slot n, counted from 1, begins in the file.
func (h *Header) slotOff(n uint32) int64 {
	return h.slotsOff() + int64(n-1)*int64(h.BlockSize())
}

func roundUp(n, to int64) int64 { return (n + to - 1) / to * to }

// checksum is CRC32C seeded with the store's identity and the position of what
// is summed, so that bytes of another store or another place do not pass
// (R17).
func checksum(u UUID, pos uint64, p []byte) uint32 {
	var seed [24]byte
	copy(seed[:], u[:])
	le.PutUint64(seed[16:], pos)
	return crc32.Update(crc32.Checksum(seed[:], crcTable), crcTable, p)
}

// encodeSuper writes h as the superblock at offset at into a page.
func encodeSuper(h *Header, at int64) []byte {
	p := make([]byte, pageSize)
	copy(p, superMag)
	le.PutUint32(p[8:], Version)
	le.PutUint32(p[12:], uint32(h.State))
	le.PutUint64(p[16:], h.compat)
	le.PutUint64(p[24:], h.roCompat)
	le.PutUint64(p[32:], h.incompat)
	copy(p[40:], h.UUID[:])
	copy(p[56:], h.Parent[:])
	le.PutUint64(p[72:], h.Generation)
	le.PutUint64(p[80:], uint64(h.Size))
	le.PutUint32(p[88:], uint32(h.ChunkSize))
	le.PutUint32(p[92:], uint32(h.BlockSize()))
	le.PutUint64(p[96:], tableOff)
	le.PutUint64(p[104:], uint64(h.tableLen()))
	le.PutUint64(p[112:], uint64(h.logOff()))
	le.PutUint64(p[120:], uint64(h.logLen))
	le.PutUint64(p[128:], uint64(h.slotsOff()))
	le.PutUint64(p[136:], uint64(h.tail))
	le.PutUint64(p[144:], h.tailSeq)
	le.PutUint32(p[152:], h.chain)
	if h.Clean {
		le.PutUint32(p[156:], 1)
	}
	le.PutUint64(p[160:], h.epoch)
	le.PutUint64(p[168:], uint64(h.Created))
	le.PutUint16(p[176:], uint16(len(h.Base)))
	le.PutUint16(p[178:], uint16(len(h.BaseHint)))
	copy(p[512:512+MaxBase], h.Base)
	copy(p[1024:1024+MaxHint], h.BaseHint)
	le.PutUint32(p[pageSize-4:], checksum(h.UUID, uint64(at), p[:pageSize-4]))
	return p
}

// decodeSuper reads the superblock that lies at offset at. Its error wraps
// ErrNotStore, ErrVersion or ErrCorrupt.
func decodeSuper(p []byte, at int64) (*Header, error) {
	if !bytes.Equal(p[:8], []byte(superMag)) {
		return nil, fmt.Errorf("%w: no signature at %d", ErrNotStore, at)
	}
	h := &Header{State: State(le.Uint32(p[12:]))}
	copy(h.UUID[:], p[40:])
	if le.Uint32(p[pageSize-4:]) != checksum(h.UUID, uint64(at), p[:pageSize-4]) {
		return nil, fmt.Errorf("%w: superblock at %d: checksum", ErrCorrupt, at)
	}
	if v := le.Uint32(p[8:]); v != Version {
		return nil, fmt.Errorf("%w: format %d, this version reads %d", ErrVersion, v, Version)
	}
	copy(h.Parent[:], p[56:])
	h.compat, h.roCompat, h.incompat = le.Uint64(p[16:]), le.Uint64(p[24:]), le.Uint64(p[32:])
	h.Generation = le.Uint64(p[72:])
	h.Size, h.ChunkSize = int64(le.Uint64(p[80:])), int(le.Uint32(p[88:]))
	h.logLen = int64(le.Uint64(p[120:]))
	h.tail, h.tailSeq, h.chain = int64(le.Uint64(p[136:])), le.Uint64(p[144:]), le.Uint32(p[152:])
	h.Clean = le.Uint32(p[156:])&1 != 0
	h.epoch = le.Uint64(p[160:])
	h.Created = int64(le.Uint64(p[168:]))
	nb, nh := int(le.Uint16(p[176:])), int(le.Uint16(p[178:]))
	if err := h.validate(p, nb, nh); err != nil {
		return nil, fmt.Errorf("%w: superblock at %d: %v", ErrCorrupt, at, err)
	}
	h.Base = bytes.Clone(p[512 : 512+nb])
	h.BaseHint = string(p[1024 : 1024+nh])
	if f := h.incompat &^ knownIncompat; f != 0 {
		return nil, fmt.Errorf("%w: unknown feature %#x", ErrVersion, f)
	}
	return h, nil
}

// validate holds a superblock whose checksum is right against what a store can
// be, since a checksum proves only that nothing changed it by chance.
func (h *Header) validate(p []byte, nb, nh int) error {
	if err := h.Geometry.Validate(); err != nil {
		return err
	}
	switch {
	case h.State < Active || h.State > Merging:
		return fmt.Errorf("state %d", h.State)
	case h.logLen < minLog || h.logLen > maxLog || h.logLen%pageSize != 0:
		return fmt.Errorf("log of %d bytes", h.logLen)
	case h.tail < 0 || h.tail >= h.logLen || h.tail%pageSize != 0:
		return fmt.Errorf("log begins at %d of %d", h.tail, h.logLen)
	case int(le.Uint32(p[92:])) != h.BlockSize():
		return fmt.Errorf("block size %d in chunks of %d", le.Uint32(p[92:]), h.ChunkSize)
	case le.Uint64(p[96:]) != tableOff || le.Uint64(p[104:]) != uint64(h.tableLen()) ||
		le.Uint64(p[112:]) != uint64(h.logOff()) || le.Uint64(p[128:]) != uint64(h.slotsOff()):
		return errors.New("table, log or slots not where this version puts them")
	case nb > MaxBase || nh > MaxHint:
		return fmt.Errorf("identity of %d bytes, name of %d", nb, nh)
	}
	return nil
}

// An Entry is what the store knows of a chunk: which of its blocks are stored,
// which are zero, and the home of the stored ones. A block in neither mask is
// the origin's. The zero Entry is a chunk without exceptions.
//
// Bits 0 to 31 are the home, 32 to 47 the stored mask, 48 to 63 the zero mask.
//
// A home names the slot of each stored block in one of two ways. Straight:
// block b has slot home+b-homeBias, so blocks that were written one after
// another need no more than their entry. Or it has homeRow set, and the rest
// is the number of a row of the table, which names a slot for each block by
// itself.
type Entry uint64

const (
	homeRow  = 1 << 31
	homeBias = block.BlocksPerChunk - 1 // a home of 0 is none

	maxSlot = homeRow - block.BlocksPerChunk
)

func makeEntry(home uint32, stored, zero block.Mask) Entry {
	if stored == 0 {
		home = 0
	}
	return Entry(home) | Entry(stored)<<32 | Entry(zero)<<48
}

// straight returns the home of a chunk whose block b has the slot.
func straight(slot uint32, b int) uint32 { return slot + homeBias - uint32(b) }

func (e Entry) home() uint32 { return uint32(e) }

// row returns the number of the row that names the stored blocks' slots, and
// whether one does.
func (e Entry) row() (uint32, bool) { return e.home() &^ homeRow, e.home()&homeRow != 0 }

// straightSlot returns the slot of block b of an entry without a row.
func (e Entry) straightSlot(b int) uint32 { return e.home() + uint32(b) - homeBias }

// Stored returns the blocks whose bytes are in the store.
func (e Entry) Stored() block.Mask { return block.Mask(e >> 32) }

// Zero returns the blocks that read as zeros.
func (e Entry) Zero() block.Mask { return block.Mask(e >> 48) }

// State returns where block b comes from.
func (e Entry) State(b int) block.State {
	switch {
	case e.Stored().Has(b):
		return block.Stored
	case e.Zero().Has(b):
		return block.Zero
	}
	return block.FromBase
}

// limits are what an entry is held against.
type limits struct {
	chunks, slots, rows int64
	last                block.Mask // the last chunk's blocks
}

func (h *Header) limits() limits {
	n := h.Chunks()
	slots := (2*n + slotSlack) * block.BlocksPerChunk
	return limits{n, min(slots, maxSlot), h.rows(), h.Blocks(block.Chunk(n - 1))}
}

// slotSlack is for how many chunks more than twice those of the device a store
// may come to have slots: dropped ones wait for a commit and their readers
// before they are taken again.
const slotSlack = 1 << 16

// check reports why e cannot be the entry of chunk c, or nil (R21). The slots
// that a row names are not looked at.
func (l *limits) check(c block.Chunk, e Entry) error {
	stored, zero := e.Stored(), e.Zero()
	blocks := block.AllBlocks
	if int64(c) == l.chunks-1 {
		blocks = l.last
	}
	switch {
	case int64(c) >= l.chunks:
		return fmt.Errorf("entry for chunk %d, the device has %d", c, l.chunks)
	case stored&zero != 0:
		return fmt.Errorf("chunk %d: blocks %#x both stored and zero", c, stored&zero)
	case (stored == 0) != (e.home() == 0):
		return fmt.Errorf("chunk %d: home %#x with stored blocks %#x", c, e.home(), stored)
	case (stored|zero)&^blocks != 0:
		return fmt.Errorf("chunk %d: blocks %#x lie beyond the device", c, (stored|zero)&^blocks)
	case stored == 0:
		return nil
	}
	if row, ok := e.row(); ok {
		if int64(row) >= l.rows {
			return fmt.Errorf("chunk %d: row %d, a store of %d chunks has %d", c, row, l.chunks, l.rows)
		}
		return nil
	}
	if err := l.checkSlot(c, int64(e.home())+int64(stored.First())-homeBias); err != nil {
		return err
	}
	return l.checkSlot(c, int64(e.home())+int64(stored.Last())-homeBias)
}

// checkSlot reports why a block of chunk c cannot have the slot, or nil.
func (l *limits) checkSlot(c block.Chunk, slot int64) error {
	if slot < 1 || slot > l.slots {
		return fmt.Errorf("chunk %d: slot %d, a store of %d chunks has no such slot", c, slot, l.chunks)
	}
	return nil
}

// rowPlace returns which word of the rows names the slot of block b of row r,
// and by how many bits it is shifted there.
func rowPlace(r uint32, b int) (word int64, shift int) {
	return int64(r)*rowWords + int64(b/2), b % 2 * 32
}

// withSlot returns the word w of a row with the slot at the shift.
func withSlot(w uint64, shift int, slot uint32) uint64 {
	return w&^(math.MaxUint32<<shift) | uint64(slot)<<shift
}

// encodeSector writes sectorWords words into the 512 bytes of p, as table
// sector number n. A sector of zeros alone is all zeros.
func encodeSector(p []byte, u UUID, n int64, word func(i int) uint64) {
	clear(p[:sectorSize])
	used := false
	for i := range sectorWords {
		if w := word(i); w != 0 {
			le.PutUint64(p[i*8:], w)
			used = true
		}
	}
	if !used {
		return
	}
	le.PutUint32(p[508:], uint32(n)+1)
	le.PutUint32(p[504:], sectorSum(p, u, n))
}

func sectorSum(p []byte, u UUID, n int64) uint32 {
	var tail [4]byte
	copy(tail[:], p[508:512])
	return crc32.Update(checksum(u, uint64(tableOff+n*sectorSize), p[:504]), crcTable, tail[:])
}

// checkSector checks the 512 bytes of table sector n.
func (h *Header) checkSector(p []byte, n int64) error {
	if p[508] == 0 && bytes.Equal(p[:sectorSize], zeroPage[:sectorSize]) {
		return nil
	}
	if le.Uint32(p[508:]) != uint32(n)+1 || le.Uint32(p[504:]) != sectorSum(p, h.UUID, n) {
		return fmt.Errorf("%w: table sector %d: checksum (%s)", ErrCorrupt, n, h.sectorHolds(n))
	}
	return nil
}

// sectorHolds says what the words of table sector n tell of.
func (h *Header) sectorHolds(n int64) string {
	if first := n * sectorWords; first < h.rowsAt() {
		return fmt.Sprintf("chunks %d to %d", first, first+sectorWords-1)
	}
	first := (n*sectorWords - h.rowsAt()) / rowWords
	last := (n*sectorWords + sectorWords - 1 - h.rowsAt()) / rowWords
	return fmt.Sprintf("rows %d to %d", first, last)
}

// wordsOf yields the words of a sector that are not zero.
func wordsOf(p []byte) iter.Seq2[int, uint64] {
	return func(yield func(int, uint64) bool) {
		for i := range sectorWords {
			if w := le.Uint64(p[i*8:]); w != 0 && !yield(i, w) {
				return
			}
		}
	}
}

var zeroPage [pageSize]byte

// A run says that count chunks from chunk on have the entry; here marks the
// blocks whose bytes the record holds, named those whose slots it names: the
// entry's row has, by the records before, the slots of the others. A run with
// stored blocks is one chunk long.
type run struct {
	chunk block.Chunk
	count uint32
	entry Entry
	here  block.Mask
	named block.Mask
}

// Flags of a record.
const (
	flagBarrier = 1 << iota // the data of every earlier record is in place (R6)
	flagPad                 // nothing more until the log's end: go on at its beginning
)

// A record is one commit, or a part of a large one, in the log.
type record struct {
	flags uint32
	epoch uint64
	seq   uint64
	prev  uint32 // checksum of the record before
	runs  []run
	slots []uint32 // of the blocks that the runs' named masks name, in their order
	data  []byte   // the blocks that the runs' here masks name, in their order
	sum   uint32
}

// dataAt returns where in a record its data begins.
func dataAt(runs, slots int) int { return recordHead + runs*runSize + slots*slotSize }

// recordLen returns the bytes that a record takes: whole pages (R10).
func recordLen(runs, slots, data int) int64 {
	return roundUp(int64(dataAt(runs, slots)+data), pageSize)
}

// encode writes r for position pos of the log into p, which is recordLen bytes
// of zeros but for the data, already in its place, and sets r.sum.
func (r *record) encode(p []byte, u UUID, pos int64) {
	le.PutUint32(p[0:], logMagic)
	le.PutUint32(p[4:], r.flags)
	le.PutUint64(p[8:], r.epoch)
	le.PutUint64(p[16:], r.seq)
	le.PutUint32(p[24:], uint32(len(p)))
	le.PutUint32(p[28:], uint32(len(r.runs)))
	le.PutUint32(p[32:], uint32(len(r.data)))
	le.PutUint32(p[36:], r.prev)
	le.PutUint32(p[40:], 0)
	le.PutUint32(p[44:], uint32(len(r.slots)))
	for i, n := range r.runs {
		q := p[recordHead+i*runSize:]
		le.PutUint32(q[0:], uint32(n.chunk))
		le.PutUint32(q[4:], n.count)
		le.PutUint64(q[8:], uint64(n.entry))
		le.PutUint16(q[16:], uint16(n.here))
		le.PutUint16(q[18:], uint16(n.named))
	}
	for i, slot := range r.slots {
		le.PutUint32(p[dataAt(len(r.runs), i):], slot)
	}
	r.sum = checksum(u, uint64(pos), p)
	le.PutUint32(p[40:], r.sum)
}

// errNoRecord says that no whole record lies where one was looked for.
var errNoRecord = errors.New("no record")

// decodeRecord reads the record at position pos of a log whose bytes are log.
// The record's data is a part of log.
func decodeRecord(log []byte, h *Header, pos int64) (*record, int64, error) {
	p := log[pos:]
	if len(p) < pageSize || le.Uint32(p) != logMagic {
		return nil, 0, errNoRecord
	}
	n := int64(le.Uint32(p[24:]))
	runs, data, slots := int64(le.Uint32(p[28:])), int64(le.Uint32(p[32:])), int64(le.Uint32(p[44:]))
	if n < pageSize || n > int64(len(p)) || n%pageSize != 0 || recordHead+runs*runSize+slots*slotSize+data > n {
		return nil, 0, errNoRecord
	}
	r := &record{
		flags: le.Uint32(p[4:]), epoch: le.Uint64(p[8:]), seq: le.Uint64(p[16:]),
		prev: le.Uint32(p[36:]), sum: le.Uint32(p[40:]),
	}
	sum := checksum(h.UUID, uint64(pos), p[:40])
	sum = crc32.Update(sum, crcTable, zeroPage[:4])
	if crc32.Update(sum, crcTable, p[44:n]) != r.sum {
		return nil, 0, errNoRecord
	}
	r.runs = make([]run, runs)
	for i := range r.runs {
		q := p[recordHead+i*runSize:]
		r.runs[i] = run{
			chunk: block.Chunk(le.Uint32(q)), count: le.Uint32(q[4:]), entry: Entry(le.Uint64(q[8:])),
			here: block.Mask(le.Uint16(q[16:])), named: block.Mask(le.Uint16(q[18:])),
		}
	}
	if slots > 0 {
		r.slots = make([]uint32, slots)
	}
	for i := range r.slots {
		r.slots[i] = le.Uint32(p[dataAt(int(runs), i):])
	}
	r.data = p[dataAt(int(runs), int(slots)):][:data]
	return r, n, r.validate(h)
}

// validate holds a record whose checksum is right against the device's shape.
func (r *record) validate(h *Header) error {
	bad := func(format string, args ...any) error {
		return fmt.Errorf("%w: log record %d: %s", ErrCorrupt, r.seq, fmt.Sprintf(format, args...))
	}
	data, slots := 0, 0
	limits := h.limits()
	for _, n := range r.runs {
		last := int64(n.chunk) + int64(n.count) - 1
		if n.count == 0 || n.count > 1 && n.entry.Stored() != 0 || last >= limits.chunks {
			return bad("run of %d from chunk %d", n.count, n.chunk)
		}
		for _, c := range []block.Chunk{n.chunk, block.Chunk(last)} {
			if err := limits.check(c, n.entry); err != nil {
				return bad("%v", err)
			}
		}
		if n.here&^n.entry.Stored() != 0 {
			return bad("data for blocks of chunk %d that are not stored", n.chunk)
		}
		if _, row := n.entry.row(); n.named&^n.entry.Stored() != 0 || n.named != 0 && !row {
			return bad("slots for blocks of chunk %d that have none in a row", n.chunk)
		}
		data += n.here.Count() * h.BlockSize()
		slots += n.named.Count()
	}
	if data != len(r.data) || slots != len(r.slots) {
		return bad("%d bytes of data and %d slots, its blocks have %d and %d", len(r.data), len(r.slots), data, slots)
	}
	for i, slot := range r.slots {
		if slot < 1 || int64(slot) > limits.slots {
			return bad("slot %d, the %dth of %d, which the store has not", slot, i+1, slots)
		}
	}
	return nil
}
