package ext4

import (
	"fmt"
	"maps"
	"slices"
	"sort"
)

// A fast commit is a list of tags, little-endian unlike the rest of the
// journal, that says what changed since the last whole transaction: inodes,
// ranges of files, names. The kernel carries these out on the file system when
// it mounts it; here they stay in memory, in front of what is stored.
const (
	fcAddRange = 1
	fcDelRange = 2
	fcCreate   = 3
	fcLink     = 4
	fcUnlink   = 5
	fcInode    = 6
	fcPad      = 7
	fcTail     = 8
	fcHead     = 9

	fcTagHeader = 4 // type, length
	maxName     = 255
)

// fastCommit is the state that fast commits left. A nil one is of a file
// system without any.
type fastCommit struct {
	inodes map[uint32]*fcFile
	dirs   map[uint32]dirIndex // all entries of the directories that changed
	blocks []run               // that files were given, by phys
	work   int                 // names and runs passed by the replay, at most maxFastWork
}

// An fcFile is an inode that fast commits changed.
type fcFile struct {
	raw    []byte
	freed  bool
	mapped bool  // runs is the file's block map, not what raw leads to
	runs   []run // by logical
}

// An fcOp is one tag.
type fcOp struct {
	tag uint16
	val []byte
	raw []byte // with the header
}

// replayFastCommits takes the fast commits that follow transaction sequence-1.
func (f *FS) replayFastCommits(j *journal, sequence uint32) error {
	ops, err := j.fastCommitOps(sequence)
	if err != nil || len(ops) == 0 {
		return err
	}
	f.fc = &fastCommit{inodes: map[uint32]*fcFile{}, dirs: map[uint32]dirIndex{}}
	for _, op := range ops {
		if err := f.replayOp(op); err != nil {
			return err
		}
		if f.fc.work > maxFastWork {
			return fmt.Errorf("more work than expected: %w", ErrUnsupported)
		}
	}
	f.recovered.FastCommits = len(ops)
	for _, file := range f.fc.inodes {
		if file.mapped && !file.freed {
			f.fc.blocks = append(f.fc.blocks, file.runs...)
		}
	}
	slices.SortFunc(f.fc.blocks, func(a, b run) int { return int(int64(a.phys) - int64(b.phys)) })
	return nil
}

// fastCommitOps returns the tags up to the last tail that is complete.
func (j *journal) fastCommitOps(sequence uint32) ([]fcOp, error) {
	var ops []fcOp
	complete := 0 // of ops
	sum := uint32(0)
	for l := j.fastFirst; l < j.fastEnd; l++ {
		_, p, err := j.block(l)
		if err != nil {
			return nil, err
		}
		if l == j.fastFirst && le.Uint16(p) != fcHead {
			return nil, nil
		}
		p = slices.Clone(p)
		for len(p) >= fcTagHeader {
			op, ok := nextOp(p, j.fs.sb.inodeSize)
			if !ok {
				return ops[:complete], nil
			}
			p = p[len(op.raw):]
			ops = append(ops, op)
			switch op.tag {
			case fcHead:
				if features, tid := le.Uint32(op.val), le.Uint32(op.val[4:]); tid != sequence {
					return ops[:complete], nil
				} else if features != 0 {
					return nil, fmt.Errorf("features %#x: %w", features, ErrUnsupported)
				}
			case fcTail:
				sum = crc32c(sum, op.raw[:fcTagHeader+4])
				if le.Uint32(op.val) != sequence || le.Uint32(op.val[4:]) != sum {
					return ops[:complete], nil
				}
				complete, sum = len(ops), 0
				continue
			}
			sum = crc32c(sum, op.raw)
		}
	}
	return ops[:complete], nil
}

// nextOp decodes the tag that p begins with; false if it is none.
func nextOp(p []byte, inodeSize int) (fcOp, bool) {
	op := fcOp{tag: le.Uint16(p)}
	n := int(le.Uint16(p[2:]))
	if fcTagHeader+n > len(p) {
		return op, false
	}
	ok := false
	switch op.tag {
	case fcAddRange:
		ok = n == 16
	case fcDelRange:
		ok = n == 12
	case fcCreate, fcLink, fcUnlink:
		ok = n > 8 && n <= 8+maxName
	case fcInode:
		ok = n >= 4+128 && n <= 4+inodeSize
	case fcHead:
		ok = n == 8
	case fcTail:
		ok = n >= 8
	case fcPad:
		ok = true
	}
	op.raw = p[:fcTagHeader+n]
	op.val = op.raw[fcTagHeader:]
	return op, ok
}

