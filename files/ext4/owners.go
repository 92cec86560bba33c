package ext4

import (
	"cmp"
	"fmt"
	"slices"
	"sort"
)

// A Range is a run of the image's bytes.
type Range struct{ Off, N int64 }

// A Kind says what bytes of the image are used for.
type Kind uint8

// The kinds. An inode's number comes with those from KindData on, but for
// KindUnknown.
const (
	KindOutside     Kind = iota // after the file system's end
	KindFree                    // allocated to nothing
	KindSuperblock              // superblock or a copy; the boot block too
	KindDescriptors             // group descriptors, and room for more
	KindBlockBitmap
	KindInodeBitmap
	KindInodeTable
	KindMMP       // multiple mount protection
	KindUnknown   // allocated, but no inode was found that has it
	KindData      // of a regular file
	KindDirectory // a directory's entries
	KindSymlink   // a symbolic link's target
	KindXattr     // extended attributes; of several inodes the first found is told
	KindMap       // an extent tree's or indirect block
	KindJournal   // the journal and its map
	KindReserved  // of the file system's own inodes: quota, orphans, bad blocks
)

var kindNames = [...]string{"outside", "free", "superblock", "group descriptors", "block bitmap", "inode bitmap",
	"inode table", "mmp", "unknown", "data", "directory", "symlink", "xattr", "block map", "journal", "reserved"}

func (k Kind) String() string {
	if int(k) < len(kindNames) {
		return kindNames[k]
	}
	return fmt.Sprintf("Kind(%d)", uint8(k))
}

// An Owner says what a range of the image is used for.
type Owner struct {
	Range
	Kind    Kind
	Ino     uint32 // the inode it belongs to, 0 for metadata of the file system
	FileOff int64  // where it lies in the file, for data, directories and symlinks
}

// Owners tells what the bytes of the ranges are used for: owners that follow
// one another without gap, sorted, covering every byte of the ranges once.
//
// The inodes in hints are asked first, then those in the block groups that the
// ranges lie in, then all others, until every allocated block has its owner:
// the cost follows the ranges when the files lie where the kernel puts them.
func (f *FS) Owners(ranges []Range, hints []uint32) ([]Owner, error) {
	ranges = normalize(ranges)
	c, err := f.newClaims(ranges)
	if err != nil {
		return nil, err
	}
	if err := c.search(hints); err != nil {
		return nil, err
	}
	return c.owners(ranges), nil
}

// normalize sorts ranges, joins those that touch and drops empty and negative
// ones.
func normalize(ranges []Range) []Range {
	ranges = slices.Clone(ranges)
	slices.SortFunc(ranges, func(a, b Range) int { return cmp.Compare(a.Off, b.Off) })
	var out []Range
	for _, r := range ranges {
		if r.N <= 0 || r.Off < 0 {
			continue
		}
		if n := len(out); n > 0 && r.Off <= out[n-1].Off+out[n-1].N {
			out[n-1].N = max(out[n-1].N, r.Off+r.N-out[n-1].Off)
			continue
		}
		out = append(out, r)
	}
	return out
}

// A claim is blocks whose owner is known.
type claim struct {
	first, n uint64
	kind     Kind
	ino      uint32
	logical  uint64
}

// claims are blocks whose owners are looked for. Each block is given to the
// first that claims it.
type claims struct {
	fs     *FS
	wanted []blockRange
	taken  []uint64 // bitmap: by the order of the blocks in wanted
	left   uint64   // blocks not taken
	found  []claim
	passed uint64 // blocks of maps and runs of the inodes asked
}

// A blockRange is blocks of the file system; index counts those of the ranges
// before.
type blockRange struct{ first, n, index uint64 }

