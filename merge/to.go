package merge

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/cowdev/cowdev/block"
	"github.com/cowdev/cowdev/exception"
	"github.com/cowdev/cowdev/image"
	"github.com/cowdev/cowdev/internal/disk"
)

// A View is a base with its store, and the device that they make.
type View struct {
	Base   *image.Base
	Store  *exception.Store
	Device block.Device
}

// To writes the image that the view shows to a new file at path, which must
// not exist and appears only when it is complete and durable. The view is not
// changed.
func To(ctx context.Context, v View, path string, o Options) error {
	if err := Free(path); err != nil {
		return err
	}
	out, err := newOutput(path)
	if err != nil {
		return err
	}
	defer out.discard()
	if err := v.Base.Guard(out.f.File()); err != nil {
		return err
	}
	if err := fill(ctx, v, out.f, o); err != nil {
		return err
	}
	if err := out.f.Sync(); err != nil {
		return err
	}
	return out.appear(path)
}

// Free returns an error where something is at path already, or where nothing
// can be.
func Free(path string) error {
	if _, err := os.Lstat(path); err == nil {
		return fmt.Errorf("%s: %w, give a name that is free", path, fs.ErrExist)
	}
	if _, err := os.Stat(filepath.Dir(path)); err != nil {
		return fmt.Errorf("%s: %w", path, err.(*fs.PathError).Err)
	}
	return nil
}

// fill makes out what the view shows.
func fill(ctx context.Context, v View, out *disk.OS, o Options) error {
	if !clone(out, v.Base.Disk()) {
		if err := out.Truncate(v.Base.Size()); err != nil {
			return err
		}
		if err := copyBase(ctx, v, out); err != nil {
			return err
		}
	}
	// The store stays in use: what it shared would need room anew to be
	// written over.
	return apply(ctx, out, nil, v.Store, o.Progress)
}

// clone makes out share all blocks of base, or reports false.
func clone(out, base *disk.OS) bool {
	return !base.IsDevice() && unix.IoctlFileClone(int(out.File().Fd()), int(base.File().Fd())) == nil
}

// copyBase copies what the view takes from the base and is no hole.
func copyBase(ctx context.Context, v View, out *disk.OS) error {
	c := copier{from: v.Base, to: out}
	for off, size := int64(0), v.Device.Size(); off < size; {
		extents, err := v.Device.Extents(off, size-off, 1024)
		if err != nil {
			return err
		}
		for _, e := range extents {
			if e.State == block.FromBase && !e.Hole {
				if err := c.copy(ctx, e.Off, e.N); err != nil {
					return fmt.Errorf("copy %s to %s: %w", v.Base.Path(), out.Name(), err)
				}
			}
			off = e.End()
		}
	}
	return nil
}

// A copier copies ranges, within the kernel where that can.
type copier struct {
	from   *image.Base
	to     *disk.OS
	inUser bool // copy_file_range does not do here
	buf    []byte
}

func (c *copier) copy(ctx context.Context, off, n int64) error {
	for n > 0 {
		if err := ctx.Err(); err != nil {
			return err
		}
		k, err := c.some(off, min(n, batchSize))
		if err != nil {
			return err
		}
		off, n = off+k, n-k
	}
	return nil
}

// some copies at least one byte and at most n.
func (c *copier) some(off, n int64) (int64, error) {
	if !c.inUser {
		from, to := off, off
		k, err := unix.CopyFileRange(int(c.from.Disk().File().Fd()), &from, int(c.to.File().Fd()), &to, int(n), 0)
		switch {
		case err == nil && k > 0:
			return int64(k), nil
		case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT), errors.Is(err, unix.EIO):
			return 0, err
		}
		c.inUser, c.buf = true, make([]byte, batchSize)
	}
	p := c.buf[:n]
	if k, err := c.from.ReadAt(p, off); k < len(p) {
		return 0, err
	}
	_, err := c.to.WriteAt(p, off)
	return n, err
}

// An output is a file without its name yet.
type output struct {
	f    *disk.OS
	temp string // the name it has meanwhile, where it cannot be without one
}

// newOutput opens the file. Errors tell of it by path, also while it has no
// name: what the system would tell is its directory.
func newOutput(path string) (*output, error) {
	f, err := disk.CreateNameless(path)
	if err == nil {
		return &output{f: f}, nil
	}
	if !errors.Is(err, errors.ErrUnsupported) {
		return nil, err
	}
	temp := fmt.Sprintf("%s.cowdev-%d", path, os.Getpid())
	if f, err = disk.OpenOS(temp, os.O_RDWR|os.O_CREATE|os.O_EXCL); err != nil {
		return nil, err
	}
	return &output{f: f, temp: temp}, nil
}

// appear gives the file its name, unless that exists by now.
func (o *output) appear(path string) error {
	if o.temp == "" {
		if err := o.f.Publish(); err != nil {
			return err
		}
	} else if err := rename(o.temp, path); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	o.temp = ""
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}

// rename gives the file at from the name to, which must be free.
func rename(from, to string) error {
	err := unix.Renameat2(unix.AT_FDCWD, from, unix.AT_FDCWD, to, unix.RENAME_NOREPLACE)
	if err != unix.EINVAL && err != unix.ENOSYS {
		return err
	}
	// NFS has no such renaming. A link is as safe.
	if err := unix.Link(from, to); err != nil {
		return err
	}
	return unix.Unlink(from)
}

// discard closes the file, which is gone unless it appeared.
func (o *output) discard() {
	if o.temp != "" {
		os.Remove(o.temp)
	}
	o.f.Close()
}
