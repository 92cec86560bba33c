package ext4

import (
	"fmt"
	"slices"
)

// A Name is one of the names of an inode: an entry of a directory.
type Name struct {
	Dir  uint32
	Name string
}

// Names finds the names of inodes, all of those that have several. The
// directories in hints are read first, then those near the inodes, then all
// others, until as many names were found as the inodes have links. An inode
// without a name is missing from what is returned: the root, one that was
// unlinked while open, one of the file system itself.
func (f *FS) Names(inos, hints []uint32) (map[uint32][]Name, error) {
	s := nameSearch{fs: f, left: map[uint32]uint32{}, found: map[uint32][]Name{}, seen: map[uint32]bool{}}
	for _, ino := range inos {
		if err := s.want(ino); err != nil {
			return nil, err
		}
	}
	for _, dir := range append(s.parents, hints...) {
		if err := s.read(dir); err != nil {
			return nil, err
		}
	}
	return s.found, s.scan(inos)
}

// A nameSearch looks for the names of inodes.
type nameSearch struct {
	fs      *FS
	left    map[uint32]uint32 // names not found yet
	found   map[uint32][]Name
	parents []uint32 // of wanted directories
	seen    map[uint32]bool
	passed  int64 // bytes of directories read, at most the file system's size
}

// want adds an inode to what is looked for.
func (s *nameSearch) want(ino uint32) error {
	n, err := s.fs.Inode(ino)
	if isNotExist(err) || ino == RootIno {
		return nil
	}
	if err != nil {
		return err
	}
	switch {
	case n.Links == 0 || n.Flags&FlagEAInode != 0 || ino < s.fs.sb.firstIno || ino == s.fs.sb.orphanIno:
	case n.IsDir():
		parent, err := s.fs.Parent(n)
		if err != nil {
			return err
		}
		s.parents = append(s.parents, parent)
		s.left[ino] = 1
	default:
		s.left[ino] = n.Links
	}
	return nil
}

// read looks through one directory.
func (s *nameSearch) read(dir uint32) error {
	if s.seen[dir] || len(s.left) == 0 {
		return nil
	}
	n, err := s.fs.Inode(dir)
	if isNotExist(err) {
		return nil
	}
	if err != nil {
		return err
	}
	return s.readInode(n)
}

func (s *nameSearch) readInode(dir *Inode) error {
	if s.seen[dir.Ino] || !dir.IsDir() || dir.Links == 0 || dir.Flags&FlagEncrypted != 0 {
		return nil
	}
	s.seen[dir.Ino] = true
	if s.passed += dir.Size; s.passed > int64(s.fs.sb.blocks)*int64(s.fs.sb.blockSize) {
		return corrupt("directories take more space than there is")
	}
	return s.fs.ReadDir(dir, func(e Dirent) error {
		left, ok := s.left[e.Ino]
		if !ok {
			return nil
		}
		s.found[e.Ino] = append(s.found[e.Ino], Name{dir.Ino, string(e.Name)})
		if s.left[e.Ino] = left - 1; left == 1 {
			delete(s.left, e.Ino)
		}
		return nil
	})
}

// scan reads the directories of all groups, those of the wanted inodes first:
// the kernel puts a file's inode into its directory's group.
func (s *nameSearch) scan(inos []uint32) error {
	perGroup := s.fs.sb.inodesPerGroup
	var order []uint64
	for _, ino := range inos {
		if s.left[ino] > 0 {
			order = append(order, uint64((ino-1)/perGroup))
		}
	}
	slices.Sort(order)
	order = slices.Compact(order)
	near := len(order)
	for g := range s.fs.sb.groups {
		if _, ok := slices.BinarySearch(order[:near], g); !ok {
			order = append(order, g)
		}
	}
	for _, g := range order {
		if len(s.left) == 0 {
			return nil
		}
		if err := s.scanGroup(g); err != nil {
			return err
		}
	}
	return nil
}

// scanGroup reads the directories of one group.
func (s *nameSearch) scanGroup(g uint64) error {
	d, err := s.fs.group(g)
	if err != nil {
		return err
	}
	if d.usedDirs == 0 && s.fs.fc == nil {
		return nil
	}
	for n, err := range s.fs.groupInodes(g) {
		if err != nil {
			return err
		}
		if err := s.readInode(n); err != nil {
			return err
		}
		if len(s.left) == 0 {
			return nil
		}
	}
	return nil
}

// Parent returns the inode of a directory's parent; the root's is the root.
func (f *FS) Parent(dir *Inode) (uint32, error) {
	var parent uint32
	err := f.readDir(dir, func(e Dirent) error {
		if string(e.Name) != ".." {
			return nil
		}
		parent = e.Ino
		return errStop
	})
	if err != nil && err != errStop {
		return 0, err
	}
	if parent == 0 {
		return 0, fmt.Errorf("directory %d: %w", dir.Ino, corrupt("no entry \"..\""))
	}
	return parent, nil
}

// maxPaths is how many directories' paths are kept.
const maxPaths = 1 << 16

// DirPath returns the path of a directory from the root, without a slash at
// its beginning or end: "" is the root.
func (f *FS) DirPath(ino uint32) (string, error) {
	f.pathMu.Lock()
	defer f.pathMu.Unlock()
	if len(f.paths) > maxPaths {
		f.paths = map[uint32]string{RootIno: ""}
	}
	return f.dirPath(ino, map[uint32]bool{})
}

// dirPath is DirPath for a directory above those in below; pathMu is held.
func (f *FS) dirPath(ino uint32, below map[uint32]bool) (string, error) {
	if path, ok := f.paths[ino]; ok {
		return path, nil
	}
	if below[ino] || len(below) > maxDepth {
		return "", fmt.Errorf("directory %d: %w", ino, corrupt("it lies in itself or more than %d directories deep", maxDepth))
	}
	below[ino] = true
	dir, err := f.Inode(ino)
	if err != nil {
		return "", err
	}
	parent, err := f.Parent(dir)
	if err != nil {
		return "", err
	}
	above, err := f.dirPath(parent, below)
	if err != nil {
		return "", err
	}
	name, err := f.nameIn(parent, ino)
	if err != nil {
		return "", err
	}
	path := name
	if above != "" {
		path = above + "/" + name
	}
	f.paths[ino] = path
	return path, nil
}

// nameIn returns the name that an inode has in a directory.
func (f *FS) nameIn(dir, ino uint32) (string, error) {
	n, err := f.Inode(dir)
	if err != nil {
		return "", err
	}
	name := ""
	err = f.ReadDir(n, func(e Dirent) error {
		if e.Ino != ino {
			return nil
		}
		name = string(e.Name)
		return errStop
	})
	if err != nil && err != errStop {
		return "", err
	}
	if name == "" {
		return "", notExist("no name of directory %d in its parent %d", ino, dir)
	}
	return name, nil
}
