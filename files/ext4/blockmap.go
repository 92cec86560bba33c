package ext4

import (
	"errors"
	"fmt"
	"sort"
)

// A run is consecutive blocks of a file that lie one after another.
type run struct {
	logical   uint64 // first block, counted from the file's beginning
	phys      uint64 // where it lies
	n         uint64
	unwritten bool // allocated, reads as zeros
}

// maxLogical is the first block number that a file cannot have.
const maxLogical = 1 << 32

// An Extent is a run of a file's bytes and where it lies in the image.
type Extent struct {
	Off, Phys, N int64 // bytes
	Unwritten    bool  // allocated but reads as zeros
}

// Extents returns where the file's blocks lie, in order; what is between two
// of them is a hole. Runs that follow one another in the file and in the image
// are one. The last may reach beyond the file's size. A file that keeps its
// data in the inode has none.
func (n *Inode) Extents() ([]Extent, error) {
	runs, err := n.blockRuns()
	if err != nil {
		return nil, err
	}
	bs := int64(n.fs.sb.blockSize)
	var out []Extent
	for _, r := range runs {
		out = append(out, Extent{Off: int64(r.logical) * bs, Phys: int64(r.phys) * bs, N: int64(r.n) * bs, Unwritten: r.unwritten})
	}
	return out, nil
}

// blockRuns returns the file's runs, to be read only.
func (n *Inode) blockRuns() ([]run, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.runs != nil {
		return n.runs, nil
	}
	runs := []run{}
	err := n.walkMap(func(r run) error {
		if len(runs) >= maxExtents {
			return fmt.Errorf("more than %d extents: %w", maxExtents, ErrUnsupported)
		}
		runs = appendRun(runs, r)
		return nil
	}, nil)
	if err != nil {
		return nil, fmt.Errorf("inode %d: %w", n.Ino, err)
	}
	n.runs = runs
	return runs, nil
}

// appendRun appends r, joined to the last run where it continues it.
func appendRun(runs []run, r run) []run {
	if len(runs) > 0 {
		last := &runs[len(runs)-1]
		if last.logical+last.n == r.logical && last.phys+last.n == r.phys && last.unwritten == r.unwritten {
			last.n += r.n
			return runs
		}
	}
	return append(runs, r)
}

// hasMap reports whether the inode's blocks are mapped at all.
func (n *Inode) hasMap() bool {
	if n.Flags&FlagInlineData != 0 {
		return false
	}
	switch n.Type() {
	case ModeRegular, ModeDir:
		return true
	case ModeSymlink:
		return !n.fastSymlink()
	}
	return n.Ino == badBlocksIno || n.Ino == resizeIno
}

// walkMap calls data for each run of the file in order, and node, unless it is
// nil, for each block that the map itself takes.
func (n *Inode) walkMap(data func(run) error, node func(b uint64) error) error {
	if runs, ok := n.fs.fc.runs(n.Ino); ok {
		for _, r := range runs {
			if err := data(r); err != nil {
				return err
			}
		}
		if node == nil {
			return nil
		}
		data = func(run) error { return nil } // only the stored map's own blocks are wanted
	}
	if !n.hasMap() {
		return nil
	}
	w := mapWalk{n: n, data: data, node: node, seen: map[uint64]struct{}{}}
	if n.Flags&FlagExtents != 0 {
		return w.extents(n.iblock(), -1)
	}
	return w.indirect()
}

// A mapWalk is one walk over the tree of a file's blocks.
type mapWalk struct {
	n    *Inode
	data func(run) error
	node func(uint64) error
	seen map[uint64]struct{} // blocks of the tree
	next uint64              // the lowest logical block that may come
}

// emit hands out the next run.
func (w *mapWalk) emit(r run) error {
	sb := w.n.fs.sb
	switch {
	case r.n == 0 || r.logical < w.next || r.logical+r.n > maxLogical:
		return corrupt("extent of blocks %d+%d is out of order, expected from %d", r.logical, r.n, w.next)
	case !sb.validRun(r.phys, r.n):
		return corrupt("extent at blocks %d+%d is outside of the file system's %d", r.phys, r.n, sb.blocks)
	}
	w.next = r.logical + r.n
	return w.data(r)
}

// enter reads a block of the tree, each at most once.
func (w *mapWalk) enter(b uint64) ([]byte, error) {
	if !w.n.fs.sb.validRun(b, 1) {
		return nil, corrupt("block map at block %d is outside of the file system", b)
	}
	if _, ok := w.seen[b]; ok {
		return nil, corrupt("block %d of the block map is used twice", b)
	}
	w.seen[b] = struct{}{}
	if w.node != nil {
		if err := w.node(b); err != nil {
			return nil, err
		}
	}
	return w.n.fs.src.block(b)
}

