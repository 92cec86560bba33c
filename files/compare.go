package files

import (
	"cmp"
	"fmt"
	"io/fs"
	"path"
	"slices"

	"github.com/cowdev/cowdev/block"
)

// Options says how to compare.
type Options struct {
	// Changed are the ranges of bytes in which the two file systems' images
	// may differ, from the beginning of the file system, ascending. With them
	// and two ext file systems only what they can have touched is compared.
	Changed []block.Extent

	// All compares everything, whatever Changed says.
	All bool

	// NoRenames reports a renamed file as removed and added.
	NoRenames bool
}

// A Result is what Compare found.
type Result struct {
	Changes []*Change // by path
	Fast    bool      // only what the changed ranges can have touched was compared

	// Encrypted are the paths, in order, of what is encrypted in either tree
	// and may differ: only its own attributes were compared.
	Encrypted []string

	// Links holds the paths in the new tree of the files that have several,
	// of each at least all its paths when one of them is in Changes.
	Links map[uint64][]string

	flat []*Change // Changes without renames
}

// Compare compares the trees of two file systems, old and new.
func Compare(old, new FS, o Options) (*Result, error) {
	c := &comparer{links: map[uint64][]string{}, seen: map[[2]uint64]bool{}, judged: map[[2]uint64]verdict{}}
	a, b, ext := extPair(old, new)
	if c.sameIDs = ext; ext && !o.All {
		var err error
		if c.affected, err = findAffected(a, b, o.Changed); err != nil {
			return nil, fmt.Errorf("find what changed: %w", err)
		}
	}
	roots := [2]File{}
	for i, fsys := range []FS{old, new} {
		root, err := fsys.Root()
		if err != nil {
			return nil, err
		}
		roots[i] = root
	}
	if err := c.pair("/", roots[0], roots[1], 0); err != nil {
		return nil, err
	}
	sortChanges(c.changes)
	if ext {
		if err := c.countLinksOnce(b); err != nil {
			return nil, err
		}
	}
	slices.SortFunc(c.encrypted, comparePaths)
	r := &Result{Changes: c.changes, Fast: c.affected != nil, Links: c.links, flat: c.changes, Encrypted: slices.Compact(c.encrypted)}
	if !o.NoRenames && c.sameIDs {
		var err error
		if r.Changes, err = c.withRenames(); err != nil {
			return nil, err
		}
	}
	return r, nil
}

// comparer walks two trees side by side.
type comparer struct {
	affected *affected // nil: everything is
	sameIDs  bool      // an ID means the same file in both trees

	changes   []*Change
	encrypted []string
	links     map[uint64][]string   // new paths of files with several
	seen      map[[2]uint64]bool    // pairs of directories that were entered
	judged    map[[2]uint64]verdict // pairs of files that have several paths
	shared    [2]map[uint64]shared  // files with several paths, in either tree
	lonely    [2]map[uint64]bool    // directories entered in one tree alone
}

// verdict is what comparing two files gave.
type verdict struct {
	differ Aspect
	bytes  int64
}

// pair compares two files of one path.
func (c *comparer) pair(name string, a, b File, depth int) error {
	if a.Attr().Mode.Type() != b.Attr().Mode.Type() {
		if err := c.alone(Removed, name, a); err != nil {
			return err
		}
		return c.alone(Added, name, b)
	}
	c.noteLink(name, b)
	v, err := c.judge(a, b)
	if err != nil {
		return fmt.Errorf("compare %s: %w", name, err)
	}
	linkTo, relinked := c.relinked(name, a, b)
	if relinked {
		v.differ |= Links
	}
	if v.differ != 0 {
		status := Attributes
		if v.differ&contents != 0 {
			status = Modified
		}
		c.changes = append(c.changes, &Change{Status: status, Path: name, LinkTo: linkTo, Differ: v.differ, Bytes: v.bytes, Old: a, New: b})
	}
	if err := cmp.Or(c.skipEncrypted(name, a), c.skipEncrypted(name, b)); err != nil || !a.Attr().Mode.IsDir() {
		return nil
	}
	ids := [2]uint64{a.Attr().ID, b.Attr().ID}
	if depth > maxDepth || ids[0] != 0 && c.seen[ids] {
		return loopError(name)
	}
	c.seen[ids] = true
	return c.directories(name, a, b, depth)
}

// shared is the first path at which a file with several was met in both
// trees, and the file's number in the other tree.
type shared struct {
	path  string
	other uint64
}

// relinked reports whether the file of a path in both trees shares it with
// other paths in one of them only: with linkTo in the new tree, or with some
// path in the old one that has another file now.
func (c *comparer) relinked(name string, a, b File) (linkTo string, relinked bool) {
	x, y := a.Attr(), b.Attr()
	if !c.sameIDs || x.Mode.IsDir() || x.Links < 2 && y.Links < 2 {
		return "", false
	}
	ids := [2]uint64{x.ID, y.ID}
	for tree := range ids {
		if c.shared[tree] == nil {
			c.shared[tree] = map[uint64]shared{}
		}
		first, met := c.shared[tree][ids[tree]]
		switch {
		case !met:
			c.shared[tree][ids[tree]] = shared{name, ids[1-tree]}
		case first.other != ids[1-tree]:
			relinked = true
			if tree == 1 {
				linkTo = first.path
			}
		}
	}
	return linkTo, relinked
}

