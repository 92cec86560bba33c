package ext4

import (
	"bytes"
	"fmt"
	"maps"
	"slices"
)

// Changed returns, sorted, the inodes that may differ between two file systems
// of which updated came from old by writing to the given ranges of the image,
// and nowhere else: in their attributes, their data, a directory's names or
// extended attributes. An inode that is not returned is the same in both; of a
// file that was renamed within the same second, the directories may be all
// that changed. The inodes of the file system itself (journal, resize, quota)
// are left out.
//
// The error wraps ErrDifferent when the two do not have the same shape, as
// after a new mkfs or a resize: then all must be compared.
func Changed(old, updated *FS, ranges []Range) ([]uint32, error) {
	if err := sameShape(old.sb, updated.sb); err != nil {
		return nil, err
	}
	ranges, err := ChangedRanges(old, updated, ranges)
	if err != nil {
		return nil, err
	}
	set := map[uint32]bool{}
	for _, f := range []*FS{old, updated} {
		for _, ino := range f.fc.touched() {
			set[ino] = true
		}
	}
	if err := changedInTables(old, updated, ranges, set); err != nil {
		return nil, err
	}
	if err := changedElsewhere(old, updated, ranges, set); err != nil {
		return nil, err
	}
	var out []uint32
	for ino := range set {
		if ino == RootIno || ino >= updated.sb.firstIno && ino != updated.sb.journalIno && ino != updated.sb.orphanIno {
			out = append(out, ino)
		}
	}
	slices.Sort(out)
	return out, nil
}

// sameShape reports why blocks and inodes of a and b do not lie in the same
// places.
func sameShape(a, b *super) error {
	if a.uuid != b.uuid || a.blockSize != b.blockSize || a.blocks != b.blocks || a.inodes != b.inodes ||
		a.inodesPerGroup != b.inodesPerGroup || a.inodeSize != b.inodeSize || a.blocksPerGroup != b.blocksPerGroup ||
		a.csumSeed != b.csumSeed {
		return fmt.Errorf("one was made anew or resized: %w", ErrDifferent)
	}
	return nil
}

// ChangedRanges returns, sorted, the ranges in which the two file systems may
// show different bytes after the image was written to in the ranges given.
// Blocks that a journal replaces are compared: they are left out where they
// are the same in both, and added where they are not.
func ChangedRanges(old, updated *FS, ranges []Range) ([]Range, error) {
	bs := int64(updated.sb.blockSize)
	var differ, same []Range
	for b := range mergedKeys(old.src.replay, updated.src.replay) {
		p, err := old.src.block(b)
		if err != nil {
			return nil, err
		}
		q, err := updated.src.block(b)
		if err != nil {
			return nil, err
		}
		if r := (Range{int64(b) * bs, bs}); bytes.Equal(p, q) {
			same = append(same, r)
		} else {
			differ = append(differ, r)
		}
	}
	return subtract(normalize(append(differ, ranges...)), normalize(same)), nil
}

// Replayed returns, sorted, the ranges whose content is taken from the journal
// and not from where they lie.
func (f *FS) Replayed() []Range {
	bs := int64(f.sb.blockSize)
	out := make([]Range, 0, len(f.src.replay))
	for b := range f.src.replay {
		out = append(out, Range{int64(b) * bs, bs})
	}
	return normalize(out)
}

// mergedKeys returns the keys of both maps, each once.
func mergedKeys(a, b map[uint64]logged) map[uint64]struct{} {
	out := make(map[uint64]struct{}, len(a)+len(b))
	for _, m := range []map[uint64]logged{a, b} {
		for k := range m {
			out[k] = struct{}{}
		}
	}
	return out
}

// subtract returns ranges without what lies in without; both are normalized.
func subtract(ranges, without []Range) []Range {
	var out []Range
	for _, r := range ranges {
		at, end := r.Off, r.Off+r.N
		for _, w := range overlapping(without, at, r.N) {
			if w.Off > at {
				out = append(out, Range{at, w.Off - at})
			}
			at = w.Off + w.N
		}
		if at < end {
			out = append(out, Range{at, end - at})
		}
	}
	return out
}

