package files

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"
	"time"
)

// Errors of this package; others come from the image's reader and from the
// readers of file systems.
var (
	// ErrNoFS says that the image holds no file system that can be read.
	ErrNoFS = errors.New("no readable file system")
	// ErrDamaged says that a file system contradicts itself.
	ErrDamaged = errors.New("damaged file system")
	// ErrUnsupported says that a file system has no such thing, or that the
	// thing cannot be read.
	ErrUnsupported = errors.New("not supported")
)

// Info describes a file system.
type Info struct {
	Type      string `json:"type"` // "ext4", "vfat", "iso9660", "squashfs"
	Label     string `json:"label,omitempty"`
	UUID      string `json:"uuid,omitempty"`
	BlockSize int    `json:"block-size,omitempty"` // bytes; 0 where it has none
	Replayed  bool   `json:"replayed,omitempty"`   // the journal was replayed, in memory
}

// An FS is a file system in an image. It may be used by one goroutine at a
// time.
type FS interface {
	Info() Info
	Root() (File, error)
}

// A File is a file of any kind, as it is in the image: reading a symbolic
// link gives the link. A method that does not fit the kind returns an error.
type File interface {
	Attr() Attr

	// ReadAt reads a regular file; holes read as zeros.
	io.ReaderAt

	// Link returns the target of a symbolic link.
	Link() (string, error)

	// Xattrs returns the extended attributes by their full name
	// ("user.mime_type"), nil where there are none.
	Xattrs() (map[string][]byte, error)

	// ReadDir returns a directory's entries, in the order of their names as
	// bytes, without "." and "..".
	ReadDir() ([]Entry, error)

	// Child opens the entry of that name. The error of an absent one is
	// fs.ErrNotExist.
	Child(name string) (File, error)
}

// An Entry is a name in a directory.
type Entry struct {
	Name string
	ID   uint64      // of the file, as Attr.ID
	Type fs.FileMode // the type bits alone
}

// Attr is what stat tells of a file.
type Attr struct {
	// ID is the same for two names of one file: the inode number where there
	// are inodes. 0 says that nothing of the kind is known.
	ID uint64
	// Generation tells two files apart that had one inode number in turn.
	Generation uint32

	Mode         fs.FileMode
	UID, GID     uint32
	Links        uint32
	Size         int64  // bytes; of a link the length of its target
	Major, Minor uint32 // of a device

	Modified, Changed, Accessed, Born time.Time // zero where unknown
}

// cutShort returns the error of a read from an image, where the image's end is
// damage: passed on it would be taken for the end of a file.
func cutShort(err error) error {
	if errors.Is(err, io.EOF) {
		return fmt.Errorf("%w: it goes on behind the image's end", ErrDamaged)
	}
	return err
}

// checkName returns an error for a name that no file can have: it would lead
// out of the directory it stands in.
func checkName(name string) error {
	if name == "" || name == "." || name == ".." || strings.ContainsAny(name, "/\x00") {
		return fmt.Errorf("%w: a directory holds the name %q, which no file can have", ErrDamaged, name)
	}
	return nil
}

// kindError is the error of a method that does not fit the kind of file.
func kindError(what string, mode fs.FileMode) error {
	return fmt.Errorf("%s of a %s: %w", what, TypeName(mode), ErrUnsupported)
}

// TypeName returns what a file of this mode is called in messages.
func TypeName(mode fs.FileMode) string {
	switch {
	case mode.IsRegular():
		return "regular file"
	case mode.IsDir():
		return "directory"
	case mode&fs.ModeSymlink != 0:
		return "symbolic link"
	case mode&fs.ModeCharDevice != 0:
		return "character device"
	case mode&fs.ModeDevice != 0:
		return "block device"
	case mode&fs.ModeNamedPipe != 0:
		return "fifo"
	case mode&fs.ModeSocket != 0:
		return "socket"
	}
	return "file of unknown type"
}

// UnixMode returns the mode as the kernel's st_mode holds it.
func UnixMode(mode fs.FileMode) uint32 {
	m := uint32(mode.Perm())
	for _, bit := range modeBits {
		if mode&bit.mask == bit.mode {
			m |= bit.unix
		}
	}
	return m
}

// ModeOf returns the mode that st_mode m says.
func ModeOf(m uint32) fs.FileMode {
	mode := fs.FileMode(m & 0o777)
	for _, bit := range modeBits {
		unixMask := uint32(0o170000)
		if bit.unix&0o7000 != 0 {
			unixMask = bit.unix
		}
		if m&unixMask == bit.unix {
			mode |= bit.mode
		}
	}
	return mode
}

// modeBits pairs Go's bits with the kernel's. A bit is set where the mode
// under mask equals mode.
var modeBits = []struct {
	mode, mask fs.FileMode
	unix       uint32
}{
	{fs.ModeSetuid, fs.ModeSetuid, 0o4000},
	{fs.ModeSetgid, fs.ModeSetgid, 0o2000},
	{fs.ModeSticky, fs.ModeSticky, 0o1000},
	{fs.ModeNamedPipe, fs.ModeType, 0o010000},
	{fs.ModeDevice | fs.ModeCharDevice, fs.ModeType, 0o020000},
	{fs.ModeDir, fs.ModeType, 0o040000},
	{fs.ModeDevice, fs.ModeType, 0o060000},
	{0, fs.ModeType, 0o100000},
	{fs.ModeSymlink, fs.ModeType, 0o120000},
	{fs.ModeSocket, fs.ModeType, 0o140000},
}
