package ext4

import (
	"fmt"
	"io/fs"
	"strings"
)

// What is kept of directories for Lookup: so many of them, and so many names
// in all and in each.
const (
	dirCacheSize    = 64
	dirCacheEntries = 1 << 20
)

// A dirIndex is the names of a directory; nil for one that has too many.
type dirIndex map[string]entry

type entry struct {
	ino uint32
	typ uint16
}

// Lookup finds a name in a directory and returns its inode's number and type.
// The error wraps fs.ErrNotExist if there is none. The names of directories
// looked into lately are kept.
func (f *FS) Lookup(dir *Inode, name string) (ino uint32, typ uint16, err error) {
	index, ok := f.dirs.Get(dir.Ino)
	if !ok {
		if index, err = f.indexDir(dir); err != nil {
			return 0, 0, err
		}
		f.keep(dir.Ino, index)
	}
	found, ok := index[name]
	if index == nil {
		found, ok, err = f.scanFor(dir, name)
		if err != nil {
			return 0, 0, err
		}
	}
	if !ok {
		return 0, 0, fmt.Errorf("%q in directory %d: %w", name, dir.Ino, fs.ErrNotExist)
	}
	return found.ino, found.typ, nil
}

// keep remembers the names of a directory, and forgets others for it.
func (f *FS) keep(ino uint32, index dirIndex) {
	for f.dirEntries.Load()+int64(len(index)) > dirCacheEntries {
		if _, _, ok := f.dirs.RemoveOldest(); !ok {
			break
		}
	}
	if known, _ := f.dirs.ContainsOrAdd(ino, index); !known {
		f.dirEntries.Add(int64(len(index)))
	}
}

// indexDir reads the names of a directory, or returns nil if there are too
// many to keep.
func (f *FS) indexDir(dir *Inode) (dirIndex, error) {
	index := dirIndex{}
	err := f.readDir(dir, func(e Dirent) error {
		if len(index) == dirCacheEntries {
			return errStop
		}
		if _, ok := index[string(e.Name)]; !ok {
			index[string(e.Name)] = entry{e.Ino, e.Type}
		}
		return nil
	})
	if err == errStop {
		return nil, nil
	}
	return index, err
}

// scanFor looks for a name by reading the directory.
func (f *FS) scanFor(dir *Inode, name string) (found entry, ok bool, err error) {
	err = f.readDir(dir, func(e Dirent) error {
		if string(e.Name) != name {
			return nil
		}
		found, ok = entry{e.Ino, e.Type}, true
		return errStop
	})
	if err == errStop {
		err = nil
	}
	return found, ok, err
}

// Resolve returns the inode at path, from the root on whether or not path
// begins with a slash. Symbolic links on the way are followed, inside the file
// system only: ".." at the root is the root, an absolute target begins at it.
// The last one is followed if follow is set.
func (f *FS) Resolve(path string, follow bool) (*Inode, error) {
	n, err := f.resolve(path, follow)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return n, nil
}

func (f *FS) resolve(path string, follow bool) (*Inode, error) {
	root, err := f.Inode(RootIno)
	if err != nil {
		return nil, err
	}
	at := []*Inode{root} // the way from the root
	links := 0
	rest := strings.Split(path, "/")
	for len(rest) > 0 {
		name := rest[0]
		rest = rest[1:]
		switch here := at[len(at)-1]; {
		case !here.IsDir():
			return nil, ErrNotDir
		case name == "" || name == ".":
		case name == "..":
			at = at[:max(1, len(at)-1)]
		case len(at) > maxDepth:
			return nil, corrupt("more than %d directories deep", maxDepth)
		default:
			n, err := f.child(here, name)
			if err != nil {
				return nil, err
			}
			if !n.IsSymlink() || !follow && len(rest) == 0 {
				at = append(at, n)
				continue
			}
			if links++; links > maxLinks {
				return nil, ErrLoop
			}
			target, err := n.Symlink()
			if err != nil {
				return nil, err
			}
			if strings.HasPrefix(target, "/") {
				at = at[:1]
			}
			rest = append(strings.Split(target, "/"), rest...)
		}
	}
	return at[len(at)-1], nil
}

// child returns the inode that a name of a directory stands for.
func (f *FS) child(dir *Inode, name string) (*Inode, error) {
	ino, _, err := f.Lookup(dir, name)
	if err != nil {
		return nil, err
	}
	return f.Inode(ino)
}
