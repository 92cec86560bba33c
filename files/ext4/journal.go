package ext4

import (
	"fmt"
)

// jbd2's numbers; everything in a journal is big-endian.
const (
	journalMagic = 0xC03B3998

	blockDescriptor = 1
	blockCommit     = 2
	blockSuperV1    = 3
	blockSuperV2    = 4
	blockRevoke     = 5

	journalCompatChecksum = 0x1 // one CRC-32 over a transaction, in its commit block

	journalIncompat64bit      = 0x2
	journalIncompatCsumV2     = 0x8
	journalIncompatCsumV3     = 0x10
	journalIncompatFastCommit = 0x20
	journalIncompatKnown      = 0x1 /* revoke */ | journalIncompat64bit | 0x4 /* async commit */ |
		journalIncompatCsumV2 | journalIncompatCsumV3 | journalIncompatFastCommit

	tagEscaped  = 0x1
	tagSameUUID = 0x2
	tagLast     = 0x8

	journalHeader      = 12 // magic, type, sequence
	revokeHeader       = 16
	commitSumAt        = 16
	commitTimeAt       = 48
	minLogBlocks       = 1024 // left to the log beside fast commits
	defaultFastCommits = 256  // blocks
)

// A journal is jbd2's log while it is read for recovery.
type journal struct {
	fs   *FS
	runs []run // where the log's blocks lie

	compat, incompat uint32
	csumSeed         uint32
	sequence         uint32 // of the oldest transaction
	start            uint64 // where it begins, 0 if there is none
	first, end       uint64 // of the ring of blocks
	fastFirst        uint64 // blocks of fast commits
	fastEnd          uint64
}

// A loggedTag is a block that a committed transaction wrote.
type loggedTag struct {
	target   uint64
	at       uint64 // block of the image that holds the content
	sequence uint32
	sum      uint32
	escaped  bool
}

// recover replays the journal: afterwards the source shows the file system as
// of the last committed transaction, and f.fc the fast commits after it.
func (f *FS) recover() error {
	j, err := f.openJournal()
	if err != nil {
		return err
	}
	f.recovered.Needed = true
	if j.start == 0 {
		return nil
	}
	scan := logScan{j: j, revoked: map[uint64]uint32{}}
	if err := scan.run(); err != nil {
		return err
	}
	replay, err := scan.replay()
	if err != nil {
		return err
	}
	f.src.replay = replay
	f.recovered.Transactions = int(scan.sequence - j.sequence)
	f.recovered.Blocks = len(replay)
	if err := f.rereadSuper(); err != nil {
		return err
	}
	if j.incompat&journalIncompatFastCommit == 0 {
		return nil
	}
	if err := f.replayFastCommits(j, scan.sequence); err != nil {
		return fmt.Errorf("fast commit: %w", err)
	}
	return nil
}

// openJournal reads the journal's inode and superblock.
func (f *FS) openJournal() (*journal, error) {
	if f.sb.journalIno == 0 {
		return nil, fmt.Errorf("it lies on another device, and must be replayed first (mount the file system once): %w", ErrUnsupported)
	}
	n, err := f.Inode(f.sb.journalIno)
	if err != nil {
		return nil, err
	}
	j := &journal{fs: f}
	if j.runs, err = n.blockRuns(); err != nil {
		return nil, err
	}
	_, raw, err := j.block(0)
	if err == nil {
		err = j.parseSuper(raw, uint64(n.Size)/uint64(f.sb.blockSize))
	}
	if err != nil {
		return nil, fmt.Errorf("superblock: %w", err)
	}
	return j, nil
}

// parseSuper decodes the journal's superblock; the journal has blocks blocks.
func (j *journal) parseSuper(raw []byte, blocks uint64) error {
	typ := be.Uint32(raw[4:])
	if be.Uint32(raw) != journalMagic || typ != blockSuperV1 && typ != blockSuperV2 {
		return corrupt("begins with %#08x and type %d", be.Uint32(raw), typ)
	}
	maxLen := uint64(be.Uint32(raw[0x10:]))
	j.first = uint64(be.Uint32(raw[0x14:]))
	j.sequence = be.Uint32(raw[0x18:])
	j.start = uint64(be.Uint32(raw[0x1C:]))
	j.end = maxLen
	fastBlocks := uint64(defaultFastCommits)
	if typ == blockSuperV2 {
		j.compat, j.incompat = be.Uint32(raw[0x24:]), be.Uint32(raw[0x28:])
		if n := be.Uint32(raw[0x54:]); n != 0 {
			fastBlocks = uint64(n)
		}
		j.csumSeed = crc32c(^uint32(0), raw[0x30:0x40])
	}
	if unknown := j.incompat &^ journalIncompatKnown; unknown != 0 {
		return fmt.Errorf("features %#x: %w", unknown, ErrUnsupported)
	}
	if j.hasCsum() {
		const sumAt = 0xFC
		if found, sum := be.Uint32(raw[sumAt:]), crc32cWithout(^uint32(0), raw[:superSize], sumAt, 4); found != sum {
			return badSum(found, sum)
		}
	}
	if j.incompat&journalIncompatFastCommit != 0 && j.end >= fastBlocks+minLogBlocks {
		j.end -= fastBlocks
		j.fastFirst, j.fastEnd = j.end+1, maxLen
	}
	switch bs := be.Uint32(raw[0x0C:]); {
	case int(bs) != j.fs.sb.blockSize:
		return corrupt("blocks of %d bytes, expected %d", bs, j.fs.sb.blockSize)
	case maxLen > maxJournal || (j.fastEnd-j.fastFirst)*uint64(bs) > maxFastCommits:
		return fmt.Errorf("%d blocks, %d of them for fast commits, more than expected: %w", maxLen, fastBlocks, ErrUnsupported)
	case maxLen > blocks || j.first == 0 || j.first >= j.end || j.start != 0 && (j.start < j.first || j.start >= j.end):
		return corrupt("log from block %d to %d begins at %d, expected inside of the journal's %d", j.first, j.end, j.start, blocks)
	}
	return nil
}

