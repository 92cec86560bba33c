package files

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// ExtractOptions says how files are taken out of an image.
type ExtractOptions struct {
	// Archive keeps owners, times, extended attributes and hard links, and
	// makes devices; it mostly needs root. Without it permissions are kept,
	// set-id bits are not.
	Archive bool

	// Replace puts new files in the place of regular files and symbolic
	// links that exist. Whatever else exists is in the way: a device in the
	// destination may be one that the machine runs on.
	Replace bool

	// Encrypted is told the path of what is encrypted, and is passed over with
	// all below it. Where it is nil that is an error.
	Encrypted func(name string)
}

// Extract copies f, with all below it when it is a directory, to name in root.
// Zeros become holes. A directory that exists is filled; a file that exists is
// fs.ErrExist without Replace. With it a device or fifo that is there already
// is left as it is. Nothing is written outside root, whatever links there are.
// It returns the paths, from f, of files that were passed over: sockets, and
// without Archive devices.
func Extract(f File, root *os.Root, name string, o ExtractOptions) (skipped []string, err error) {
	x := &extractor{root: root, o: o, made: map[uint64]string{}}
	err = Walk(name, f, x.one)
	// Directories get their attributes last, deepest first: before, they may
	// not be writable, and their times would change.
	for i := len(x.dirs) - 1; i >= 0 && err == nil; i-- {
		if err = x.attributes(x.dirs[i].name, x.dirs[i].f); err != nil {
			err = x.fail(x.dirs[i].name, err)
		}
	}
	return x.skipped, err
}

type extractor struct {
	root *os.Root
	o    ExtractOptions
	made map[uint64]string // first names of files with several
	dirs []extracted

	skipped []string
}

type extracted struct {
	name string
	f    File
}

// one extracts one file.
func (x *extractor) one(name string, f File) error {
	if x.o.Encrypted != nil && Encrypted(f) {
		x.o.Encrypted(name)
		return fs.SkipDir
	}
	if err := x.create(name, f); err != nil {
		return x.fail(name, err)
	}
	return nil
}

// fail tells of err at name. A root's own errors name the file again, and
// without the root; those of the image stay whole.
func (x *extractor) fail(name string, err error) error {
	switch e := err.(type) {
	case *fs.PathError:
		err = e.Err
	case *os.LinkError:
		err = e.Err
	}
	return fmt.Errorf("copy to %s: %w", Quote(filepath.Join(x.root.Name(), name)), err)
}

func (x *extractor) create(name string, f File) error {
	a := f.Attr()
	if a.Mode.IsDir() {
		err := x.root.Mkdir(name, 0o700)
		if errors.Is(err, fs.ErrExist) {
			info, statErr := x.root.Lstat(name)
			if statErr == nil && info.IsDir() {
				err = nil
			}
		}
		x.dirs = append(x.dirs, extracted{name, f})
		return err
	}
	if !x.takes(a.Mode) {
		x.skipped = append(x.skipped, name)
		return nil
	}
	if x.o.Replace {
		if kept, err := x.clear(name, a); kept || err != nil {
			return err
		}
	}
	if first := x.made[a.ID]; x.o.Archive && first != "" && a.Links > 1 {
		return x.root.Link(first, name)
	}
	if err := x.leaf(name, f); err != nil {
		return err
	}
	if a.ID != 0 {
		x.made[a.ID] = name
	}
	return x.attributes(name, f)
}

// takes reports whether a file that is no directory is copied.
func (x *extractor) takes(mode fs.FileMode) bool {
	switch typ := mode.Type(); {
	case typ == 0 || typ == fs.ModeSymlink:
		return true
	default:
		return x.o.Archive && typ&(fs.ModeDevice|fs.ModeNamedPipe) != 0
	}
}

