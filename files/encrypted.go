package files

import (
	"io/fs"

	"github.com/cowdev/cowdev/files/ext4"
)

// Encrypted reports whether f is a file, directory or link whose content, names
// or target cannot be read, since the file system has them encrypted. Its
// attributes can.
func Encrypted(f File) bool {
	x, ok := f.(*extFile)
	return ok && x.Flags&ext4.FlagEncrypted != 0
}

// skipEncrypted notes f where it is encrypted; the error then has a walk go
// past it.
func (c *comparer) skipEncrypted(name string, f File) error {
	if !Encrypted(f) {
		return nil
	}
	c.encrypted = append(c.encrypted, name)
	return fs.SkipDir
}

// anyEncrypted reports whether one of the inodes is encrypted: its names may
// stand where nobody can read them.
func (f extFS) anyEncrypted(inos []uint32) bool {
	for _, ino := range inos {
		if n, err := f.Inode(ino); err == nil && n.Flags&ext4.FlagEncrypted != 0 {
			return true
		}
	}
	return false
}
