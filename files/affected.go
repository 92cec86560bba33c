package files

import (
	"errors"
	"slices"

	"github.com/cowdev/cowdev/block"
	"github.com/cowdev/cowdev/files/ext4"
)

// affected is what a change of known ranges can have touched, in two ext file
// systems of which the new one came from the old by that change.
type affected struct {
	touched map[uint64]bool // inodes that may differ
	above   map[uint64]bool // directories that lead to one of them, in either
	changed []span          // of the image, ascending and apart, whole blocks
}

// mayDiffer returns the spans of the common part of two files that may
// differ: those that lie in another place, or in one that changed.
func (af *affected) mayDiffer(a, b File) ([]span, error) {
	x, y := a.(*extFile), b.(*extFile)
	size := min(x.Size, y.Size)
	if (x.Flags|y.Flags)&ext4.FlagInlineData != 0 {
		return []span{{0, size}}, nil
	}
	old, err := x.Extents()
	if err != nil {
		return nil, err
	}
	new, err := y.Extents()
	if err != nil {
		return nil, err
	}
	var out []span
	i, j := 0, 0
	for off := int64(0); off < size; {
		p, q := runAt(old, &i, off), runAt(new, &j, off)
		end := min(p.end, q.end, size)
		switch {
		case p.zero && q.zero:
		case !p.zero && !q.zero && p.phys == q.phys:
			for _, s := range overlap(af.changed, span{p.phys, p.phys + end - off}) {
				out = appendSpan(out, span{s.off - p.phys + off, s.end - p.phys + off})
			}
		default:
			out = appendSpan(out, span{off, end})
		}
		off = end
	}
	return out, nil
}

// place is where a file's bytes from some offset up to end lie.
type place struct {
	end  int64
	phys int64
	zero bool // nowhere: a hole, or never written
}

const farAway = 1<<63 - 1

// runAt returns the place of the byte at off. Extents before *i end before
// off; *i moves on with it.
func runAt(extents []ext4.Extent, i *int, off int64) place {
	for *i < len(extents) && extents[*i].Off+extents[*i].N <= off {
		*i++
	}
	if *i == len(extents) {
		return place{end: farAway, zero: true}
	}
	e := extents[*i]
	if e.Off > off {
		return place{end: e.Off, zero: true}
	}
	return place{end: e.Off + e.N, phys: e.Phys + off - e.Off, zero: e.Unwritten}
}

// appendSpan appends s to ascending spans, or makes the last one longer.
func appendSpan(spans []span, s span) []span {
	if last := len(spans) - 1; last >= 0 && spans[last].end >= s.off {
		spans[last].end = max(spans[last].end, s.end)
		return spans
	}
	return append(spans, s)
}

// overlap returns the parts of spans, which are ascending and apart, in s.
func overlap(spans []span, s span) []span {
	i, _ := slices.BinarySearchFunc(spans, s.off, func(e span, off int64) int {
		if e.end <= off {
			return -1
		}
		return 1
	})
	var out []span
	for ; i < len(spans) && spans[i].off < s.end; i++ {
		out = append(out, span{max(spans[i].off, s.off), min(spans[i].end, s.end)})
	}
	return out
}

// wholeBlocks returns ranges as spans that begin and end at blocks of size
// bytes, ascending and apart.
func wholeBlocks(ranges []block.Extent, size int64) []span {
	spans := make([]span, 0, len(ranges))
	for _, r := range ranges {
		if r.N > 0 {
			spans = append(spans, span{r.Off / size * size, (r.End() + size - 1) / size * size})
		}
	}
	return mergeSpans(spans)
}

// mergeSpans puts spans in order and joins those that touch.
func mergeSpans(spans []span) []span {
	slices.SortFunc(spans, compareSpan)
	var out []span
	for _, s := range spans {
		out = appendSpan(out, s)
	}
	return out
}

// findAffected finds what a change of ranges can have touched. It returns nil
// when everything must be compared: the file systems were made apart, or what
// was touched is encrypted and the way to it cannot be read.
func findAffected(old, new extFS, ranges []block.Extent) (*affected, error) {
	size := int64(new.FS.Info().BlockSize)
	changed := wholeBlocks(ranges, size)
	for _, f := range []extFS{old, new} {
		for _, r := range f.Replayed() {
			changed = append(changed, span{r.Off, r.Off + r.N})
		}
	}
	af := &affected{touched: map[uint64]bool{}, above: map[uint64]bool{}, changed: mergeSpans(changed)}
	inos, err := ext4.Changed(old.FS, new.FS, af.ranges())
	if errors.Is(err, ext4.ErrDifferent) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if old.anyEncrypted(inos) || new.anyEncrypted(inos) {
		return nil, nil
	}
	for _, ino := range inos {
		af.touched[uint64(ino)] = true
	}
	for _, f := range []extFS{old, new} {
		if err := af.findAbove(f, inos); err != nil {
			return nil, err
		}
	}
	return af, nil
}

// ranges returns what changed as ext4 wants it.
func (af *affected) ranges() []ext4.Range {
	out := make([]ext4.Range, len(af.changed))
	for i, s := range af.changed {
		out[i] = ext4.Range{Off: s.off, N: s.end - s.off}
	}
	return out
}

// findAbove marks the directories of f that lead to the inodes. Where a name
// was added or removed its directory is one of them; they are searched first.
func (af *affected) findAbove(f extFS, inos []uint32) error {
	names, err := f.Names(inos, inos)
	if err != nil {
		return err
	}
	done := map[uint32]bool{}
	for _, list := range names {
		for _, n := range list {
			for dir := n.Dir; !done[dir]; { // the root's parent is the root
				done[dir], af.above[uint64(dir)] = true, true
				inode, err := f.Inode(dir)
				if err != nil {
					return err
				}
				if dir, err = f.Parent(inode); err != nil {
					return err
				}
			}
		}
	}
	return nil
}