// replayOp carries out one tag.
func (f *FS) replayOp(op fcOp) error {
	switch op.tag {
	case fcInode:
		return f.replayInode(le.Uint32(op.val), op.val[4:])
	case fcAddRange:
		r := decodeExtent(op.val[4:])
		if !f.sb.validRun(r.phys, r.n) {
			return corrupt("extent at blocks %d+%d is outside of the file system", r.phys, r.n)
		}
		return f.replayRange(le.Uint32(op.val), r)
	case fcDelRange:
		return f.replayRange(le.Uint32(op.val), run{logical: uint64(le.Uint32(op.val[4:])), n: uint64(le.Uint32(op.val[8:]))})
	case fcCreate, fcLink:
		return f.replayLink(le.Uint32(op.val), le.Uint32(op.val[4:]), string(op.val[8:]), op.tag == fcCreate)
	case fcUnlink:
		return f.replayUnlink(le.Uint32(op.val), le.Uint32(op.val[4:]), string(op.val[8:]))
	}
	return nil
}

// change returns the state of an inode that is to be changed.
func (f *FS) change(ino uint32) (*fcFile, error) {
	if file := f.fc.inodes[ino]; file != nil {
		return file, nil
	}
	raw, err := f.rawInode(ino)
	if err != nil {
		return nil, err
	}
	file := &fcFile{raw: slices.Clone(raw)}
	f.fc.inodes[ino] = file
	return file, nil
}

// replayInode takes all of the inode but its extents and attributes, which
// have tags of their own or are not part of fast commits.
func (f *FS) replayInode(ino uint32, raw []byte) error {
	const mapAt, mapEnd = 0x28, 0x64
	file, err := f.change(ino)
	if err != nil {
		return err
	}
	blk := file.raw[mapAt:mapEnd]
	if file.freed {
		file.freed, file.mapped, file.runs = false, true, nil
		clear(blk)
	}
	copy(file.raw[:mapAt], raw[:mapAt])
	copy(file.raw[mapEnd:], raw[mapEnd:])
	if le.Uint32(raw[0x20:])&FlagExtents == 0 {
		copy(blk, raw[mapAt:])
	} else if le.Uint16(blk) != extentMagic {
		clear(blk)
		le.PutUint16(blk, extentMagic)
		le.PutUint16(blk[4:], uint16((len(blk)-extentHeader)/extentSize))
	}
	return nil
}

// replayRange gives the file the blocks of r, or takes away what it had there
// if r.phys is 0.
func (f *FS) replayRange(ino uint32, r run) error {
	if r.logical+r.n > maxLogical {
		return corrupt("range of blocks %d+%d", r.logical, r.n)
	}
	file, err := f.change(ino)
	if err != nil {
		return err
	}
	if !file.mapped {
		n, err := f.parseInode(ino, file.raw)
		if err != nil {
			return err
		}
		runs, err := n.blockRuns()
		if err != nil {
			return err
		}
		file.mapped, file.runs = true, runs
	}
	file.runs = replaceRun(file.runs, r)
	f.fc.work += len(file.runs)
	return nil
}

// replaceRun returns runs with what they had at r's blocks cut out, and r put
// in there unless r.phys is 0.
func replaceRun(runs []run, r run) []run {
	out := make([]run, 0, len(runs)+2)
	i := 0
	for ; i < len(runs) && runs[i].logical < r.logical; i++ {
		before := runs[i]
		before.n = min(before.n, r.logical-before.logical)
		out = appendRun(out, before)
	}
	if r.phys != 0 && r.n != 0 {
		out = appendRun(out, r)
	}
	// The run before r may go on after it.
	for i = max(i-1, 0); i < len(runs); i++ {
		after := runs[i]
		if cut := r.logical + r.n; after.logical < cut {
			skip := min(after.n, cut-after.logical)
			after.logical, after.phys, after.n = after.logical+skip, after.phys+skip, after.n-skip
		}
		if after.n > 0 {
			out = appendRun(out, after)
		}
	}
	return out
}