// hasCsum reports whether blocks of the journal carry CRC32C checksums.
func (j *journal) hasCsum() bool {
	return j.incompat&(journalIncompatCsumV2|journalIncompatCsumV3) != 0
}

// block returns the content of block l of the journal, and where it lies.
func (j *journal) block(l uint64) (at uint64, p []byte, err error) {
	i := findRun(j.runs, l)
	if i == len(j.runs) || j.runs[i].logical > l || j.runs[i].unwritten {
		return 0, nil, corrupt("block %d of the journal is a hole", l)
	}
	at = j.runs[i].phys + l - j.runs[i].logical
	p, err = j.fs.src.raw(at)
	if err != nil {
		return 0, nil, fmt.Errorf("block %d of the journal: %w", l, err)
	}
	return at, p, nil
}

// A logScan reads the log from its oldest transaction to the last committed
// one.
type logScan struct {
	j        *journal
	at       uint64 // block of the log
	steps    uint64 // blocks passed, at most the ring's size
	sequence uint32 // of the transaction that is read, in the end of the first that was not committed

	tags    []loggedTag       // of committed transactions
	revoked map[uint64]uint32 // block -> the last transaction that revoked it

	// The transaction that is read.
	pending     []loggedTag
	pendingGone []uint64
	damage      error  // of a block before the commit block
	sum         uint32 // over its blocks, with journalCompatChecksum
	lastTime    uint64 // commit time of the transaction before
}

// run reads transactions until one was not committed.
func (s *logScan) run() error {
	s.at, s.sequence, s.sum = s.j.start, s.j.sequence, ^uint32(0)
	for {
		_, p, err := s.next()
		if err != nil {
			return err
		}
		if p == nil || be.Uint32(p) != journalMagic || be.Uint32(p[8:]) != s.sequence {
			return nil
		}
		more := false
		switch be.Uint32(p[4:]) {
		case blockDescriptor:
			more, err = s.descriptor(p)
		case blockRevoke:
			more, err = true, s.revoke(p)
		case blockCommit:
			more, err = s.commit(p)
		}
		if err != nil || !more {
			return err
		}
	}
}

// next takes the next block of the ring; p is nil once all were taken.
func (s *logScan) next() (at uint64, p []byte, err error) {
	if s.steps == s.j.end-s.j.first {
		return 0, nil, nil
	}
	s.steps++
	l := s.at
	if s.at++; s.at >= s.j.end {
		s.at = s.j.first
	}
	return s.j.block(l)
}

// tagSize returns the bytes of a tag without the UUID that may follow it.
func (j *journal) tagSize() int {
	if j.incompat&journalIncompatCsumV3 != 0 {
		return 16
	}
	size := 8
	if j.incompat&journalIncompatCsumV2 != 0 {
		size += 2
	}
	if j.incompat&journalIncompat64bit != 0 {
		size += 4
	}
	return size
}

// verifyTail checks the checksum at the end of a descriptor or revoke block.
func (j *journal) verifyTail(p []byte) error {
	if !j.hasCsum() {
		return nil
	}
	at := len(p) - 4
	if found, sum := be.Uint32(p[at:]), crc32cWithout(j.csumSeed, p, at, 4); found != sum {
		return badSum(found, sum)
	}
	return nil
}

// descriptor takes a descriptor block and the blocks it describes.
func (s *logScan) descriptor(p []byte) (more bool, err error) {
	if err := s.j.verifyTail(p); err != nil {
		s.damage = fmt.Errorf("transaction %d: descriptor: %w", s.sequence, err)
	}
	s.sumBlock(p)
	end := len(p)
	if s.j.hasCsum() {
		end -= 4
	}
	size := s.j.tagSize()
	for off := journalHeader; off+size <= end; {
		tag, flags := s.j.decodeTag(p[off:])
		at, data, err := s.next()
		if err != nil || data == nil {
			return false, err
		}
		s.sumBlock(data)
		tag.at, tag.sequence = at, s.sequence
		if s.pending = append(s.pending, tag); len(s.tags)+len(s.pending) > maxLogBlocks {
			return false, fmt.Errorf("more than %d blocks to replay: %w", maxLogBlocks, ErrUnsupported)
		}
		off += size
		if flags&tagSameUUID == 0 {
			off += 16
		}
		if flags&tagLast != 0 {
			break
		}
	}
	return true, nil
}

