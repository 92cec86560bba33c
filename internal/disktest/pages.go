package disktest

import "maps"

// SectorSize is the unit in which a disk writes, in bytes.
const SectorSize = 512

// pageSize is the unit in which space is counted, in bytes.
const pageSize = 4096

// denseBytes is the part of a file whose pages stand in a slice; the pages
// behind it, of large and sparse files, are in a map.
const denseBytes = 16 << 20

// An owner tells which table may change a page. It is not of size zero, so
// that two of them have two addresses.
type owner struct{ _ byte }

// A sector never changes once it is in a table: it is replaced. So every
// version of it exists once, however many tables and changes hold it.
type sector [SectorSize]byte

// A page is eight sectors; one that is nil reads as zeros.
type page struct {
	by *owner
	s  [pageSize / SectorSize]*sector
}

// pages is a sparse array of bytes whose copies share everything until one of
// them writes. A page that is absent reads as zeros.
type pages struct {
	low  []*page
	high map[int64]*page
	by   *owner // nil: low and high are shared, and all pages
	n    int    // pages present
}

// clone returns a copy that shares everything with t.
func (t *pages) clone() pages {
	t.by = nil // what it owned is shared now
	return *t
}

// own makes low and high those of t alone.
func (t *pages) own() {
	if t.by != nil {
		return
	}
	t.by = new(owner)
	t.low = append([]*page(nil), t.low...)
	if len(t.high) > 0 {
		t.high = maps.Clone(t.high)
	} else {
		t.high = nil
	}
}

// get returns page i, nil when it is absent.
func (t *pages) get(i int64) *page {
	if i < int64(len(t.low)) {
		return t.low[i]
	}
	if i < denseBytes/pageSize {
		return nil
	}
	return t.high[i]
}

// set makes p page i. t has its own tables.
func (t *pages) set(i int64, p *page) {
	if i >= denseBytes/pageSize {
		if t.high == nil {
			t.high = make(map[int64]*page)
		}
		t.high[i] = p
		return
	}
	if need := int(i) + 1 - len(t.low); need > 0 {
		t.low = append(t.low, make([]*page, need)...)
	}
	t.low[i] = p
}

// writable returns page i as one that t alone holds.
func (t *pages) writable(i int64) *page {
	t.own()
	old := t.get(i)
	if old != nil && old.by == t.by {
		return old
	}
	p := &page{by: t.by}
	if old != nil {
		p.s = old.s
	} else {
		t.n++
	}
	t.set(i, p)
	return p
}

// drop makes page i absent.
func (t *pages) drop(i int64) {
	if t.get(i) == nil {
		return
	}
	t.own()
	if i < int64(len(t.low)) {
		t.low[i] = nil
	} else {
		delete(t.high, i)
	}
	t.n--
}

// sector returns the sector at off, which is aligned; nil for zeros.
func (t *pages) sector(off int64) *sector {
	if pg := t.get(off / pageSize); pg != nil {
		return pg.s[off%pageSize/SectorSize]
	}
	return nil
}

// setSector makes s the sector at off, which is aligned; nil for zeros.
func (t *pages) setSector(off int64, s *sector) {
	if s != nil || t.sector(off) != nil {
		t.writable(off / pageSize).s[off%pageSize/SectorSize] = s
	}
}

// read fills p from off on.
func (t *pages) read(p []byte, off int64) {
	for len(p) > 0 {
		at := int(off % SectorSize)
		n := min(len(p), SectorSize-at)
		if s := t.sector(off - int64(at)); s != nil {
			copy(p[:n], s[at:])
		} else {
			clear(p[:n])
		}
		p, off = p[n:], off+int64(n)
	}
}

// put stores p, whole sectors, at off and keeps it: it must not change again.
func (t *pages) put(p []byte, off int64) {
	for ; len(p) > 0; p, off = p[SectorSize:], off+SectorSize {
		t.writable(off / pageSize).s[off%pageSize/SectorSize] = (*sector)(p)
	}
}

// widen returns p with what surrounds it at off up to whole sectors, and where
// they begin. The bytes are a copy.
func (t *pages) widen(p []byte, off int64) ([]byte, int64) {
	first := down(off)
	wide := make([]byte, up(off+int64(len(p)))-first)
	if len(wide) > len(p) {
		last := int64(len(wide)) - SectorSize
		t.read(wide[:SectorSize], first)
		t.read(wide[last:], first+last)
	}
	copy(wide[off-first:], p)
	return wide, first
}

// zero makes whole sectors [off, off+n) zeros; pages that lie wholly inside
// become absent.
func (t *pages) zero(off, n int64) {
	end := off + n
	for _, i := range t.present(off, n) {
		from, to := max(off, i*pageSize), min(end, (i+1)*pageSize)
		if to-from == pageSize {
			t.drop(i)
		} else {
			clear(t.writable(i).s[from%pageSize/SectorSize:][:(to-from)/SectorSize])
		}
	}
}

// present returns the numbers of the pages that are there and touch
// [off, off+n), those of the slice in order.
func (t *pages) present(off, n int64) []int64 {
	if n <= 0 {
		return nil
	}
	first, last := off/pageSize, (off+n-1)/pageSize
	var at []int64
	for i := first; i <= last && i < int64(len(t.low)); i++ {
		if t.low[i] != nil {
			at = append(at, i)
		}
	}
	for i := range t.high {
		if i >= first && i <= last {
			at = append(at, i)
		}
	}
	return at
}

// next returns the number of the first page at or after i that is there, or
// -1.
func (t *pages) next(i int64) int64 {
	for ; i < int64(len(t.low)); i++ {
		if t.low[i] != nil {
			return i
		}
	}
	found := int64(-1)
	for j := range t.high {
		if j >= i && (found < 0 || j < found) {
			found = j
		}
	}
	return found
}