// names returns the entries of a directory, to be changed.
func (f *FS) names(ino uint32) (dirIndex, error) {
	if names, ok := f.fc.dirs[ino]; ok {
		return names, nil
	}
	dir, err := f.Inode(ino)
	if err != nil {
		return nil, err
	}
	names := dirIndex{}
	err = f.readDir(dir, func(e Dirent) error {
		names[string(e.Name)] = entry{e.Ino, e.Type}
		return nil
	})
	if err != nil {
		return nil, err
	}
	f.fc.dirs[ino] = names
	f.fc.work += len(names)
	return names, nil
}

// replayLink gives an inode a name; create says that it is its first.
func (f *FS) replayLink(parent, ino uint32, name string, create bool) error {
	file, err := f.change(ino)
	if err != nil {
		return err
	}
	names, err := f.names(parent)
	if err != nil {
		return err
	}
	typ := le.Uint16(file.raw) & modeType
	isDir := typ == ModeDir
	if create && isDir {
		f.fc.dirs[ino] = dirIndex{".": {ino, ModeDir}, "..": {parent, ModeDir}}
	}
	links := le.Uint16(file.raw[0x1A:])
	switch _, exists := names[name]; {
	case create && !isDir:
		links = 1
	case !create && !exists:
		links++
	}
	le.PutUint16(file.raw[0x1A:], links)
	names[name] = entry{ino, typ}
	return nil
}

// replayUnlink takes away a name, and the inode with its last.
func (f *FS) replayUnlink(parent, ino uint32, name string) error {
	names, err := f.names(parent)
	if err != nil {
		return err
	}
	if names[name].ino != ino {
		return nil // it is gone already
	}
	file, err := f.change(ino)
	if err != nil {
		return err
	}
	delete(names, name)
	links := le.Uint16(file.raw[0x1A:])
	isDir := le.Uint16(file.raw)&modeType == ModeDir
	links = max(links, 1) - 1
	if links == 0 || isDir {
		links, file.freed = 0, true
		delete(f.fc.dirs, ino)
	}
	le.PutUint16(file.raw[0x1A:], links)
	return nil
}

// inode returns the inode as fast commits left it, or nil if they did not
// touch it.
func (c *fastCommit) inode(ino uint32) []byte {
	if c == nil || c.inodes[ino] == nil {
		return nil
	}
	return c.inodes[ino].raw
}

// used reports whether an inode is in use, if fast commits say.
func (c *fastCommit) used(ino uint32) (used, known bool) {
	if c == nil || c.inodes[ino] == nil {
		return false, false
	}
	return !c.inodes[ino].freed, true
}

// runs returns a file's runs, if fast commits changed them.
func (c *fastCommit) runs(ino uint32) ([]run, bool) {
	if c == nil || c.inodes[ino] == nil || !c.inodes[ino].mapped {
		return nil, false
	}
	return c.inodes[ino].runs, true
}

// usesBlock reports whether fast commits gave block b to a file.
func (c *fastCommit) usesBlock(b uint64) bool {
	if c == nil {
		return false
	}
	i := sort.Search(len(c.blocks), func(i int) bool { return c.blocks[i].phys+c.blocks[i].n > b })
	return i < len(c.blocks) && c.blocks[i].phys <= b
}

// readDir calls fn for the directory's entries: those that fast commits left,
// sorted, or if they did not touch it those that are stored.
func (c *fastCommit) readDir(f *FS, dir *Inode, fn func(Dirent) error) error {
	if c == nil || c.dirs[dir.Ino] == nil {
		return f.readStored(dir, fn)
	}
	names := c.dirs[dir.Ino]
	for _, name := range slices.Sorted(maps.Keys(names)) {
		if err := fn(Dirent{Name: []byte(name), Ino: names[name].ino, Type: names[name].typ}); err != nil {
			return err
		}
	}
	return nil
}

// touched returns the inodes that fast commits changed, those of directories
// whose names they changed included.
func (c *fastCommit) touched() []uint32 {
	if c == nil {
		return nil
	}
	return append(slices.Collect(maps.Keys(c.inodes)), slices.Collect(maps.Keys(c.dirs))...)
}
