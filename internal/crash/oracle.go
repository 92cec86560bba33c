package crash

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math"
	"slices"
	"sync"

	"github.com/cowdev/cowdev/internal/disktest"
)

const sectorSize = disktest.SectorSize

// A Death is a way in which a device stops.
type Death uint8

// The ways: a power cut takes what was not flushed (invariant 3a), the death
// of the process alone nothing that was acknowledged (3b).
const (
	Power Death = iota
	Process
)

func (d Death) String() string {
	if d == Power {
		return "power cut"
	}
	return "process death"
}

// An Oracle knows, for every sector of a device, which contents it may be
// found with. It is told when each change and each flush begins and ends; its
// methods may be called by any number of goroutines at once.
//
// A version of a sector is out once a later one is sure to be there: one that
// began after the first had ended, and that was acknowledged (for readers and
// after the death of the process) or flushed (after a power cut). Every other
// version may be found. A change that failed is sure of nothing, and neither
// is one that is under way, but for this: what a read has found whole, no read
// that begins later may find undone. So each sector is a linearizable register.
type Oracle struct {
	size int64

	// Torn says that a read may find a sector half way between two versions,
	// if a change of it is under way: so it is where bytes are copied into
	// and out of a page cache. Set it before use.
	Torn bool

	mu       sync.Mutex
	now      uint64
	dead     bool // between Die and Found
	sectors  [][]version
	readings map[*Reading]struct{} // under way
}

// A version is what one change makes of one sector.
type version struct {
	p              []byte // the sector, shorter at the end of the device
	part           bool   // the change makes but a part of it
	begin, end     uint64 // when the change began and ended
	seen           uint64 // when the first read ended that was sure to be of it; never if none was
	acked, flushed bool
}

// never is the end of what is under way.
const never = math.MaxUint64

// NewOracle returns an oracle for a device that reads as p.
func NewOracle(p []byte) *Oracle {
	o := &Oracle{size: int64(len(p)), sectors: make([][]version, (len(p)+sectorSize-1)/sectorSize), readings: make(map[*Reading]struct{})}
	o.reset(p)
	return o
}

// Size returns the device's size in bytes.
func (o *Oracle) Size() int64 { return o.size }

// reset says that the device reads as p, now and after any death.
func (o *Oracle) reset(p []byte) {
	p = bytes.Clone(p)
	all := make([]version, len(o.sectors))
	for s := range o.sectors {
		all[s] = version{p: o.sector(p, 0, s), acked: true, flushed: true, seen: never}
		o.sectors[s] = all[s : s+1 : s+1]
	}
}

// Die says that the device died at this moment: neither what is under way nor
// what begins before Found is ever acknowledged. It is called inside While.
func (o *Oracle) Die() {
	o.now++
	o.dead = true
	for _, vs := range o.sectors {
		for i := range vs {
			if vs[i].end == never {
				vs[i].end = o.now
			}
		}
	}
}