// clear makes room for a file at name. It is kept where it is the device or
// fifo that would be made.
func (x *extractor) clear(name string, a Attr) (kept bool, err error) {
	info, err := x.root.Lstat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	typ := info.Mode().Type()
	if typ == 0 || typ == fs.ModeSymlink {
		return false, x.root.Remove(name)
	}
	// Two fifos have the number 0 both.
	st, ok := info.Sys().(*syscall.Stat_t)
	if ok && typ != fs.ModeDir && typ == a.Mode.Type() && st.Rdev == unix.Mkdev(a.Major, a.Minor) {
		return true, nil
	}
	return false, fmt.Errorf("a %s is there, only files and symbolic links are replaced: %w", TypeName(info.Mode()), unix.EEXIST)
}

// leaf makes what takes accepts.
func (x *extractor) leaf(name string, f File) error {
	a := f.Attr()
	switch a.Mode.Type() {
	case 0:
		return x.regular(name, f)
	case fs.ModeSymlink:
		target, err := f.Link()
		if err != nil {
			return err
		}
		return x.root.Symlink(target, name)
	default:
		return x.special(name, a)
	}
}

// regular copies content.
func (x *extractor) regular(name string, f File) (err error) {
	out, err := x.root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	size := f.Attr().Size
	if err := out.Truncate(size); err != nil {
		return err
	}
	return eachData(f, size, func(p []byte, off int64) error {
		_, err := out.WriteAt(p, off)
		return err
	})
}

// special makes a device or a fifo.
func (x *extractor) special(name string, a Attr) error {
	dir, err := x.root.Open(path.Dir(name))
	if err != nil {
		return err
	}
	defer dir.Close()
	return unix.Mknodat(int(dir.Fd()), path.Base(name), UnixMode(a.Mode)&^0o7777|0o600, int(unix.Mkdev(a.Major, a.Minor)))
}

// attributes gives a file its attributes.
func (x *extractor) attributes(name string, f File) error {
	a := f.Attr()
	link := a.Mode&fs.ModeSymlink != 0
	mode := a.Mode
	if x.o.Archive {
		// The owner first: changing it takes set-id bits away.
		if err := x.root.Lchown(name, int(a.UID), int(a.GID)); err != nil {
			return err
		}
		if err := x.xattrs(name, f); err != nil {
			return err
		}
	} else {
		mode &^= fs.ModeSetuid | fs.ModeSetgid
	}
	if link {
		return nil // its permissions mean nothing, its times cannot be set in a root
	}
	if err := x.root.Chmod(name, mode); err != nil {
		return err
	}
	if x.o.Archive && !a.Modified.IsZero() {
		return x.root.Chtimes(name, time.Time{}, a.Modified)
	}
	return nil
}

// xattrs sets the extended attributes of a file or a directory.
func (x *extractor) xattrs(name string, f File) error {
	mode := f.Attr().Mode
	attrs, err := f.Xattrs()
	if err != nil || len(attrs) == 0 || !mode.IsRegular() && !mode.IsDir() {
		return err
	}
	out, err := x.root.Open(name)
	if err != nil {
		return err
	}
	defer out.Close()
	for key, value := range attrs {
		if err := unix.Fsetxattr(int(out.Fd()), key, value, 0); err != nil {
			return fmt.Errorf("set attribute %s: %w", strings.ToValidUTF8(key, "?"), err)
		}
	}
	return nil
}

// eachData calls data for the pieces of a file that hold something but zeros.
func eachData(f io.ReaderAt, size int64, data func(p []byte, off int64) error) error {
	const piece, unit = 1 << 20, 4096
	buf := make([]byte, min(piece, size))
	for off := int64(0); off < size; {
		p := buf[:min(piece, size-off)]
		if err := readFull(f, p, off); err != nil {
			return err
		}
		for len(p) > 0 {
			n, zero := 0, isZero(p[:min(unit, len(p))])
			for n < len(p) && isZero(p[n:min(n+unit, len(p))]) == zero {
				n = min(n+unit, len(p))
			}
			if !zero {
				if err := data(p[:n], off); err != nil {
					return err
				}
			}
			p, off = p[n:], off+int64(n)
		}
	}
	return nil
}
