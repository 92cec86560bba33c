package exception

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"iter"

	"github.com/cowdev/cowdev/block"
)

// Where things lie in a store. All integers are little-endian.
const (
	pageSize   = 4096 // superblocks, table and log are written in whole pages
	sectorSize = 512  // what a disk writes whole or not at all

	superA   = 0
	superB   = 64 << 10
	tableOff = 128 << 10

	sectorEntries = 63 // entries of a table sector: 504 bytes, then checksum and position
	pageEntries   = sectorEntries * pageSize / sectorSize

	recordHead = 64 // bytes of a record before its runs
	runSize    = 24 // bytes of a run
)

// Format constants.
const (
	Version  = 1
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
	ErrVersion  = errors.New("made by a newer version of cowdev")
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

// tableLen returns the bytes of the table: whole pages.
func (h *Header) tableLen() int64 {
	pages := (h.Chunks() + pageEntries - 1) / pageEntries
	return pages * pageSize
}

func (h *Header) logOff() int64 { return roundUp(tableOff+h.tableLen(), 64<<10) }

func (h *Header) slotsOff() int64 {
	return roundUp(h.logOff()+h.logLen, int64(max(64<<10, h.ChunkSize)))
}

// slotOff returns where slot n, counted from 1, begins in the file.
func (h *Header) slotOff(n uint32) int64 {
	return h.slotsOff() + int64(n-1)*int64(h.ChunkSize)
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

// An Entry is what the store knows of a chunk: the slot that holds its stored
// blocks, which blocks those are, and which are zero. A block in neither mask
// is the origin's. The zero Entry is a chunk without exceptions.
//
// Bits 0 to 31 are the slot, 32 to 47 the stored mask, 48 to 63 the zero mask.
type Entry uint64

func makeEntry(slot uint32, stored, zero block.Mask) Entry {
	if stored == 0 {
		slot = 0
	}
	return Entry(slot) | Entry(stored)<<32 | Entry(zero)<<48
}

// Slot returns the chunk's slot, counted from 1, or 0 where nothing is stored.
func (e Entry) Slot() uint32 { return uint32(e) }

// Stored returns the blocks whose bytes are in the slot.
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
	chunks, slots int64
	last          block.Mask // the last chunk's blocks
}

func (h *Header) limits() limits {
	n := h.Chunks()
	return limits{n, 2*n + slotSlack, h.Blocks(block.Chunk(n - 1))}
}

// check reports why e cannot be the entry of chunk c, or nil (R21).
func (l *limits) check(c block.Chunk, e Entry) error {
	stored, zero, slot := e.Stored(), e.Zero(), e.Slot()
	blocks := block.AllBlocks
	if int64(c) == l.chunks-1 {
		blocks = l.last
	}
	switch {
	case int64(c) >= l.chunks:
		return fmt.Errorf("entry for chunk %d, the device has %d", c, l.chunks)
	case stored&zero != 0:
		return fmt.Errorf("chunk %d: blocks %#x both stored and zero", c, stored&zero)
	case (stored == 0) != (slot == 0):
		return fmt.Errorf("chunk %d: slot %d with stored blocks %#x", c, slot, stored)
	case (stored|zero)&^blocks != 0:
		return fmt.Errorf("chunk %d: blocks %#x lie beyond the device", c, (stored|zero)&^blocks)
	case int64(slot) > l.slots:
		return fmt.Errorf("chunk %d: slot %d, a store of %d chunks has no such slot", c, slot, l.chunks)
	}
	return nil
}

// slotSlack is how many slots more than two a chunk a store may come to use:
// dropped ones wait for a commit and their readers before they are taken again.
const slotSlack = 1 << 16

// encodeSector writes up to sectorEntries entries into the 512 bytes of p, as
// table sector number n. A sector without entries is all zeros.
func encodeSector(p []byte, u UUID, n int64, entry func(i int) Entry) {
	clear(p[:sectorSize])
	used := false
	for i := range sectorEntries {
		if e := entry(i); e != 0 {
			le.PutUint64(p[i*8:], uint64(e))
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
func checkSector(p []byte, u UUID, n int64) error {
	if p[508] == 0 && bytes.Equal(p[:sectorSize], zeroPage[:sectorSize]) {
		return nil
	}
	if le.Uint32(p[508:]) != uint32(n)+1 || le.Uint32(p[504:]) != sectorSum(p, u, n) {
		return fmt.Errorf("%w: table sector %d (chunks %d to %d): checksum", ErrCorrupt, n, n*sectorEntries, (n+1)*sectorEntries-1)
	}
	return nil
}

// entriesOf yields the entries of a sector that are not zero.
func entriesOf(p []byte) iter.Seq2[int, Entry] {
	return func(yield func(int, Entry) bool) {
		for i := range sectorEntries {
			if e := Entry(le.Uint64(p[i*8:])); e != 0 && !yield(i, e) {
				return
			}
		}
	}
}

var zeroPage [pageSize]byte

// A run says that count chunks from chunk on have the entry; here marks the
// blocks whose bytes the record holds. A run with a slot is one chunk long.
type run struct {
	chunk block.Chunk
	count uint32
	entry Entry
	here  block.Mask
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
	data  []byte // the blocks that the runs' here masks name, in their order
	sum   uint32
}

// recordLen returns the bytes that a record takes: whole pages (R10).
func recordLen(runs, data int) int64 {
	return roundUp(int64(recordHead+runs*runSize+data), pageSize)
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
	for i, n := range r.runs {
		q := p[recordHead+i*runSize:]
		le.PutUint32(q[0:], uint32(n.chunk))
		le.PutUint32(q[4:], n.count)
		le.PutUint64(q[8:], uint64(n.entry))
		le.PutUint16(q[16:], uint16(n.here))
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
	runs, data := int64(le.Uint32(p[28:])), int64(le.Uint32(p[32:]))
	if n < pageSize || n > int64(len(p)) || n%pageSize != 0 || recordHead+runs*runSize+data > n {
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
		r.runs[i] = run{block.Chunk(le.Uint32(q)), le.Uint32(q[4:]), Entry(le.Uint64(q[8:])), block.Mask(le.Uint16(q[16:]))}
	}
	r.data = p[recordHead+runs*runSize:][:data]
	return r, n, r.validate(h)
}

// validate holds a record whose checksum is right against the device's shape.
func (r *record) validate(h *Header) error {
	data := 0
	limits := h.limits()
	for _, n := range r.runs {
		last := int64(n.chunk) + int64(n.count) - 1
		if n.count == 0 || n.count > 1 && n.entry.Slot() != 0 || last >= limits.chunks {
			return fmt.Errorf("%w: log record %d: run of %d from chunk %d", ErrCorrupt, r.seq, n.count, n.chunk)
		}
		for _, c := range []block.Chunk{n.chunk, block.Chunk(last)} {
			if err := limits.check(c, n.entry); err != nil {
				return fmt.Errorf("%w: log record %d: %v", ErrCorrupt, r.seq, err)
			}
		}
		if n.here&^n.entry.Stored() != 0 {
			return fmt.Errorf("%w: log record %d: data for blocks of chunk %d that are not stored", ErrCorrupt, r.seq, n.chunk)
		}
		data += n.here.Count() * h.BlockSize()
	}
	if data != len(r.data) {
		return fmt.Errorf("%w: log record %d: %d bytes of data, its blocks have %d", ErrCorrupt, r.seq, len(r.data), data)
	}
	return nil
}
