package files

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"

	"github.com/diskfs/go-diskfs/filesystem"
	"github.com/diskfs/go-diskfs/filesystem/iso9660"
	"github.com/diskfs/go-diskfs/filesystem/squashfs"

	"github.com/cowdev/cowdev/block"
)

// go-diskfs reads squashfs and ISO 9660 rightly but for what is refused here
// by name: lz4 and lzo in squashfs, and Joliet without Rock Ridge. It panics
// on bytes it does not expect, so every call goes through guard; sizes that
// it would take memory for are checked before. Its FAT was left out (fat.go
// says why), and so was its ext4.

// maxDir bounds a directory's bytes: millions of entries.
const maxDir = 64 << 20

// diskFS is a file system that go-diskfs reads.
type diskFS struct {
	lib  filesystem.FileSystem
	disk *storage
	info Info
}

func (d *diskFS) Info() Info { return d.info }

func (d *diskFS) Root() (File, error) {
	var info fs.FileInfo
	err := d.guard(func() (err error) {
		info, err = d.lib.Stat(".")
		return err
	})
	if err != nil {
		return nil, err
	}
	return &diskFile{fs: d, path: ".", info: info}, nil
}

// guard runs a call into the library; what it panics with and the read errors
// it passed over come back as errors.
func (d *diskFS) guard(call func() error) error { return guard(d.disk, call) }

// meant reports whether err has a meaning of its own. Whatever else the library
// says of bytes that could be read is that they make no sense.
func meant(err error) bool {
	return slices.ContainsFunc([]error{ErrDamaged, ErrUnsupported, fs.ErrNotExist}, func(e error) bool { return errors.Is(err, e) })
}

func guard(disk *storage, call func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%w: %v", ErrDamaged, p)
		}
		failed := cutShort(disk.failed())
		switch {
		case err == nil:
		case failed != nil && !errors.Is(err, failed):
			err = fmt.Errorf("%w (%w)", err, failed)
		case failed == nil && !meant(err):
			err = fmt.Errorf("%w: %w", ErrDamaged, err)
		}
	}()
	return call()
}

// openSquashfs opens a squashfs with a compressor that can be read.
func openSquashfs(r block.Reader, head []byte) (FS, error) {
	if len(head) < 96 {
		return nil, fmt.Errorf("%w: the superblock is cut off", ErrDamaged)
	}
	switch c := binary.LittleEndian.Uint16(head[20:]); c {
	case 3, 5:
		name := map[uint16]string{3: "lzo", 5: "lz4"}[c]
		return nil, fmt.Errorf("%w: squashfs compressed with %s; gzip, xz, lzma and zstd can be read", ErrUnsupported, name)
	}
	d := &diskFS{disk: newStorage(r), info: Info{Type: "squashfs", BlockSize: int(binary.LittleEndian.Uint32(head[12:]))}}
	err := d.guard(func() (err error) {
		d.lib, err = squashfs.Read(d.disk, r.Size(), 0, 0)
		return err
	})
	if err != nil {
		return nil, err
	}
	return d, nil
}

const isoSector = 2048

// openISO opens an ISO 9660 file system.
func openISO(r block.Reader, _ []byte) (FS, error) {
	label, joliet, err := checkISO(r)
	if err != nil {
		return nil, err
	}
	d := &diskFS{disk: newStorage(r), info: Info{Type: "iso9660", BlockSize: isoSector, Label: label}}
	err = d.guard(func() (err error) {
		d.lib, err = iso9660.Read(d.disk, r.Size(), 0, isoSector)
		return err
	})
	if err != nil {
		return nil, err
	}
	if joliet && !d.rockRidge() {
		return nil, fmt.Errorf("%w: ISO 9660 with Joliet names and no Rock Ridge; mount it", ErrUnsupported)
	}
	return d, nil
}

// checkISO reads the volume descriptors, refuses path tables larger than they
// can be, and returns the label and whether there are Joliet names.
func checkISO(r block.Reader) (label string, joliet bool, err error) {
	const maxDescriptors, maxPathTable = 64, 16 << 20
	for i := range int64(maxDescriptors) {
		b := make([]byte, isoSector)
		if _, err := r.ReadAt(b, (16+i)*isoSector); err != nil {
			return "", false, fmt.Errorf("read volume descriptor %d: %w", i, cutShort(err))
		}
		switch b[0] {
		case 255:
			return label, joliet, nil
		case 1:
			label = trimLabel(b[40:72])
		case 2:
			joliet = joliet || string(b[88:90]) == "%/"
		}
		if n := binary.LittleEndian.Uint32(b[132:]); b[0] <= 2 && n > maxPathTable {
			return "", false, fmt.Errorf("%w: path table of %d bytes, expected at most %d", ErrDamaged, n, maxPathTable)
		}
	}
	return "", false, fmt.Errorf("%w: more than %d volume descriptors", ErrDamaged, maxDescriptors)
}

// rockRidge reports whether an entry of the root has Rock Ridge attributes.
func (d *diskFS) rockRidge() bool {
	root, err := d.Root()
	if err != nil {
		return false
	}
	f := root.(*diskFile)
	if f.load() != nil {
		return false
	}
	for _, info := range f.children {
		st, ok := info.Sys().(*iso9660.StatT)
		return ok && st.RockRidge
	}
	return true // empty: the names make no difference
}