// Sizes in an extent tree: of the header and of every entry.
const (
	extentMagic  = 0xF30A
	extentHeader = 12
	extentSize   = 12
	unwrittenLen = 32768 // lengths above it are of unwritten extents
)

// extents walks the node p of an extent tree; depth is -1 for the root.
func (w *mapWalk) extents(p []byte, depth int) error {
	entries, at := int(le.Uint16(p[2:])), int(le.Uint16(p[6:]))
	room := (len(p) - extentHeader) / extentSize
	switch {
	case le.Uint16(p) != extentMagic:
		return corrupt("extent header begins with %#04x, expected %#04x", le.Uint16(p), extentMagic)
	case at > maxExtentDepth || depth >= 0 && at != depth:
		return corrupt("extent tree of depth %d, expected %d", at, depth)
	case entries > room:
		return corrupt("%d extents in a node with room for %d", entries, room)
	}
	for i := range entries {
		e := p[extentHeader+i*extentSize:][:extentSize]
		var err error
		if at == 0 {
			err = w.emit(decodeExtent(e))
		} else {
			err = w.extentChild(e, at-1)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func decodeExtent(e []byte) run {
	r := run{
		logical: uint64(le.Uint32(e)),
		n:       uint64(le.Uint16(e[4:])),
		phys:    uint64(le.Uint16(e[6:]))<<32 | uint64(le.Uint32(e[8:])),
	}
	if r.n > unwrittenLen {
		r.n -= unwrittenLen
		r.unwritten = true
	}
	return r
}

// extentChild walks the node that the index entry e points to.
func (w *mapWalk) extentChild(e []byte, depth int) error {
	b := uint64(le.Uint32(e[4:])) | uint64(le.Uint16(e[8:]))<<32
	p, err := w.enter(b)
	if err == nil {
		err = w.verifyExtents(p)
	}
	if err == nil {
		err = w.extents(p, depth)
	}
	if err != nil && !errors.Is(err, errStop) {
		return fmt.Errorf("extent block %d: %w", b, err)
	}
	return err
}

// verifyExtents checks the checksum after the entries of an extent block.
func (w *mapWalk) verifyExtents(p []byte) error {
	if !w.n.fs.sb.hasCsum() {
		return nil
	}
	at := extentHeader + extentSize*int(le.Uint16(p[4:]))
	if at+4 > len(p) {
		return corrupt("extent block with room for %d extents", le.Uint16(p[4:]))
	}
	if found, sum := le.Uint32(p[at:]), crc32c(w.n.seed(), p[:at]); found != sum {
		return badSum(found, sum)
	}
	return nil
}

// indirect walks the block map of ext2 and ext3: twelve direct blocks, then
// one tree each of depth 1, 2 and 3.
func (w *mapWalk) indirect() error {
	const direct = 12
	p := w.n.iblock()
	if err := w.pointers(p[:direct*4], 0, 0); err != nil {
		return err
	}
	perBlock := uint64(w.n.fs.sb.blockSize / 4)
	logical, covers := uint64(direct), uint64(1)
	for depth := 1; depth <= 3; depth++ {
		covers *= perBlock
		if err := w.pointers(p[(direct+depth-1)*4:][:4], depth, logical); err != nil {
			return err
		}
		logical += covers
	}
	return nil
}

// pointers walks the block numbers in p, each the root of a tree of the given
// depth; the first maps the logical block given.
func (w *mapWalk) pointers(p []byte, depth int, logical uint64) error {
	covers := uint64(1)
	for range depth {
		covers *= uint64(w.n.fs.sb.blockSize / 4)
	}
	for ; len(p) > 0; p, logical = p[4:], logical+covers {
		b := uint64(le.Uint32(p))
		if b == 0 {
			continue
		}
		if depth == 0 {
			if err := w.emit(run{logical: logical, phys: b, n: 1}); err != nil {
				return err
			}
			continue
		}
		child, err := w.enter(b)
		if err != nil {
			return err
		}
		if err := w.pointers(child, depth-1, logical); err != nil {
			return err
		}
	}
	return nil
}

// findRun returns the index of the first of runs that ends after the block.
func findRun(runs []run, logical uint64) int {
	return sort.Search(len(runs), func(i int) bool { return runs[i].logical+runs[i].n > logical })
}