// newClaims returns claims for the blocks of sorted ranges, with free blocks
// and the file system's own metadata taken.
func (f *FS) newClaims(ranges []Range) (*claims, error) {
	c := &claims{fs: f}
	bs := int64(f.sb.blockSize)
	next := uint64(0) // blocks below are wanted already
	for _, r := range ranges {
		first := max(uint64(r.Off/bs), next)
		end := min(uint64((r.Off+r.N+bs-1)/bs), f.sb.blocks)
		if first >= end {
			continue
		}
		c.wanted = append(c.wanted, blockRange{first, end - first, c.left})
		c.left += end - first
		next = end
	}
	if c.left > maxWanted {
		return nil, fmt.Errorf("owners of %d blocks at once, ask for at most %d: %w", c.left, maxWanted, ErrUnsupported)
	}
	c.taken = make([]uint64, (c.left+63)/64)
	if err := c.takeLayout(); err != nil {
		return nil, err
	}
	return c, c.takeFree()
}

// takeLayout takes the blocks of the file system's own metadata.
func (c *claims) takeLayout() error {
	meta, err := c.fs.layout()
	if err != nil {
		return err
	}
	for _, w := range c.wanted {
		i := sort.Search(len(meta), func(i int) bool { return meta[i].first+meta[i].n > w.first })
		for ; i < len(meta) && meta[i].first < w.first+w.n; i++ {
			c.take(claim{first: meta[i].first, n: meta[i].n, kind: meta[i].kind})
		}
	}
	if c.fs.sb.clusterBits == 0 {
		return nil
	}
	for _, m := range meta { // what is left of their clusters
		cl := c.fs.sb.wholeClusters(claim{first: m.first, n: m.n, kind: KindReserved})
		c.take(cl)
	}
	return nil
}

// wholeClusters returns cl grown to the clusters it lies in, which are
// allocated as a whole. A file's blocks lie at the same places in clusters of
// the file and of the image.
func (sb *super) wholeClusters(cl claim) claim {
	size := uint64(1) << sb.clusterBits
	before := (cl.first - sb.firstDataBlock) % size
	cl.first, cl.n = cl.first-before, cl.n+before
	cl.logical -= min(before, cl.logical)
	cl.n = min((cl.n+size-1)&^(size-1), sb.blocks-cl.first)
	return cl
}

// takeFree takes the blocks that the bitmaps have free.
func (c *claims) takeFree() error {
	sb := c.fs.sb
	for _, w := range c.wanted {
		for b, end := max(w.first, sb.firstDataBlock), w.first+w.n; b < end; {
			g := sb.groupOf(b)
			bitmap, err := c.fs.blockBitmap(g)
			if err != nil {
				return err
			}
			groupEnd := min(end, sb.firstBlock(g)+sb.groupBlocks(g))
			c.takeFreeIn(bitmap, sb.firstBlock(g), b, groupEnd)
			b = groupEnd
		}
	}
	return nil
}

// takeFreeIn takes the free ones of the blocks from b to end, in a group with
// the given bitmap and first block.
func (c *claims) takeFreeIn(bitmap []byte, first, b, end uint64) {
	free := func(b uint64) bool {
		return !bit(bitmap, (b-first)>>c.fs.sb.clusterBits) && !c.fs.fc.usesBlock(b)
	}
	for ; b < end; b++ {
		from := b
		for b < end && free(b) {
			b++
		}
		if b > from {
			c.take(claim{first: from, n: b - from, kind: KindFree})
		}
	}
}

// take gives to a claim those of its blocks that are wanted and not taken.
func (c *claims) take(cl claim) {
	i := sort.Search(len(c.wanted), func(i int) bool { return c.wanted[i].first+c.wanted[i].n > cl.first })
	for ; i < len(c.wanted) && c.wanted[i].first < cl.first+cl.n; i++ {
		w := c.wanted[i]
		for b, end := max(w.first, cl.first), min(w.first+w.n, cl.first+cl.n); b < end; b++ {
			at := w.index + b - w.first
			if c.taken[at/64]>>(at%64)&1 != 0 {
				continue
			}
			c.taken[at/64] |= 1 << (at % 64)
			c.left--
			c.found = appendClaim(c.found, claim{first: b, n: 1, kind: cl.kind, ino: cl.ino, logical: cl.logical + b - cl.first})
		}
	}
}

