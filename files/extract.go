package files

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/cowdev/cowdev/files/ext4"
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

	// Keep are files that are in the way with Replace too: those that the image
	// is read from.
	Keep []fs.FileInfo

	// Encrypted is told the path of what is encrypted, and is passed over with
	// all below it. Where it is nil that is an error.
	Encrypted func(name string)
}

// Extract copies f, with all below it when it is a directory, to name in root.
// Zeros become holes. A directory that exists is filled; a file that exists is
// fs.ErrExist without Replace. With it a device or fifo that is there already
// is left as it is. Nothing is written outside root, whatever links there are.
// The end of ctx is an error; no file is left in part after one. It returns the
// paths, from f, of files that were passed over: sockets, and without Archive
// devices.
func Extract(ctx context.Context, f File, root *os.Root, name string, o ExtractOptions) (skipped []string, err error) {
	x := &extractor{ctx: ctx, root: root, o: o, made: map[uint64]string{}}
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
	ctx  context.Context
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
	if err := x.ctx.Err(); err != nil {
		return err
	}
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
	if slices.ContainsFunc(x.o.Keep, func(keep fs.FileInfo) bool { return os.SameFile(info, keep) }) {
		return false, fmt.Errorf("the image itself is there: %w", unix.EEXIST)
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
	defer func() {
		if err = errors.Join(err, out.Close()); err != nil {
			x.root.Remove(name)
		}
	}()
	size := f.Attr().Size
	if err := out.Truncate(size); err != nil {
		return err
	}
	return eachData(f, size, func(p []byte, off int64) error {
		if err := x.ctx.Err(); err != nil {
			return err
		}
		_, err := out.WriteAt(p, off)
		return err
	})
}

// special makes a device or a fifo.
func (x *extractor) special(name string, a Attr) error {
	return x.at(name, func(dir int, base string) error {
		return unix.Mknodat(dir, base, UnixMode(a.Mode)&^0o7777|0o600, int(unix.Mkdev(a.Major, a.Minor)))
	})
}

// at calls do with the directory of name, for what a root cannot do itself. do
// must not follow base where it is a link.
func (x *extractor) at(name string, do func(dir int, base string) error) error {
	dir, err := x.root.Open(path.Dir(name))
	if err != nil {
		return err
	}
	defer dir.Close()
	return do(int(dir.Fd()), path.Base(name))
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
	if !link { // whose permissions mean nothing
		if err := x.root.Chmod(name, mode); err != nil {
			return err
		}
	}
	if !x.o.Archive || a.Modified.IsZero() {
		return nil
	}
	// Package os counts in nanoseconds, which end in 2262.
	times := []unix.Timespec{{Nsec: unix.UTIME_OMIT}, {Sec: a.Modified.Unix(), Nsec: int64(a.Modified.Nanosecond())}}
	return x.at(name, func(dir int, base string) error {
		return unix.UtimesNanoAt(dir, base, times, unix.AT_SYMLINK_NOFOLLOW)
	})
}

// xattrs sets the extended attributes of a file.
func (x *extractor) xattrs(name string, f File) error {
	attrs, err := f.Xattrs()
	if err != nil || len(attrs) == 0 {
		return err
	}
	mode := f.Attr().Mode
	if !mode.IsRegular() && !mode.IsDir() { // which is not to be opened
		return x.at(name, func(dir int, base string) error {
			path := fmt.Sprintf("/proc/self/fd/%d/%s", dir, base)
			return setXattrs(attrs, func(key string, value []byte) error {
				if strings.HasPrefix(key, "user.") {
					return nil // for files and directories only
				}
				return unix.Lsetxattr(path, key, value, 0)
			})
		})
	}
	out, err := x.root.Open(name)
	if err != nil {
		return err
	}
	defer out.Close()
	return setXattrs(attrs, func(key string, value []byte) error {
		return unix.Fsetxattr(int(out.Fd()), key, value, 0)
	})
}

func setXattrs(attrs map[string][]byte, set func(key string, value []byte) error) error {
	for key, value := range attrs {
		if err := set(key, value); err != nil {
			return fmt.Errorf("set attribute %s: %w", strings.ToValidUTF8(key, "?"), err)
		}
	}
	return nil
}

// A fileRange is a run of a file's bytes.
type fileRange struct{ off, end int64 }

// written returns the parts of a file of size bytes that may hold something but
// zeros: all of it where its file system does not tell.
func written(f File, size int64) ([]fileRange, error) {
	x, ok := f.(*extFile)
	if !ok || x.Flags&(ext4.FlagInlineData|ext4.FlagEncrypted) != 0 {
		return []fileRange{{0, size}}, nil
	}
	extents, err := x.Extents()
	if err != nil {
		return nil, err
	}
	var out []fileRange
	for _, e := range extents {
		if !e.Unwritten && e.Off < size {
			out = append(out, fileRange{e.Off, min(e.Off+e.N, size)})
		}
	}
	return out, nil
}

// eachData calls data for the pieces of a file that hold something but zeros.
func eachData(f File, size int64, data func(p []byte, off int64) error) error {
	ranges, err := written(f, size)
	if err != nil {
		return err
	}
	const piece, unit = 1 << 20, 4096
	buf := make([]byte, min(piece, size))
	for _, r := range ranges {
		for off := r.off; off < r.end; {
			p := buf[:min(piece, r.end-off)]
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
	}
	return nil
}
