package image

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/cowdev/cowdev/block"
	"github.com/cowdev/cowdev/internal/disk"
)

// ErrUnusable says that a path cannot be a base: it is empty, or no file.
var ErrUnusable = errors.New("not usable as a base")

// Options change how a base is opened.
type Options struct {
	// Writable opens for merge: exclusively locked, and Disk can be written.
	Writable bool
	// NoExcl leaves out O_EXCL on a block device, which is refused where the
	// device is mounted or a member of an array.
	NoExcl bool
	// NoLock takes no lock: for looking only.
	NoLock bool
}

// A Base is an image that does not change. Its methods may be called by
// several goroutines at once, but for Close.
type Base struct {
	f     *disk.OS
	path  string
	size  int64
	view  *disk.Mapping // nil where the file cannot be mapped
	holes *holes        // nil where they are not told, or may be filled

	begun func() (*Sample, error) // the sample that BeginSample began, until Recognise; or nil
}

var _ block.Reader = (*Base)(nil)

// Open opens the image at path and locks it: shared, or exclusively for
// writing. The error wraps ErrUnusable, disk.ErrKind, disk.ErrLocked or what
// the system said.
func Open(path string, o Options) (*Base, error) {
	f, err := openFile(path, o)
	if err != nil {
		return nil, err
	}
	b := &Base{f: f, path: path}
	if err := b.prepare(o); err != nil {
		f.Close()
		return nil, err
	}
	return b, nil
}

func openFile(path string, o Options) (*disk.OS, error) {
	flags := os.O_RDONLY
	if o.Writable {
		flags = os.O_RDWR
	}
	if info, err := os.Stat(path); err == nil && info.Mode()&os.ModeDevice != 0 && !o.NoExcl && !o.NoLock {
		flags |= unix.O_EXCL
	}
	// Reading a base must not write its times; only its owner may ask that.
	f, err := disk.OpenOS(path, flags|unix.O_NOATIME)
	if errors.Is(err, unix.EPERM) {
		f, err = disk.OpenOS(path, flags)
	}
	if errors.Is(err, unix.EBUSY) {
		return nil, fmt.Errorf("%w (mounted, or part of an array?): %w", err, disk.ErrLocked)
	}
	return f, err
}

func (b *Base) prepare(o Options) error {
	if !o.NoLock {
		if err := b.f.Lock(!o.Writable); err != nil {
			return err
		}
	}
	var err error
	if b.size, err = b.f.Size(); err != nil {
		return err
	}
	if b.size == 0 {
		return fmt.Errorf("%s: empty, expected an image of at least one byte: %w", b.path, ErrUnusable)
	}
	if b.view, err = disk.NewMapping(b.f.File(), b.size); err != nil {
		b.view = nil // reads then go by ReadAt alone
	}
	if !o.Writable {
		b.holes = newHoles(b.f, b.size)
	}
	return nil
}

// Path returns the path that the base was opened by.
func (b *Base) Path() string { return b.path }

// Size returns the image's size in bytes as it was when it was opened.
func (b *Base) Size() int64 { return b.size }

// Disk returns the file below, which stays the base's.
func (b *Base) Disk() *disk.OS { return b.f }

// Guard takes from f, a new file that gets bytes of the base or what is written
// over them, the permissions that the base does not give to others.
func (b *Base) Guard(f *os.File) error {
	base, err := b.f.File().Stat()
	if err != nil {
		return err
	}
	has, err := f.Stat()
	if err != nil {
		return err
	}
	allowed := os.FileMode(0o600)
	if !b.f.IsDevice() {
		allowed |= base.Mode().Perm()
	}
	return f.Chmod(has.Mode().Perm() & allowed)
}

// ReadAt implements block.Reader. What is a hole does not go through the page
// cache.
func (b *Base) ReadAt(p []byte, off int64) (int, error) {
	n := min(int64(len(p)), b.size-off)
	if b.holes.learn(off, n); !b.holes.zero(off, n) {
		return b.readFile(p, off)
	}
	clear(p[:n])
	if n < int64(len(p)) {
		return int(n), io.EOF
	}
	return len(p), nil
}

// readFile is ReadAt of what the file holds at this moment.
func (b *Base) readFile(p []byte, off int64) (int, error) {
	if off >= b.size {
		return 0, io.EOF
	}
	want := p[:min(int64(len(p)), b.size-off)]
	n, err := b.f.ReadAt(want, off)
	if b.view != nil && n > 0 {
		b.view.Prove(off, int64(n))
	}
	switch {
	case n == len(p):
		return n, nil
	case err == io.EOF && n < len(want):
		return n, fmt.Errorf("%s: ends at %d, expected %d bytes: it was cut short since it was opened: %w",
			b.path, off+int64(n), b.size, io.ErrUnexpectedEOF)
	case err == nil:
		err = io.EOF
	}
	return n, err
}

// View appends to vecs the piece of the page cache that holds [off, off+n),
// which lies inside the image, if all of it is known to be in memory. Code of
// ours must not touch the piece: see disk.Mapping.
func (b *Base) View(vecs [][]byte, off, n int64) ([][]byte, bool) {
	if b.holes.zero(off, n) {
		return block.AppendZeros(vecs, n), true
	}
	if b.view == nil {
		return vecs, false
	}
	return b.view.View(vecs, off, n)
}

// Prefetch begins to bring [off, off+n) into memory.
func (b *Base) Prefetch(off, n int64) error {
	if b.holes.learn(off, n); b.holes.zero(off, n) {
		return nil
	}
	return unix.Fadvise(int(b.f.File().Fd()), off, n, unix.FADV_WILLNEED)
}

// Extents returns the runs of data and holes of [off, off+n), which lies
// inside the image, as block.Device.Extents does.
func (b *Base) Extents(off, n int64, limit int) ([]block.Extent, error) {
	var runs []block.Extent
	for end := off + n; off < end && len(runs) < limit; {
		data, err := b.f.NextData(off)
		if err != nil {
			return nil, err
		}
		run := block.Extent{Off: off, N: min(data, end) - off, State: block.FromBase, Hole: true}
		if data == off {
			hole, err := b.f.NextHole(off)
			if err != nil {
				return nil, err
			}
			run.N, run.Hole = min(hole, end)-off, false
		}
		if run.N <= 0 { // the file was cut short
			run.N, run.Hole = end-off, false
		}
		runs = append(runs, run)
		off = run.End()
	}
	return runs, nil
}

// Close gives up the lock and the mapping. No view may be in use.
func (b *Base) Close() error {
	if b.begun != nil {
		b.begun()
	}
	var err error
	if b.view != nil {
		err = b.view.Close()
	}
	if e := b.f.Close(); err == nil {
		err = e
	}
	return err
}