// appendClaim appends cl, joined to the last where it continues it.
func appendClaim(to []claim, cl claim) []claim {
	if n := len(to); n > 0 {
		last := &to[n-1]
		if last.first+last.n == cl.first && last.kind == cl.kind && last.ino == cl.ino &&
			(!cl.kind.inFile() || last.logical+last.n == cl.logical) {
			last.n += cl.n
			return to
		}
	}
	return append(to, cl)
}

// inFile reports whether blocks of the kind have a place in their file.
func (k Kind) inFile() bool { return k >= KindData && k <= KindSymlink }

// search asks inodes until no wanted block is left.
func (c *claims) search(hints []uint32) error {
	for _, ino := range slices.Concat(hints, c.fs.fc.touched()) {
		n, err := c.fs.Inode(ino)
		if isNotExist(err) {
			continue
		}
		if err == nil {
			err = c.inode(n)
		}
		if err != nil {
			return err
		}
	}
	for _, ino := range []uint32{journalIno, resizeIno, badBlocksIno} {
		if err := c.special(ino); err != nil {
			return err
		}
	}
	return c.scan()
}

// special asks an inode that no directory names and that may be unused.
func (c *claims) special(ino uint32) error {
	if c.left == 0 {
		return nil
	}
	raw, err := c.fs.rawInode(ino)
	if err != nil {
		return err
	}
	n, err := c.fs.parseInode(ino, raw)
	if err != nil {
		return err
	}
	return c.inode(n)
}

// scan asks all inodes, those near the wanted blocks first, until no block is
// left.
func (c *claims) scan() error {
	for _, g := range c.groups() {
		if c.left == 0 {
			return nil
		}
		for n, err := range c.fs.groupInodes(g) {
			if err == nil {
				err = c.inode(n)
			}
			if err != nil {
				return err
			}
			if c.left == 0 {
				return nil
			}
		}
	}
	return nil
}

// groups returns all block groups, those that wanted blocks lie in first.
func (c *claims) groups() []uint64 {
	sb := c.fs.sb
	var out []uint64
	near := make([]bool, sb.groups)
	for _, w := range c.wanted {
		first := max(w.first, sb.firstDataBlock)
		if first >= w.first+w.n {
			continue
		}
		for g := sb.groupOf(first); g <= sb.groupOf(w.first+w.n-1); g++ {
			if !near[g] {
				near[g] = true
				out = append(out, g)
			}
		}
	}
	for g := range sb.groups {
		if !near[g] {
			out = append(out, g)
		}
	}
	return out
}

// inode gives to an inode what it claims.
func (c *claims) inode(n *Inode) error {
	sb := c.fs.sb
	data, node := c.fs.kinds(n)
	err := n.walkMap(func(r run) error {
		c.take(sb.wholeClusters(claim{first: r.phys, n: r.n, kind: data, ino: n.Ino, logical: r.logical}))
		return c.pass()
	}, func(b uint64) error {
		c.take(sb.wholeClusters(claim{first: b, n: 1, kind: node, ino: n.Ino}))
		return c.pass()
	})
	if err != nil {
		return fmt.Errorf("inode %d: %w", n.Ino, err)
	}
	if b := n.xattrBlock; sb.validRun(b, 1) {
		c.take(sb.wholeClusters(claim{first: b, n: 1, kind: KindXattr, ino: n.Ino}))
	}
	return nil
}

// pass counts a run or a block of a map. A sound file system has no more of
// them than twice its blocks; a forged one, where inodes share their maps,
// could keep the search busy for very long.
func (c *claims) pass() error {
	if c.passed++; c.passed > 2*c.fs.sb.blocks && c.fs.sb.roCompat&roCompatSharedBlocks == 0 {
		return corrupt("files have more extents than there are blocks")
	}
	return nil
}

