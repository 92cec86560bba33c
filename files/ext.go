package files

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"

	"github.com/cowdev/cowdev/block"
	"github.com/cowdev/cowdev/files/ext4"
)

// extFS is an ext2, ext3 or ext4 file system.
type extFS struct{ *ext4.FS }

func openExt(r block.Reader, _ []byte) (FS, error) {
	f, err := ext4.Open(r)
	if err != nil {
		return nil, err
	}
	return extFS{f}, nil
}

func (f extFS) Info() Info {
	i := f.FS.Info()
	return Info{Type: i.Type, Label: i.Label, UUID: formatUUID(i.UUID), BlockSize: i.BlockSize, Replayed: i.Recovery.Needed}
}

func formatUUID(u [16]byte) string {
	return fmt.Sprintf("%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:])
}

func (f extFS) Root() (File, error) { return f.file(ext4.RootIno) }

// file opens the inode of that number.
func (f extFS) file(ino uint32) (*extFile, error) {
	n, err := f.Inode(ino)
	if errors.Is(err, fs.ErrNotExist) {
		// The name is there: a lookup must not report it as absent.
		return nil, fmt.Errorf("%w: %v", ErrDamaged, err)
	}
	if err != nil {
		return nil, err
	}
	return &extFile{fs: f, Inode: n}, nil
}

// extFile is a file of an extFS; it reads at any offset as its inode does.
type extFile struct {
	*ext4.Inode
	fs       extFS
	children map[string]uint32 // of a directory that was read
}

func (f *extFile) Attr() Attr {
	return Attr{
		ID: uint64(f.Ino), Generation: f.Generation,
		Mode: f.FileMode(), UID: f.UID, GID: f.GID, Links: f.Inode.Links, Size: f.Size,
		Major: f.Major, Minor: f.Minor,
		Modified: f.Mtime, Changed: f.Ctime, Accessed: f.Atime, Born: f.Crtime,
	}
}

func (f *extFile) ReadAt(p []byte, off int64) (int, error) {
	if !f.IsRegular() {
		return 0, kindError("content", f.FileMode())
	}
	return f.Inode.ReadAt(p, off)
}

func (f *extFile) Link() (string, error) {
	if !f.IsSymlink() {
		return "", kindError("target", f.FileMode())
	}
	return f.Symlink()
}

func (f *extFile) Xattrs() (map[string][]byte, error) {
	list, err := f.Inode.Xattrs()
	if err != nil || len(list) == 0 {
		return nil, err
	}
	attrs := make(map[string][]byte, len(list))
	for _, x := range list {
		attrs[x.Name] = x.Value
	}
	return attrs, nil
}

func (f *extFile) ReadDir() ([]Entry, error) {
	if !f.IsDir() {
		return nil, kindError("entries", f.FileMode())
	}
	var entries []Entry
	children := map[string]uint32{}
	err := f.fs.ReadDir(f.Inode, func(e ext4.Dirent) error {
		name := string(e.Name)
		if name == "." || name == ".." {
			return nil
		}
		if err := checkName(name); err != nil {
			return err
		}
		entries = append(entries, Entry{Name: name, ID: uint64(e.Ino), Type: ModeOf(uint32(e.Type)).Type()})
		children[name] = e.Ino
		return nil
	})
	if err != nil {
		return nil, err
	}
	f.children = children
	slices.SortFunc(entries, func(a, b Entry) int { return cmp.Compare(a.Name, b.Name) })
	return entries, nil
}

func (f *extFile) Child(name string) (File, error) {
	if !f.IsDir() {
		return nil, kindError("entries", f.FileMode())
	}
	if ino, ok := f.children[name]; ok {
		return f.fs.file(ino)
	}
	ino, _, err := f.fs.Lookup(f.Inode, name)
	if err != nil {
		return nil, err
	}
	return f.fs.file(ino)
}

// extPair returns two file systems as ext ones, if they are both, with blocks
// of one size.
func extPair(a, b FS) (old, new extFS, ok bool) {
	old, okA := a.(extFS)
	new, okB := b.(extFS)
	ok = okA && okB && old.Info().BlockSize == new.Info().BlockSize
	return old, new, ok
}

// paths returns the paths of inodes, in order; none of one that has no name.
func (f extFS) paths(inos []uint32) (map[uint32][]string, error) {
	names, err := f.Names(inos, nil)
	if err != nil {
		return nil, err
	}
	out := map[uint32][]string{}
	for _, ino := range inos {
		if ino == ext4.RootIno {
			out[ino] = []string{"/"}
		}
		for _, n := range names[ino] {
			dir, err := f.DirPath(n.Dir)
			if err != nil {
				return nil, err
			}
			out[ino] = append(out[ino], path.Join("/", dir, n.Name))
		}
		slices.SortFunc(out[ino], comparePaths)
	}
	return out, nil
}

// has reports whether the file of that identity is there.
func (f extFS) has(id identity) bool {
	n, err := f.file(uint32(id.id))
	return err == nil && n.Inode.Links > 0 && identityOf(n) == id
}