// decodeTag decodes the tag that p begins with.
func (j *journal) decodeTag(p []byte) (tag loggedTag, flags uint32) {
	tag.target = uint64(be.Uint32(p))
	if j.incompat&journalIncompatCsumV3 != 0 {
		flags = be.Uint32(p[4:])
		tag.sum = be.Uint32(p[12:])
	} else {
		tag.sum = uint32(be.Uint16(p[4:]))
		flags = uint32(be.Uint16(p[6:]))
	}
	if j.incompat&journalIncompat64bit != 0 {
		tag.target |= uint64(be.Uint32(p[8:])) << 32
	}
	tag.escaped = flags&tagEscaped != 0
	return tag, flags
}

// sumBlock adds a block to the transaction's checksum of the oldest kind.
func (s *logScan) sumBlock(p []byte) {
	if s.j.compat&journalCompatChecksum != 0 {
		s.sum = crc32be(s.sum, p)
	}
}

// revoke takes a revoke block: what the blocks in it had in the log up to this
// transaction must not be replayed.
func (s *logScan) revoke(p []byte) error {
	if err := s.j.verifyTail(p); err != nil {
		s.damage = fmt.Errorf("transaction %d: revoke block: %w", s.sequence, err)
		return nil
	}
	size := 4
	if s.j.incompat&journalIncompat64bit != 0 {
		size = 8
	}
	end := min(int(be.Uint32(p[journalHeader:])), len(p))
	for off := revokeHeader; off+size <= end; off += size {
		b := uint64(be.Uint32(p[off:]))
		if size == 8 {
			b = be.Uint64(p[off:])
		}
		s.pendingGone = append(s.pendingGone, b)
	}
	if len(s.revoked)+len(s.pendingGone) > maxRevoked {
		return fmt.Errorf("more than %d revoked blocks: %w", maxRevoked, ErrUnsupported)
	}
	return nil
}

// commit takes a commit block. The log ends before a transaction whose commit
// block does not match its checksum, and before blocks that are left over from
// an earlier use of the journal; those are older than the transaction before.
func (s *logScan) commit(p []byte) (more bool, err error) {
	time := be.Uint64(p[commitTimeAt:])
	if s.damage != nil {
		if time >= s.lastTime {
			return false, s.damage
		}
		return false, nil
	}
	if !s.commitValid(p) {
		return false, nil
	}
	s.tags = append(s.tags, s.pending...)
	for _, b := range s.pendingGone {
		s.revoked[b] = s.sequence
	}
	s.pending, s.pendingGone = s.pending[:0], s.pendingGone[:0]
	s.sum, s.lastTime = ^uint32(0), time
	s.sequence++
	return true, nil
}

// commitValid checks a commit block's checksum, of whichever kind.
func (s *logScan) commitValid(p []byte) bool {
	found := be.Uint32(p[commitSumAt:])
	if s.j.hasCsum() {
		return found == crc32cWithout(s.j.csumSeed, p, commitSumAt, 4)
	}
	if s.j.compat&journalCompatChecksum == 0 {
		return true
	}
	const crc32Type = 1
	typ, size := p[journalHeader], p[journalHeader+1]
	if typ == 0 && size == 0 && found == 0 {
		return true // written without a checksum
	}
	return typ == crc32Type && size == 4 && found == s.sum
}

// replay returns where the newest content of each logged block lies.
func (s *logScan) replay() (map[uint64]logged, error) {
	out := make(map[uint64]logged)
	for _, t := range s.tags {
		if by, ok := s.revoked[t.target]; ok && int32(t.sequence-by) <= 0 {
			continue
		}
		if t.target >= s.j.fs.sb.blocks {
			return nil, corrupt("transaction %d writes block %d, expected below %d", t.sequence, t.target, s.j.fs.sb.blocks)
		}
		if err := s.j.verifyTag(t); err != nil {
			return nil, fmt.Errorf("transaction %d: block %d: %w", t.sequence, t.target, err)
		}
		out[t.target] = logged{at: t.at, escaped: t.escaped}
	}
	return out, nil
}

// verifyTag checks a logged block against the checksum in its tag.
func (j *journal) verifyTag(t loggedTag) error {
	if !j.hasCsum() {
		return nil
	}
	p, err := j.fs.src.raw(t.at)
	if err != nil {
		return err
	}
	sum := crc32c(crc32c(j.csumSeed, be.AppendUint32(nil, t.sequence)), p)
	if j.incompat&journalIncompatCsumV3 == 0 {
		sum &= 0xFFFF
	}
	if sum != t.sum {
		return badSum(t.sum, sum)
	}
	return nil
}