// diskFile is a file of a diskFS. Its directory's entries are kept once read,
// because the library looks every path up from the root.
type diskFile struct {
	fs       *diskFS
	path     string
	info     fs.FileInfo
	children []fs.FileInfo // by name
	loaded   bool
	open     filesystem.File // for ReadAt
}

func (f *diskFile) Attr() Attr {
	a := Attr{Mode: f.info.Mode(), Size: f.info.Size(), Links: 1, Modified: f.info.ModTime()}
	switch st := f.info.Sys().(type) {
	case *iso9660.StatT:
		a.ID, a.UID, a.GID, a.Links = uint64(st.Location), st.UID, st.GID, max(st.NLink, 1)
		if !a.Mode.IsDir() && a.Size == 0 {
			a.ID = 0 // empty files share a location
		}
	case *squashfs.StatT:
		a.ID, a.UID, a.GID = uint64(st.Inode), st.UID, st.GID
	}
	if a.Mode&fs.ModeSymlink != 0 {
		target, _ := f.Link()
		a.Size = int64(len(target))
	}
	return a
}

func (f *diskFile) Link() (string, error) {
	switch st := f.info.Sys().(type) {
	case *iso9660.StatT:
		if st.LinkTarget != "" {
			return st.LinkTarget, nil
		}
	case *squashfs.StatT:
		if st.LinkTarget != "" {
			return st.LinkTarget, nil
		}
	}
	return "", kindError("target", f.info.Mode())
}

func (f *diskFile) Xattrs() (map[string][]byte, error) {
	st, ok := f.info.Sys().(*squashfs.StatT)
	if !ok || len(st.Xattrs) == 0 {
		return nil, nil
	}
	attrs := make(map[string][]byte, len(st.Xattrs))
	for name, value := range st.Xattrs {
		attrs[name] = []byte(value)
	}
	return attrs, nil
}

func (f *diskFile) ReadDir() ([]Entry, error) {
	if err := f.load(); err != nil {
		return nil, err
	}
	entries := make([]Entry, len(f.children))
	for i, info := range f.children {
		child := diskFile{fs: f.fs, info: info}
		entries[i] = Entry{Name: info.Name(), ID: child.Attr().ID, Type: info.Mode().Type()}
	}
	return entries, nil
}

func (f *diskFile) Child(name string) (File, error) {
	if err := f.load(); err != nil {
		return nil, err
	}
	i, found := slices.BinarySearchFunc(f.children, name, func(c fs.FileInfo, name string) int { return cmp.Compare(c.Name(), name) })
	if !found {
		return nil, fs.ErrNotExist
	}
	return &diskFile{fs: f.fs, path: path.Join(f.path, name), info: f.children[i]}, nil
}

// load reads a directory once.
func (f *diskFile) load() error {
	switch {
	case f.loaded:
		return nil
	case !f.info.IsDir():
		return kindError("entries", f.info.Mode())
	case f.info.Size() > maxDir:
		return fmt.Errorf("%w: directory of %d bytes, expected at most %d", ErrDamaged, f.info.Size(), maxDir)
	}
	return f.fs.guard(func() error {
		entries, err := f.fs.lib.ReadDir(f.path)
		if err != nil {
			return err
		}
		for _, e := range entries {
			info, err := e.Info()
			if err != nil {
				return err
			}
			if err := checkName(info.Name()); err != nil {
				return err
			}
			f.children = append(f.children, info)
		}
		slices.SortFunc(f.children, func(a, b fs.FileInfo) int { return cmp.Compare(a.Name(), b.Name()) })
		f.loaded = true
		return nil
	})
}

func (f *diskFile) ReadAt(p []byte, off int64) (int, error) {
	if !f.info.Mode().IsRegular() {
		return 0, kindError("content", f.info.Mode())
	}
	n, atEnd := clip(p, off, f.info.Size())
	var err error
	if st, ok := f.info.Sys().(*iso9660.StatT); ok {
		// A file of ISO 9660 is one run of sectors.
		if _, err = f.fs.disk.ReadAt(p[:n], int64(st.Location)*isoSector+off); err != nil {
			f.fs.disk.failed() // it is told here
			err = cutShort(err)
		}
	} else {
		err = f.fs.guard(func() error { return f.readLib(p[:n], off) })
	}
	switch {
	case err != nil:
		return 0, err
	case atEnd:
		return n, io.EOF
	}
	return n, nil
}

// readLib fills p through the library's file, which knows a position only.
func (f *diskFile) readLib(p []byte, off int64) error {
	if len(p) == 0 {
		return nil
	}
	if f.open == nil {
		opener, ok := f.info.(interface {
			Open() (filesystem.File, error)
		})
		if !ok {
			return fmt.Errorf("content: %w", ErrUnsupported)
		}
		open, err := opener.Open()
		if err != nil {
			return err
		}
		f.open = open
	}
	if _, err := f.open.Seek(off, io.SeekStart); err != nil {
		return err
	}
	_, err := io.ReadFull(f.open, p)
	return err
}

// clip returns how many bytes of a read of p at off lie in a file of size
// bytes, and whether it is less than asked for.
func clip(p []byte, off, size int64) (n int, atEnd bool) {
	left := max(size-off, 0)
	if int64(len(p)) > left {
		return int(left), true
	}
	return len(p), false
}