// kinds returns what the blocks of an inode, and those of its map, are.
func (f *FS) kinds(n *Inode) (data, node Kind) {
	sb := f.sb
	switch {
	case n.Ino == sb.journalIno && n.Ino != 0:
		return KindJournal, KindJournal
	case n.Ino == resizeIno:
		return KindDescriptors, KindDescriptors
	case n.Ino != RootIno && n.Ino < sb.firstIno, n.Ino == sb.orphanIno, slices.Contains(sb.quotaInos[:], n.Ino):
		return KindReserved, KindReserved
	case n.Flags&FlagEAInode != 0:
		return KindXattr, KindXattr
	case n.IsDir():
		return KindDirectory, KindMap
	case n.IsSymlink():
		return KindSymlink, KindMap
	}
	return KindData, KindMap
}

// owners returns what was found, in bytes and cut to the ranges, with what was
// not found filled in.
func (c *claims) owners(ranges []Range) []Owner {
	slices.SortFunc(c.found, func(a, b claim) int { return cmp.Compare(a.first, b.first) })
	var found []claim
	for _, cl := range c.found {
		found = appendClaim(found, cl)
	}
	bs := int64(c.fs.sb.blockSize)
	end := int64(c.fs.sb.blocks) * bs
	var out []Owner
	for _, r := range ranges {
		for at := r.Off; at < r.Off+r.N; {
			for len(found) > 0 && int64(found[0].first+found[0].n)*bs <= at {
				found = found[1:]
			}
			o := Owner{Range: Range{at, r.Off + r.N - at}, Kind: KindOutside}
			switch {
			case at >= end:
			case len(found) > 0 && int64(found[0].first)*bs <= at:
				o = found[0].owner(at, o.N, bs)
			default:
				o.Kind = KindUnknown
				o.N = min(o.N, end-at)
				if len(found) > 0 {
					o.N = min(o.N, int64(found[0].first)*bs-at)
				}
			}
			out = append(out, o)
			at += o.N
		}
	}
	return out
}

// owner returns what the claim says of at most n bytes at offset at, which
// lies in it, with blocks of bs bytes.
func (cl claim) owner(at, n, bs int64) Owner {
	o := Owner{Range: Range{at, min(n, int64(cl.first+cl.n)*bs-at)}, Kind: cl.kind, Ino: cl.ino}
	if cl.kind.inFile() {
		o.FileOff = int64(cl.logical)*bs + at - int64(cl.first)*bs
	}
	return o
}

// A metaRange is blocks of the file system's own metadata.
type metaRange struct {
	first, n uint64
	kind     Kind
	group    uint64
}

// computeLayout returns where the file system's metadata lies, sorted.
func (f *FS) computeLayout() ([]metaRange, error) {
	sb := f.sb
	var out []metaRange
	add := func(first, n uint64, kind Kind, g uint64) {
		if first < sb.blocks && n > 0 {
			out = append(out, metaRange{first, min(n, sb.blocks-first), kind, g})
		}
	}
	add(0, sb.firstDataBlock, KindSuperblock, 0)
	if sb.mmpBlock != 0 {
		add(sb.mmpBlock, 1, KindMMP, 0)
	}
	for g := range sb.groups {
		d, err := f.group(g)
		if err != nil {
			return nil, err
		}
		first, head := sb.firstBlock(g), sb.headBlocks(g)
		if sb.hasSuper(g) {
			add(first, 1, KindSuperblock, g)
			first, head = first+1, head-1
		}
		add(first, head, KindDescriptors, g)
		add(d.blockBitmap, 1, KindBlockBitmap, g)
		add(d.inodeBitmap, 1, KindInodeBitmap, g)
		add(d.inodeTable, f.tableBlocks, KindInodeTable, g)
	}
	slices.SortFunc(out, func(a, b metaRange) int { return cmp.Compare(a.first, b.first) })
	return out, nil
}
