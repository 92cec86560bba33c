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
// extended attributes. An inode that is not returned is the same in both. The
// inodes of the file system itself (journal, resize, quota) are left out.
//
// The error wraps ErrDifferent when the two do not have the same shape, as
// after a new mkfs or a resize: then all must be compared.
func Changed(old, updated *FS, ranges []Range) ([]uint32, error) {
	if err := sameShape(old.sb, updated.sb); err != nil {
		return nil, err
	}
	ranges = normalize(slices.Concat(ranges, old.replayed(), updated.replayed()))
	set := map[uint32]bool{}
	for _, f := range []*FS{old, updated} {
		for _, ino := range f.fc.touched() {
			set[ino] = true
		}
	}
	if err := changedInTables(old, updated, ranges, set); err != nil {
		return nil, err
	}
	if err := updated.changedElsewhere(ranges, set); err != nil {
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

// replayed returns the blocks that the journal replaces, and the journal's
// that hold their content.
func (f *FS) replayed() []Range {
	bs := int64(f.sb.blockSize)
	var out []Range
	for b := range f.src.replay {
		out = append(out, Range{int64(b) * bs, bs})
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
// this side is searched: an inode that is the same in both tables has the same
// root of its block map here and there.
func (f *FS) changedElsewhere(ranges []Range, set map[uint32]bool) error {
	c, err := f.newClaims(ranges)
	if err != nil {
		return err
	}
	hints := slices.Sorted(maps.Keys(set))
	if err := c.search(hints); err != nil {
		return err
	}
	for _, cl := range c.found {
		if cl.ino != 0 {
			set[cl.ino] = true
		}
	}
	return nil
}