// Found says that the device came back as p. After a power cut that is what is
// on the disk; after the death of a process it is what readers see, which the
// next power cut may take.
func (o *Oracle) Found(p []byte, d Death) {
	if d == Process {
		o.Observe(p, 0)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.dead = false
	if d == Power {
		o.reset(p)
	}
}

// Observe says that p was read at off, whole sectors, while no change of them
// was under way. From now on they are live, though not flushed: it is settled
// what a change did that failed, or that a death cut short.
func (o *Oracle) Observe(p []byte, off int64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	p = bytes.Clone(p)
	o.now++
	o.each(off, len(p), func(s int) {
		o.sectors[s] = append(o.sectors[s], version{p: o.sector(p, off, s), begin: o.now, end: o.now, seen: never, acked: true})
	})
}

// each calls f for every sector that [off, off+n) touches.
func (o *Oracle) each(off int64, n int, f func(s int)) {
	for s := off / sectorSize; s*sectorSize < off+int64(n); s++ {
		f(int(s))
	}
}

// sector returns sector s of p, which begins at off on a sector's beginning.
func (o *Oracle) sector(p []byte, off int64, s int) []byte {
	at := int64(s)*sectorSize - off
	return p[at:min(at+sectorSize, int64(len(p)))]
}

// A Change is a write, trim or zeroing that has begun.
type Change struct {
	o     *Oracle
	first int
	n     int
	begin uint64
}

// Write says that a change begins which makes [off, off+len(p)) p; for a trim
// p is zeros. It returns false, and nothing has begun, if one change makes a
// part of a sector of which it is not certain what the rest will be: another
// change of it is under way, or one failed.
func (o *Oracle) Write(p []byte, off int64) (*Change, bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	whole, at, ok := o.widen(p, off)
	o.each(off, len(p), func(s int) { ok = ok && !o.inPart(s) })
	if !ok {
		return nil, false
	}
	o.now++
	c := &Change{o: o, first: int(at / sectorSize), begin: o.now}
	o.each(at, len(whole), func(s int) {
		v := version{p: o.sector(whole, at, s), begin: o.now, end: never, seen: never}
		if o.dead {
			v.end = o.now
		}
		v.part = int64(s)*sectorSize < off || int64(s)*sectorSize+int64(len(v.p)) > off+int64(len(p))
		o.sectors[s] = append(o.sectors[s], v)
		c.n++
	})
	return c, true
}

// inPart reports whether a change of a part of sector s is under way.
func (o *Oracle) inPart(s int) bool {
	for _, v := range o.sectors[s] {
		if v.part && v.end == never {
			return true
		}
	}
	return false
}

// widen returns a copy of p with the bytes around it that make whole sectors.
func (o *Oracle) widen(p []byte, off int64) ([]byte, int64, bool) {
	end := off + int64(len(p))
	first := off / sectorSize * sectorSize
	last := min(o.size, (end+sectorSize-1)/sectorSize*sectorSize)
	whole := make([]byte, last-first)
	for _, edge := range []struct {
		at    int64
		inner bool
	}{{off, off != first}, {end - 1, end != last}} {
		if !edge.inner {
			continue
		}
		s := int(edge.at / sectorSize)
		live := o.candidates(s, Process)
		if len(live) != 1 || live[0].end == never {
			return nil, 0, false
		}
		copy(whole[int64(s)*sectorSize-first:], live[0].p)
	}
	copy(whole[off-first:], p)
	return whole, first, true
}

// Done says that the change has returned err. After Die it says nothing.
func (c *Change) Done(err error) {
	c.o.mu.Lock()
	defer c.o.mu.Unlock()
	c.o.now++
	for s := c.first; s < c.first+c.n; s++ {
		for i := range c.o.sectors[s] {
			if v := &c.o.sectors[s][i]; v.begin == c.begin && v.end == never {
				v.end, v.acked = c.o.now, err == nil
			}
		}
	}
}

// A Flush is a flush that has begun.
type Flush struct {
	o     *Oracle
	begin uint64
}

// Flush says that a flush begins.
func (o *Oracle) Flush() *Flush {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.now++
	return &Flush{o, o.now}
}

// Done says that the flush has returned err. If it is nil, what had been
// acknowledged when it began is flushed.
func (f *Flush) Done(err error) {
	if err != nil {
		return
	}
	f.o.mu.Lock()
	defer f.o.mu.Unlock()
	for s, vs := range f.o.sectors {
		for i := range vs {
			if vs[i].acked && vs[i].end < f.begin {
				vs[i].flushed = true
			}
		}
		f.o.prune(s)
	}
}

// prune forgets the versions of sector s that neither a crash nor a read that
// has begun may find.
func (o *Oracle) prune(s int) {
	oldest := uint64(never)
	for r := range o.readings {
		oldest = min(oldest, r.begin)
	}
	sure := min(o.sure(s, Power, never), o.sure(s, Process, oldest))
	in := o.sectors[s][:0]
	for _, v := range o.sectors[s] {
		if v.end >= sure {
			in = append(in, v)
		}
	}
	o.sectors[s] = in
}

// A Reading is a read of the live device that has begun.
type Reading struct {
	o     *Oracle
	begin uint64
}

// Reading says that a read begins.
func (o *Oracle) Reading() *Reading {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.now++
	r := &Reading{o, o.now}
	o.readings[r] = struct{}{}
	return r
}

// Done says that the read returned p from off, whole sectors; nil, that it
// failed. It returns an error if a sector is none that it may be: a version
// that was out when the read began, or that nobody wrote.
func (r *Reading) Done(p []byte, off int64) error {
	r.o.mu.Lock()
	defer r.o.mu.Unlock()
	r.o.now++
	delete(r.o.readings, r)
	var err error
	r.o.each(off, len(p), func(s int) {
		if err == nil {
			err = r.check(s, r.o.sector(p, off, s))
		}
	})
	return err
}

func (r *Reading) check(s int, p []byte) error {
	may := r.o.candidatesAt(s, Process, r.begin)
	r.saw(s, p, may)
	err := r.o.checkSector(s, p, may, "in a read")
	if err != nil && r.o.Torn && torn(p, may, r.begin) {
		return nil
	}
	return err
}

// saw notes which version of sector s the read, which ends now, has found, if no
// other that it could have found reads the same.
func (r *Reading) saw(s int, p []byte, may []version) {
	same := func(v version) bool { return bytes.Equal(p, v.p) }
	i := slices.IndexFunc(may, same)
	if i < 0 || slices.ContainsFunc(may[i+1:], same) {
		return
	}
	begin, all := may[i].begin, r.o.sectors[s]
	for j := range all {
		if all[j].begin == begin {
			all[j].seen = min(all[j].seen, r.o.now)
		}
	}
}

// torn reports whether p is put together from words of versions of which one
// was under way after a moment. What is no whole number of words, at a device's
// end, is copied by bytes.
func torn(p []byte, may []version, after uint64) bool {
	overlaps := false
	for _, v := range may {
		overlaps = overlaps || v.end > after
	}
	word := 8
	if len(p)%word != 0 {
		word = 1
	}
	for i := 0; i < len(p) && overlaps; i += word {
		end := i + word
		found := false
		for _, v := range may {
			found = found || bytes.Equal(p[i:end], v.p[i:end])
		}
		if !found {
			return false
		}
	}
	return overlaps
}

// While calls f while the oracle learns of nothing: no change is acknowledged
// nor begins. A crash that is taken inside is to be judged inside.
func (o *Oracle) While(f func()) {
	o.mu.Lock()
	defer o.mu.Unlock()
	f()
}

// Check returns an error if p, all of the device as it was found after a
// death, holds a sector that may not be so. It is called inside While, or when
// nobody else uses the oracle.
func (o *Oracle) Check(p []byte, d Death) error {
	if int64(len(p)) != o.size {
		return fmt.Errorf("after a %v the device has %d bytes, expected %d", d, len(p), o.size)
	}
	for s, vs := range o.sectors {
		found, sure := o.sector(p, 0, s), o.sure(s, d, never)
		if !slices.ContainsFunc(vs, func(v version) bool { return v.end >= sure && bytes.Equal(found, v.p) }) {
			return o.checkSector(s, found, o.candidates(s, d), "after a "+d.String())
		}
	}
	return nil
}

// candidates returns the versions of sector s that are not out.
func (o *Oracle) candidates(s int, d Death) []version { return o.candidatesAt(s, d, never) }

// candidatesAt returns those that were not out at a moment, with those that
// began since.
func (o *Oracle) candidatesAt(s int, d Death, at uint64) []version {
	sure := o.sure(s, d, at)
	var in []version
	for _, v := range o.sectors[s] {
		if v.end >= sure {
			in = append(in, v)
		}
	}
	return in
}

// sure returns the latest beginning among the versions of sector s that are
// sure to be there: what ended before it is out. What reads have seen counts
// for other reads alone, not for what a death leaves.
func (o *Oracle) sure(s int, d Death, at uint64) (begin uint64) {
	for _, v := range o.sectors[s] {
		if v.flushed && d == Power || v.acked && d == Process && v.end < at || d == Process && v.seen < at && at != never {
			begin = max(begin, v.begin)
		}
	}
	return begin
}

// checkSector returns an error if p is none of the versions.
func (o *Oracle) checkSector(s int, p []byte, allowed []version, when string) error {
	for _, v := range allowed {
		if bytes.Equal(p, v.p) {
			return nil
		}
	}
	may := ""
	for i, v := range allowed {
		if i > 0 {
			may += ", "
		}
		may += Describe(v.p)
	}
	return fmt.Errorf("%s sector %d (at %d) reads as %s, may be %s", when, s, int64(s)*sectorSize, Describe(p), may)
}

// BaseStamp is the number of the write that made the base.
const BaseStamp = 1

// Stamp fills p, which begins at off of the device, so that each sector tells
// which write made it (id, from BaseStamp on) and where it belongs.
func Stamp(p []byte, off int64, id uint64) {
	for len(p) > 0 {
		var word [8]byte
		binary.LittleEndian.PutUint64(word[:], id<<24|uint64(off/sectorSize))
		n := copy(p, word[off%8:])
		p, off = p[n:], off+int64(n)
	}
}

// Describe says what a sector holds, by its stamp.
func Describe(p []byte) string {
	if len(p) < 8 {
		return fmt.Sprintf("%x", p)
	}
	word := p[:8]
	for i := range p {
		if p[i] != word[i%8] {
			return fmt.Sprintf("a mixture of %s and others", describeWord(word))
		}
	}
	return describeWord(word)
}

func describeWord(p []byte) string {
	w := binary.LittleEndian.Uint64(p)
	switch {
	case w == 0:
		return "zeros"
	case w>>24 == BaseStamp:
		return fmt.Sprintf("base@%d", w&(1<<24-1))
	}
	return fmt.Sprintf("write %d@%d", w>>24, w&(1<<24-1))
}