// directories compares what two directories of one path hold.
func (c *comparer) directories(name string, a, b File, depth int) error {
	lists := [2][]Entry{}
	for i, dir := range []File{a, b} {
		entries, err := dir.ReadDir()
		if err != nil {
			return fmt.Errorf("list %s: %w", name, err)
		}
		lists[i] = entries
	}
	old, new := lists[0], lists[1]
	for len(old) > 0 || len(new) > 0 {
		var err error
		switch {
		case len(new) == 0 || len(old) > 0 && old[0].Name < new[0].Name:
			err = c.entry(Removed, name, a, old[0])
			old = old[1:]
		case len(old) == 0 || new[0].Name < old[0].Name:
			err = c.entry(Added, name, b, new[0])
			new = new[1:]
		default:
			err = c.entries(name, a, b, old[0], new[0], depth)
			old, new = old[1:], new[1:]
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// entries compares what stands under one name in two directories, unless it
// is known to be the same.
func (c *comparer) entries(dir string, a, b File, old, new Entry, depth int) error {
	name := path.Join(dir, old.Name)
	if c.affected != nil && old.ID == new.ID && !c.affected.touched[old.ID] && !c.affected.above[old.ID] {
		return nil
	}
	x, err := a.Child(old.Name)
	if err != nil {
		return fmt.Errorf("open %s in the old tree: %w", name, err)
	}
	y, err := b.Child(new.Name)
	if err != nil {
		return fmt.Errorf("open %s in the new tree: %w", name, err)
	}
	return c.pair(name, x, y, depth+1)
}

// entry notes an entry that stands in one of the trees only.
func (c *comparer) entry(status Status, dir string, d File, e Entry) error {
	name := path.Join(dir, e.Name)
	f, err := d.Child(e.Name)
	if err != nil {
		return fmt.Errorf("open %s: %w", name, err)
	}
	return c.alone(status, name, f)
}

// alone notes a file, and all below it, that one of the trees only has.
func (c *comparer) alone(status Status, name string, f File) error {
	tree := 0
	if status == Added {
		tree = 1
	}
	if c.lonely[tree] == nil {
		c.lonely[tree] = map[uint64]bool{}
	}
	w := walker{seen: c.lonely[tree], visit: func(name string, f File) error {
		ch := &Change{Status: status, Path: name}
		if a := f.Attr(); a.Mode.IsRegular() {
			ch.Bytes = a.Size
		}
		if status == Added {
			ch.New = f
			c.noteLink(name, f)
		} else {
			ch.Old = f
		}
		c.changes = append(c.changes, ch)
		return c.skipEncrypted(name, f)
	}}
	return w.walk(name, f, 0)
}

// noteLink keeps the path of a file that has several.
func (c *comparer) noteLink(name string, f File) {
	if a := f.Attr(); a.ID != 0 && a.Links > 1 && !a.Mode.IsDir() {
		c.links[a.ID] = append(c.links[a.ID], name)
	}
}

// judge compares two files of one kind, each pair once.
func (c *comparer) judge(a, b File) (verdict, error) {
	x, y := a.Attr(), b.Attr()
	ids := [2]uint64{x.ID, y.ID}
	several := ids[0] != 0 && x.Links > 1 && !x.Mode.IsDir()
	if v, ok := c.judged[ids]; ok && several {
		return v, nil
	}
	d, err := differ(a, b)
	if err != nil {
		return verdict{}, err
	}
	v := verdict{differ: d}
	if x.Mode.IsRegular() && !Encrypted(a) && !Encrypted(b) {
		if v.bytes, err = c.content(a, b); err != nil {
			return verdict{}, err
		}
		if v.bytes > 0 {
			v.differ |= Content
		}
	}
	if several {
		c.judged[ids] = v
	}
	return v, nil
}

// content counts the bytes in which two regular files differ.
func (c *comparer) content(a, b File) (int64, error) {
	x, y := a.Attr().Size, b.Attr().Size
	common := []span{{0, min(x, y)}}
	if c.affected != nil {
		var err error
		if common, err = c.affected.mayDiffer(a, b); err != nil {
			return 0, err
		}
	}
	n, err := differingBytes(a, b, common)
	return n + max(x, y) - min(x, y), err
}

// countLinksOnce lets the bytes of a file with several paths count at one of
// them, and gives the others a LinkTo. A removed path of a file that is still
// there counts nothing.
func (c *comparer) countLinksOnce(new extFS) error {
	if err := c.findOtherLinks(new); err != nil {
		return err
	}
	for _, paths := range c.links {
		slices.SortFunc(paths, comparePaths)
	}
	removed, modified := map[identity]bool{}, map[uint64]string{}
	for _, ch := range c.changes {
		a := ch.Attr()
		switch {
		case a.Links < 2 || a.Mode.IsDir():
		case ch.Status == Added && c.links[a.ID][0] != ch.Path:
			ch.LinkTo, ch.Bytes = c.links[a.ID][0], 0
		case ch.Status == Removed:
			id := identityOf(ch.Old)
			if removed[id] || new.has(id) {
				ch.Bytes = 0
			}
			removed[id] = true
		case ch.Status == Modified:
			if first, ok := modified[a.ID]; ok {
				ch.LinkTo, ch.Bytes = first, 0
				break
			}
			modified[a.ID] = ch.Path
		}
	}
	return nil
}

// findOtherLinks completes links for the added paths: below a directory that
// was moved stand files that are the same as before, and whose other paths no
// walk came by.
func (c *comparer) findOtherLinks(new extFS) error {
	var inos []uint32
	for _, ch := range c.changes {
		if a := ch.Attr(); ch.Status == Added && a.Links > 1 && !a.Mode.IsDir() && len(c.links[a.ID]) < int(a.Links) {
			inos = append(inos, uint32(a.ID))
		}
	}
	paths, err := new.paths(inos)
	if err != nil {
		return fmt.Errorf("find the other names of files: %w", err)
	}
	for ino, list := range paths {
		c.links[uint64(ino)] = list
	}
	return nil
}

// withRenames returns the changes with one in place of a removed and an added
// path of the same file. A file below a renamed directory that kept its place
// in it is no change at all, but for what else differs.
func (c *comparer) withRenames() ([]*Change, error) {
	gone := map[identity][]*Change{}
	for _, ch := range c.changes {
		if ch.Status == Removed {
			id := identityOf(ch.Old)
			gone[id] = append(gone[id], ch)
		}
	}
	paired := map[*Change]bool{}
	moved := map[string]string{} // new path: old one, of directories
	var out []*Change
	for _, ch := range c.changes {
		if ch.Status == Removed {
			continue
		}
		if was := gone[identityOf(ch.New)]; ch.Status == Added && len(was) > 0 {
			v, err := c.judge(was[0].Old, ch.New)
			if err != nil {
				return nil, fmt.Errorf("compare %s with %s: %w", was[0].Path, ch.Path, err)
			}
			if v.renamed(ch.New) {
				gone[identityOf(ch.New)] = was[1:]
				paired[was[0]] = true
				ch = renamed(ch, was[0], v, moved)
			}
		}
		if ch != nil {
			out = append(out, ch)
		}
	}
	for _, ch := range c.changes {
		if ch.Status == Removed && !paired[ch] {
			out = append(out, ch)
		}
	}
	sortChanges(out)
	return out, nil
}

// identity tells a file from others that had its number.
type identity struct {
	id         uint64
	generation uint32
	typ        fs.FileMode
	born       int64 // nanoseconds
}

func identityOf(f File) identity {
	a := f.Attr()
	return identity{a.ID, a.Generation, a.Mode.Type(), a.Born.UnixNano()}
}

// renamed reports whether a file of one identity in both trees is the same
// one. Tools that write file systems give all files the generation 0; then a
// new file may have taken a removed one's number, and the content decides.
func (v verdict) renamed(f File) bool {
	return f.Attr().Generation != 0 || v.differ&contents == 0
}

// renamed makes one change of an added path and the removed one of the same
// file, nil where there is nothing to say. It is called in the order of the
// new paths, so a directory is in moved before what it holds.
func renamed(added, removed *Change, v verdict, moved map[string]string) *Change {
	if added.New.Attr().Mode.IsDir() {
		moved[added.Path] = removed.Path
	}
	ch := &Change{Path: added.Path, From: removed.Path, Differ: v.differ, Bytes: v.bytes, Old: removed.Old, New: added.New}
	from, inMoved := moved[path.Dir(added.Path)]
	switch inPlace := inMoved && path.Join(from, path.Base(added.Path)) == removed.Path; {
	case !inPlace:
		ch.Status = Renamed
	case v.differ&contents != 0:
		ch.Status = Modified
	case v.differ != 0:
		ch.Status = Attributes
	default:
		return nil
	}
	return ch
}

// differingBytes counts the bytes in which a and b differ within spans.
func differingBytes(a, b File, spans []span) (int64, error) {
	const piece = 1 << 20
	var total int64
	buf := make([]byte, 0)
	for _, s := range spans {
		for off := s.off; off < s.end; off += piece {
			n := int(min(piece, s.end-off))
			if len(buf) < 2*n {
				buf = make([]byte, 2*n)
			}
			x, y := buf[:n], buf[n:2*n]
			if err := readFull(a, x, off); err != nil {
				return 0, err
			}
			if err := readFull(b, y, off); err != nil {
				return 0, err
			}
			total += countDiffering(x, y)
		}
	}
	return total, nil
}

// span is the bytes [off, end).
type span struct{ off, end int64 }

// compareSpan orders spans by where they begin.
func compareSpan(a, b span) int { return cmp.Compare(a.off, b.off) }
