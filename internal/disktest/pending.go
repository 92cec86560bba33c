package disktest

import "math/rand/v2"

// A changeKind says what a change does.
type changeKind uint8

const (
	data   changeKind = iota // whole sectors get bytes
	zeros                    // whole sectors become zeros
	resize                   // the file's size becomes n
)

// A change is one thing that the disk has not confirmed yet.
type change struct {
	seq  uint64 // position among all changes
	op   uint64 // the operation that made it
	kind changeKind
	off  int64
	n    int64
	p    []byte // n bytes, for data
}

// add makes a change in the page cache and records it.
func (f *File) add(c change) {
	f.lastSeq++
	c.seq = f.lastSeq
	c.apply(&f.view, &f.size)
	f.pending = append(f.pending, c)
}

// addData is add for bytes at any offset.
func (f *File) addData(op Op, p []byte, off int64) {
	p, off = f.view.widen(p, off)
	f.add(change{op: op.N, kind: data, off: off, n: int64(len(p)), p: p})
}

// addSize is add for a new size.
func (f *File) addSize(op Op, size int64) {
	if size != f.size {
		f.add(change{op: op.N, kind: resize, n: size})
	}
}

// addZeros is add for zeros: whole sectors of them between two that hold
// something else too.
func (f *File) addZeros(op Op, off, n int64) {
	end := off + n
	first, last := up(off), down(end)
	if first > last {
		f.addData(op, make([]byte, n), off)
		return
	}
	if off < first {
		f.addData(op, make([]byte, first-off), off)
	}
	if first < last {
		f.add(change{op: op.N, kind: zeros, off: first, n: last - first})
	}
	if last < end {
		f.addData(op, make([]byte, end-last), last)
	}
}

// apply makes all of the change to a table and its size.
func (c *change) apply(t *pages, size *int64) {
	switch c.kind {
	case data:
		t.put(c.p, c.off)
	case zeros:
		t.zero(c.off, c.n)
	case resize:
		*size = c.n
	}
}

// applySector makes the part of the change that lies in the sector at off.
func (c *change) applySector(t *pages, off int64) {
	if c.kind == data {
		t.put(c.p[off-c.off:][:SectorSize], off)
	} else {
		t.zero(off, SectorSize)
	}
}

// settle makes durable every change up to seq mark.
func (f *File) settle(mark uint64) {
	i := 0
	for ; i < len(f.pending) && f.pending[i].seq <= mark; i++ {
		f.pending[i].apply(&f.durable, &f.durSize)
	}
	f.pending = append(f.pending[:0:0], f.pending[i:]...)
}

// settleOp makes durable what op wrote. Earlier versions of its sectors cannot
// come back, and no earlier size can leave out its end.
func (f *File) settleOp(op Op) {
	end := op.Off + op.Len
	rest := make([]change, 0, len(f.pending))
	var own []change
	for _, c := range f.pending {
		if c.op == op.N {
			own = append(own, c)
		}
	}
	if len(own) == 0 { // a Sync beside it was quicker
		return
	}
	for _, c := range f.pending {
		switch {
		case c.op == op.N:
		case c.kind == resize && c.seq < own[0].seq:
			c.n = max(c.n, end)
			rest = append(rest, c)
		default:
			rest = append(rest, c.without(own)...)
		}
	}
	for _, c := range own {
		if c.kind != resize {
			c.apply(&f.durable, &f.durSize)
		}
	}
	f.durSize = max(f.durSize, end)
	f.pending = rest
}

// without returns what is left of c when the sectors of later changes are
// durable.
func (c change) without(later []change) []change {
	left := []change{c}
	for _, d := range later {
		if d.kind == resize || d.seq < c.seq {
			continue
		}
		var next []change
		for _, l := range left {
			next = append(next, l.cut(d.off, d.off+d.n)...)
		}
		left = next
	}
	return left
}

// cut returns the parts of c outside [from, to).
func (c change) cut(from, to int64) []change {
	end := c.off + c.n
	if c.kind == resize || to <= c.off || from >= end {
		return []change{c}
	}
	var parts []change
	if from > c.off {
		parts = append(parts, c.part(c.off, from))
	}
	if to < end {
		parts = append(parts, c.part(to, end))
	}
	return parts
}

func (c change) part(from, to int64) change {
	if c.kind == data {
		c.p = c.p[from-c.off : to-c.off]
	}
	c.off, c.n = from, to-from
	return c
}

// doom makes each chosen change durable or forgets it, by chance: the kernel
// holds its pages for clean. A size is no page: it stays pending, since a
// filesystem that cannot write its own structures stops altogether.
func (f *File) doom(chosen func(*change) bool) {
	if f.rng == nil {
		f.rng = rand.New(rand.NewPCG(f.seed[0], f.seed[1]))
	}
	rest := make([]change, 0, len(f.pending))
	for i := range f.pending {
		c := &f.pending[i]
		if !chosen(c) || c.kind == resize {
			rest = append(rest, *c)
			continue
		}
		c.some(anyTear(f.rng), f.rng, &f.durable, &f.durSize)
		f.astray = true
	}
	f.pending = rest
	f.durable.cutAt(f.durSize)
}

// cutAt drops what lies at or behind size.
func (t *pages) cutAt(size int64) {
	if size%SectorSize != 0 {
		if s := t.sector(down(size)); s != nil {
			p := append([]byte(nil), s[:]...)
			clear(p[size%SectorSize:])
			t.put(p, down(size))
		}
	}
	t.zero(up(size), 1<<62-up(size))
}

// A tear says how much of a change reaches the disk.
type tear uint8

const (
	lost tear = iota
	kept      // all of it
	head      // the sectors before some point
	tail      // those behind
	few       // each sector with chance 1/4
	half      // 1/2
	most      // 3/4
	ntears
)

func anyTear(rng *rand.Rand) tear { return tear(rng.IntN(int(ntears))) }

// some makes the part of c that a tear leaves.
func (c *change) some(how tear, rng *rand.Rand, t *pages, size *int64) {
	if how == lost {
		return
	}
	if how == kept {
		c.apply(t, size)
		return
	}
	sectors := c.n / SectorSize
	if c.kind == resize || sectors == 1 {
		if rng.IntN(2) == 0 {
			c.apply(t, size)
		}
		return
	}
	switch how {
	case head:
		p := c.part(c.off, c.off+rng.Int64N(sectors)*SectorSize)
		p.apply(t, size)
	case tail:
		p := c.part(c.off+rng.Int64N(sectors)*SectorSize, c.off+c.n)
		p.apply(t, size)
	default:
		c.scattered(how, rng, t)
	}
}

// scattered makes each sector of c by its own chance. Zeros are looked at only
// where there is something to zero.
func (c *change) scattered(how tear, rng *rand.Rand, t *pages) {
	spans := []int64{c.off, c.off + c.n}
	if c.kind == zeros {
		spans = spans[:0]
		for _, i := range t.present(c.off, c.n) {
			spans = append(spans, max(c.off, i*pageSize), min(c.off+c.n, (i+1)*pageSize))
		}
	}
	for ; len(spans) > 0; spans = spans[2:] {
		for off := spans[0]; off < spans[1]; off += SectorSize {
			if chance(how, rng) {
				c.applySector(t, off)
			}
		}
	}
}

func chance(how tear, rng *rand.Rand) bool {
	k := rng.IntN(4)
	switch how {
	case few:
		return k == 0
	case half:
		return k < 2
	}
	return k < 3
}
