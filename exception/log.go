package exception

import (
	"fmt"
	"slices"
	"sync"
)

// The log's zone is the part of it that has been written once: an append there
// costs half of one into a hole. It grows by logStep bytes, ahead of need, and
// up to twice checkpointAfter without asking whether the records at its
// beginning are still needed.
const (
	logStep         = 1 << 20
	checkpointAfter = 2 << 20 // bytes of records
)

// step returns by how much the zone grows, in bytes, and with which it begins:
// there is room for two records in it.
func (h *Header) step() int64 {
	return min(logStep, (h.logLen/2+pageSize-1)/pageSize*pageSize)
}

// checkpointAfter returns after how many bytes of records a checkpoint begins.
func (s *Store) checkpointAfter() int64 { return min(checkpointAfter, s.shape.logLen/4) }

// maxRecord bounds a record, in bytes: a quarter of the log at most, so that
// one fits wherever the log's head is.
func (s *Store) maxRecord() int64 {
	return min(s.shape.logLen/4/pageSize*pageSize, 256<<10)
}

// A place in the log lies between two records.
type place struct {
	pos   int64  // bytes from the log's beginning
	total int64  // bytes from the session's beginning, with what was skipped
	bytes int64  // the same without
	seq   uint64 // of the record that begins here
	chain uint32 // checksum of the record before
}

// logRing is where the log's records go. Only the committer appends.
type logRing struct {
	head    place // where the next record goes
	written int64 // the zone's length
	buf     []byte

	mu      sync.Mutex
	applied place // up to here the committed entries, and the table's dirty pages, know the records
	tail    place // up to here nothing is needed any more
}

// used returns the bytes between the tail and the head.
func (l *logRing) used() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.head.total - l.tail.total
}

// pending returns the bytes of the records between the tail and the head.
func (l *logRing) pending() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.head.bytes - l.tail.bytes
}

// append writes one record, and returns when it is durable. slots and data are
// those of the blocks that the runs' named and here masks name. Any failure
// breaks the store: the record may exist from the moment it was handed to the
// disk (R8).
func (s *Store) append(flags uint32, runs []run, slots []uint32, data []byte) error {
	l := &s.log
	n := recordLen(len(runs), len(slots), len(data))
	if err := s.makeRoom(n); err != nil {
		return err
	}
	if l.head.pos+n > s.logEnd() {
		if err := s.put(&record{flags: flagPad}, pageSize); err != nil {
			return err
		}
		s.skipToStart()
	}
	return s.put(&record{flags: flags, runs: runs, slots: slots, data: data}, n)
}

// skipToStart moves the head to the log's beginning.
func (s *Store) skipToStart() {
	l := &s.log
	if l.head.pos == 0 {
		return
	}
	l.mu.Lock()
	l.head.total += s.shape.logLen - l.head.pos
	l.head.pos = 0
	l.mu.Unlock()
}

// startIsFree reports whether the zone is large enough, and a record of n bytes
// and some more fit at its beginning.
func (s *Store) startIsFree(n int64) bool {
	after := s.checkpointAfter()
	skip := s.shape.logLen - s.log.head.pos
	return s.log.written >= 2*after && s.log.used()+skip+n+after/2 <= s.shape.logLen
}

// extendLog extends the zone so that a record of n bytes and a page fit behind
// the head, if there is room, unless they fit at its beginning. The zone is
// durable before it is used: an append to it need not allocate anything then.
func (s *Store) extendLog(n int64) error {
	l := &s.log
	for l.written < s.shape.logLen && l.head.pos+n+pageSize > l.written && !s.startIsFree(n) {
		at, step := s.shape.logOff()+l.written, min(s.shape.step(), s.shape.logLen-l.written)
		// A full disk is met by this write, which says nothing of others.
		if err := fill(s.file, at, step); err != nil {
			s.logf("extend the log: %v; it stays at %d bytes", err, l.written)
			return nil
		}
		if err := s.file.WriteSync(zeroStep[:step], at); err != nil {
			return s.fail("extend the log", err)
		}
		l.written += step
	}
	return nil
}

// zeroStep is what the log is extended by; never written, it takes no memory.
var zeroStep [logStep]byte

// logEnd returns where the written zone ends for a record: a page before its
// end, unless that is the log's.
func (s *Store) logEnd() int64 {
	if s.log.written == s.shape.logLen {
		return s.log.written
	}
	return s.log.written - pageSize
}

// makeRoom extends the log and waits until a record of n bytes, and the pages
// that are skipped before it, fit.
func (s *Store) makeRoom(n int64) error {
	l := &s.log
	if err := s.extendLog(n); err != nil {
		return err
	}
	for range 3 {
		skip := int64(0)
		if l.head.pos+n > s.logEnd() {
			skip = s.shape.logLen - l.head.pos
		}
		if l.used()+skip+n <= s.shape.logLen {
			return nil
		}
		if err := s.checkpoint(); err != nil {
			return err
		}
	}
	panic(fmt.Sprintf("exception: no room for a record of %d bytes in a log of %d, head %+v, tail %+v", n, s.shape.logLen, l.head, l.tail))
}

// put encodes r into n bytes at the head, writes it and moves the head.
func (s *Store) put(r *record, n int64) error {
	l := &s.log
	if err := s.Broken(); err != nil {
		return err
	}
	r.epoch, r.seq, r.prev = s.epoch, l.head.seq, l.head.chain
	p := slices.Grow(l.buf[:0], int(n))[:n]
	l.buf = p
	at := dataAt(len(r.runs), len(r.slots))
	clear(p[:at])
	clear(p[at+copy(p[at:], r.data):])
	r.encode(p, s.shape.UUID, l.head.pos)
	if err := s.file.WriteSync(p, s.shape.logOff()+l.head.pos); err != nil {
		return s.fail(fmt.Sprintf("append record %d to the log", r.seq), err)
	}
	l.mu.Lock()
	l.head.pos += n
	l.head.total += n
	l.head.bytes += n
	if l.head.pos == s.shape.logLen {
		l.head.pos = 0
	}
	l.head.seq++
	l.head.chain = r.sum
	l.mu.Unlock()
	s.live.appended(l.head.seq)
	return nil
}

// tablePages knows the pages of the table: which have their room in the file,
// and which differ from the committed entries.
type tablePages struct {
	mu        sync.Mutex
	allocated map[int64]bool
	dirty     map[int64]bool
}

// allocate gives page n of the table its room.
func (t *tablePages) allocate(f writerAt, n int64) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.allocated[n] {
		return nil
	}
	if _, err := f.WriteAt(zeroPage[:], tableOff+n*pageSize); err != nil {
		return err
	}
	t.allocated[n] = true
	return nil
}

type writerAt interface {
	WriteAt(p []byte, off int64) (int, error)
}

// touch marks page n as differing.
func (t *tablePages) touch(n int64) {
	t.mu.Lock()
	t.dirty[n] = true
	t.mu.Unlock()
}

// takeDirty returns the pages that differ, and forgets them.
func (t *tablePages) takeDirty() map[int64]bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	d := t.dirty
	t.dirty = make(map[int64]bool)
	return d
}
