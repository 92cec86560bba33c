package attach

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/cowdev/cowdev/block"
)

// fuseFileName is the one file of a FuseFile's filesystem.
const fuseFileName = "disk"

// maxFuseWrite is the most that one request carries. With its header it fits a
// pipe of 1 MiB, which the library moves replies through.
const maxFuseWrite = 512 << 10

// A FuseFile is a FUSE filesystem with one file, whose bytes are a device's.
type FuseFile struct {
	dir    string
	server *fuse.Server
}

// MountFuse mounts a filesystem at dir in which the file "disk" is dev. It
// calls mount(2), so it needs CAP_SYS_ADMIN and no helper program.
func MountFuse(dev block.Device, dir string) (*FuseFile, error) {
	day := 24 * time.Hour
	root := &fs.Inode{}
	server, err := fs.Mount(dir, root, &fs.Options{
		MountOptions: fuse.MountOptions{
			FsName: "cowdev", Name: "cowdev", DirectMountStrict: true,
			MaxWrite: maxFuseWrite, MaxBackground: 64, DisableXAttrs: true,
		},
		AttrTimeout: &day, EntryTimeout: &day,
		OnAdd: func(ctx context.Context) {
			file := root.NewPersistentInode(ctx, &fuseNode{dev: dev}, fs.StableAttr{Mode: syscall.S_IFREG})
			root.AddChild(fuseFileName, file, false)
		},
	})
	if err != nil {
		return nil, fmt.Errorf("mount a FUSE filesystem at %s: %w", dir, err)
	}
	keepFuse()
	return &FuseFile{dir: dir, server: server}, nil
}

// fuseDevice is what /dev/fuse is.
var fuseDevice = unix.Mkdev(10, 229)

// keepFuse keeps the connections of this process's FUSE filesystems from the
// programs that it starts, which the library does not do for what it mounts
// itself. A connection ends with the last who has it: where that is a program
// that waits for the device, and this process is killed, both wait for ever.
func keepFuse() {
	names, _ := os.ReadDir("/proc/self/fd")
	for _, name := range names {
		var st unix.Stat_t
		fd, err := strconv.Atoi(name.Name())
		if err == nil && unix.Fstat(fd, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFCHR && uint64(st.Rdev) == fuseDevice {
			unix.CloseOnExec(fd)
		}
	}
}

// Path returns the name of the file.
func (f *FuseFile) Path() string { return FusePath(f.dir) }

// FusePath returns the name of the file of a FuseFile at dir.
func FusePath(dir string) string { return filepath.Join(dir, fuseFileName) }

// Close unmounts the filesystem; it fails while the file is in use.
func (f *FuseFile) Close() error {
	if err := f.server.Unmount(); err != nil {
		return fmt.Errorf("unmount %s: %w", f.dir, err)
	}
	f.server.Wait()
	return nil
}

// A fuseNode is the file. Its methods may run at once, as the device's may.
type fuseNode struct {
	fs.Inode
	dev block.Device
}

var (
	_ fs.NodeOpener    = (*fuseNode)(nil)
	_ fs.NodeGetattrer = (*fuseNode)(nil)
	_ fs.NodeSetattrer = (*fuseNode)(nil)
	_ fs.NodeReader    = (*fuseNode)(nil)
	_ fs.NodeWriter    = (*fuseNode)(nil)
	_ fs.NodeFsyncer   = (*fuseNode)(nil)
	_ fs.NodeAllocater = (*fuseNode)(nil)
	_ fs.NodeLseeker   = (*fuseNode)(nil)
)

// Open asks for requests as they come, not by way of the page cache.
func (n *fuseNode) Open(_ context.Context, flags uint32) (fs.FileHandle, uint32, syscall.Errno) {
	if n.dev.ReadOnly() && flags&syscall.O_ACCMODE != syscall.O_RDONLY {
		return nil, 0, syscall.EROFS
	}
	return nil, fuse.FOPEN_DIRECT_IO, 0
}

func (n *fuseNode) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	n.attr(&out.Attr)
	return 0
}

func (n *fuseNode) attr(a *fuse.Attr) {
	a.Mode = syscall.S_IFREG | 0o600
	if n.dev.ReadOnly() {
		a.Mode = syscall.S_IFREG | 0o400
	}
	a.Size = uint64(n.dev.Size())
	a.Blocks = (a.Size + 511) / 512
	a.Blksize = 4096
	a.Nlink = 1
}

// Setattr accepts times, which nobody asks for again, and no other size.
func (n *fuseNode) Setattr(_ context.Context, _ fs.FileHandle, in *fuse.SetAttrIn, out *fuse.AttrOut) syscall.Errno {
	if size, ok := in.GetSize(); ok && size != uint64(n.dev.Size()) {
		return syscall.EPERM
	}
	n.attr(&out.Attr)
	return 0
}

func (n *fuseNode) Read(_ context.Context, _ fs.FileHandle, dest []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	dest = dest[:n.inside(off, int64(len(dest)))]
	if _, err := n.dev.ReadAt(dest, off); err != nil && !errors.Is(err, io.EOF) {
		return nil, errnoOf(err)
	}
	return fuse.ReadResultData(dest), 0
}

func (n *fuseNode) Write(_ context.Context, _ fs.FileHandle, data []byte, off int64) (uint32, syscall.Errno) {
	if n.inside(off, int64(len(data))) != int64(len(data)) {
		return 0, syscall.ENOSPC
	}
	if _, err := n.dev.WriteAt(data, off); err != nil {
		return 0, errnoOf(err)
	}
	return uint32(len(data)), 0
}

// Fsync is what a flush of the loop device becomes.
func (n *fuseNode) Fsync(context.Context, fs.FileHandle, uint32) syscall.Errno {
	return errnoOf(n.dev.Flush())
}

// Allocate is what a discard or a zeroing of the loop device becomes.
func (n *fuseNode) Allocate(_ context.Context, _ fs.FileHandle, off, size uint64, mode uint32) syscall.Errno {
	if off > uint64(n.dev.Size()) || size > uint64(n.dev.Size())-off {
		return syscall.ENOSPC
	}
	switch {
	case mode&unix.FALLOC_FL_PUNCH_HOLE != 0:
		return errnoOf(n.dev.Trim(int64(off), int64(size)))
	case mode&unix.FALLOC_FL_ZERO_RANGE != 0:
		return errnoOf(n.dev.WriteZeroes(int64(off), int64(size), 0))
	}
	return syscall.EOPNOTSUPP
}

// Lseek calls everything data: who reads is a block device.
func (n *fuseNode) Lseek(_ context.Context, _ fs.FileHandle, off uint64, whence uint32) (uint64, syscall.Errno) {
	switch size := uint64(n.dev.Size()); {
	case off >= size:
		return 0, syscall.ENXIO
	case whence == unix.SEEK_HOLE:
		return size, 0
	}
	return off, 0
}

// inside returns how many of n bytes from off on the device has.
func (n *fuseNode) inside(off, want int64) int64 {
	return max(0, min(want, n.dev.Size()-off))
}

// errnoOf returns the number that tells of a device's error.
func errnoOf(err error) syscall.Errno {
	if err == nil {
		return 0
	}
	var errno syscall.Errno
	if errors.As(err, &errno) {
		return errno
	}
	return syscall.EIO
}