// changedInTables adds to set the inodes that lie in the ranges and differ.
func changedInTables(old, updated *FS, ranges []Range, set map[uint32]bool) error {
	meta, err := updated.layout()
	if err != nil {
		return err
	}
	bs := int64(updated.sb.blockSize)
	for _, m := range meta {
		if m.kind != KindInodeTable {
			continue
		}
		d, err := old.group(m.group)
		if err != nil {
			return err
		}
		if d.inodeTable != m.first {
			return fmt.Errorf("inode table of group %d moved: %w", m.group, ErrDifferent)
		}
		for _, r := range overlapping(ranges, int64(m.first)*bs, int64(m.n)*bs) {
			if err := changedInTable(old, updated, m, r, set); err != nil {
				return err
			}
		}
	}
	return nil
}

// overlapping returns the parts of sorted ranges that lie in [off, off+n).
func overlapping(ranges []Range, off, n int64) []Range {
	i, _ := slices.BinarySearchFunc(ranges, off, func(r Range, off int64) int {
		if r.Off+r.N <= off {
			return -1
		}
		return 1
	})
	var out []Range
	for ; i < len(ranges) && ranges[i].Off < off+n; i++ {
		from, end := max(ranges[i].Off, off), min(ranges[i].Off+ranges[i].N, off+n)
		out = append(out, Range{from, end - from})
	}
	return out
}

// changedInTable adds to set the inodes of table m that lie in r and differ.
func changedInTable(old, updated *FS, m metaRange, r Range, set map[uint32]bool) error {
	size := int64(updated.sb.inodeSize)
	table := int64(m.first) * int64(updated.sb.blockSize)
	first := (r.Off - table) / size
	last := min((r.Off+r.N-table+size-1)/size, int64(updated.sb.inodesPerGroup))
	perRead := int64(scanSize) / size
	for ; first < last; first += perRead {
		n := min(perRead, last-first)
		a, b := make([]byte, n*size), make([]byte, n*size)
		if err := old.src.read(a, table+first*size); err != nil {
			return err
		}
		if err := updated.src.read(b, table+first*size); err != nil {
			return err
		}
		for i := range n {
			if !bytes.Equal(a[i*size:][:size], b[i*size:][:size]) {
				set[uint32(m.group)*updated.sb.inodesPerGroup+uint32(first+i)+1] = true
			}
		}
	}
	return nil
}

// changedElsewhere adds to set the inodes that own blocks in the ranges. Those
// that are in it already are asked first; mostly they explain everything. Only
// the updated side is searched: an inode that is the same in both tables has
// the same root of its block map here and there.
func changedElsewhere(old, updated *FS, ranges []Range, set map[uint32]bool) error {
	c, err := updated.newClaims(ranges)
	if err != nil {
		return err
	}
	hints := slices.Sorted(maps.Keys(set))
	if err := c.search(hints); err != nil {
		return err
	}
	shared := map[uint64]bool{}
	for _, cl := range c.found {
		if cl.ino == 0 {
			continue
		}
		set[cl.ino] = true
		for b := cl.first; cl.kind == KindXattr && b < cl.first+cl.n; b++ {
			if sharedAndChanged(old, updated, b) {
				shared[b] = true
			}
		}
	}
	if len(shared) == 0 {
		return nil
	}
	for n, err := range updated.Inodes() {
		if err != nil {
			return err
		}
		if shared[n.xattrBlock] {
			set[n.Ino] = true
		}
	}
	return nil
}

// sharedAndChanged reports whether b is an attribute block of several inodes
// whose attributes changed, and not only the number of those that share it. It
// is rare: the kernel does not change a block while it is shared.
func sharedAndChanged(old, updated *FS, b uint64) bool {
	const refsAt, sumAt = 4, 0x10
	p, errOld := old.src.block(b)
	q, errNew := updated.src.block(b)
	if errOld != nil || errNew != nil {
		return true
	}
	if le.Uint32(q) != xattrMagic || le.Uint32(q[refsAt:]) < 2 {
		return false
	}
	return !bytes.Equal(p[:refsAt], q[:refsAt]) || !bytes.Equal(p[refsAt+4:sumAt], q[refsAt+4:sumAt]) ||
		!bytes.Equal(p[sumAt+4:], q[sumAt+4:])
}
