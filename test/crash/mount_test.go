package crash

// Files of package disktest under names of the real filesystem, so that the
// real program works on them and every operation of it is seen. A mount is a
// FUSE filesystem of one directory.

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/cowdev/cowdev/internal/disktest"
)

// A mount is a directory in which files of package disktest can be seen.
type mount struct {
	dir   string
	root  *fs.Inode
	files int

	dsync sync.Map // by thread: whether the write that it is in has RWF_DSYNC
}

// newMount mounts a new directory until the test ends. It skips the test where
// FUSE cannot be had.
func newMount(t *testing.T) *mount {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting a FUSE filesystem: needs root")
	}
	dev, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		t.Skipf("mounting a FUSE filesystem: %v", err)
	}
	dev.Close()
	dir := filepath.Join(t.TempDir(), "m")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	root, second := &fs.Inode{}, time.Second
	m := &mount{dir: dir, root: root}
	options := &fs.Options{EntryTimeout: &second, AttrTimeout: &second}
	raw := &flags{fs.NewNodeFS(root, options), &m.dsync}
	server, err := fuse.NewServer(raw, dir, &fuse.MountOptions{DirectMountStrict: true, FsName: "disktest", Name: "disktest", MaxWrite: 1 << 20})
	if err != nil {
		t.Skipf("mounting a FUSE filesystem: %v", err)
	}
	go server.Serve()
	if err := server.WaitMount(); err != nil {
		t.Fatalf("mount of %s: %v", dir, err)
	}
	t.Cleanup(func() {
		// What still holds the mount, after a failure, must not hold us.
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
		done := make(chan struct{})
		go func() { server.Wait(); close(done) }()
		select {
		case <-done:
		case <-time.After(time.Minute):
			t.Errorf("the FUSE server of %s did not end within a minute", dir)
		}
	})
	return m
}

// show makes f seen, and returns the path. The name is a new one, so that the
// kernel has cached nothing of it.
func (m *mount) show(f *disktest.File) string { return m.showAs(f, 0) }

// showAs is show, with an inode number by which the file is known again; 0 for
// one of its own.
func (m *mount) showAs(f *disktest.File, inode uint64) string {
	m.files++
	name := fmt.Sprintf("%d.img", m.files)
	ctx := context.Background()
	n := &node{file: f, mtime: time.Now(), dsync: &m.dsync}
	m.root.AddChild(name, m.root.NewPersistentInode(ctx, n, fs.StableAttr{Mode: syscall.S_IFREG, Ino: inode, Gen: uint64(m.files)}), true)
	return filepath.Join(m.dir, name)
}

// flags passes on what the filesystem above the nodes is not told: that a write
// has RWF_DSYNC.
type flags struct {
	fuse.RawFileSystem
	dsync *sync.Map
}

func (f *flags) Writev(cancel <-chan struct{}, in *fuse.WriteIn, p [][]byte) (uint32, fuse.Status) {
	f.dsync.Store(in.Pid, in.Flags&unix.O_DSYNC != 0)
	return f.RawFileSystem.Writev(cancel, in, p)
}

// node is one file.
type node struct {
	fs.Inode
	file  *disktest.File
	dsync *sync.Map

	mu    sync.Mutex
	mtime time.Time
}

var (
	_ fs.NodeOpener    = (*node)(nil)
	_ fs.NodeReader    = (*node)(nil)
	_ fs.NodeWriter    = (*node)(nil)
	_ fs.NodeFsyncer   = (*node)(nil)
	_ fs.NodeAllocater = (*node)(nil)
	_ fs.NodeGetattrer = (*node)(nil)
	_ fs.NodeSetattrer = (*node)(nil)
	_ fs.NodeLseeker   = (*node)(nil)
	_ fs.NodeStatfser  = (*node)(nil)
)

// Open keeps the file's bytes out of the page cache: the file has one of its
// own, which outlives the process and is lost with the power.
func (n *node) Open(context.Context, uint32) (fs.FileHandle, uint32, syscall.Errno) {
	return nil, fuse.FOPEN_DIRECT_IO, 0
}

func (n *node) Read(_ context.Context, _ fs.FileHandle, p []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	got, err := n.file.ReadAt(p, off)
	if errors.Is(err, syscall.EINTR) && got > 0 {
		err = nil // a signal in the middle of it: a short read
	}
	if err != nil && err != io.EOF {
		return nil, errno(err)
	}
	return fuse.ReadResultData(p[:got]), 0
}

func (n *node) Write(ctx context.Context, _ fs.FileHandle, p []byte, off int64) (uint32, syscall.Errno) {
	n.mu.Lock()
	n.mtime = time.Now()
	n.mu.Unlock()
	if durable, _ := n.dsync.Load(thread(ctx)); durable == true {
		if err := n.file.WriteSync(p, off); err != nil {
			return 0, errno(err)
		}
		return uint32(len(p)), 0
	}
	done, err := n.file.WriteAt(p, off)
	if err != nil && done == 0 {
		return 0, errno(err)
	}
	return uint32(done), 0
}

func (n *node) Fsync(context.Context, fs.FileHandle, uint32) syscall.Errno {
	return errno(n.file.Sync())
}

func (n *node) Allocate(_ context.Context, _ fs.FileHandle, off, size uint64, mode uint32) syscall.Errno {
	if mode != unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE {
		return syscall.ENOTSUP
	}
	return errno(n.file.PunchHole(int64(off), int64(size)))
}

func (n *node) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	size, err := n.file.Size()
	if err != nil {
		return errno(err)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	out.Mode = syscall.S_IFREG | 0o600
	out.Size = uint64(size)
	out.Blocks = uint64(n.file.Allocated() / 512)
	out.Blksize = 4096
	out.SetTimes(nil, &n.mtime, nil)
	return 0
}

func (n *node) Setattr(ctx context.Context, f fs.FileHandle, in *fuse.SetAttrIn, out *fuse.AttrOut) syscall.Errno {
	if size, ok := in.GetSize(); ok {
		if err := n.file.Truncate(int64(size)); err != nil {
			return errno(err)
		}
	}
	n.mu.Lock()
	if at, ok := in.GetMTime(); ok {
		n.mtime = at
	}
	n.mu.Unlock()
	return n.Getattr(ctx, f, out)
}

func (n *node) Lseek(_ context.Context, _ fs.FileHandle, off uint64, whence uint32) (uint64, syscall.Errno) {
	size, err := n.file.Size()
	if err != nil {
		return 0, errno(err)
	}
	switch {
	case int64(off) >= size:
		return 0, syscall.ENXIO
	case whence == unix.SEEK_HOLE:
		return uint64(size), 0
	case whence != unix.SEEK_DATA:
		return 0, syscall.EINVAL
	}
	next, err := n.file.NextData(int64(off))
	if err == nil && next >= size {
		err = syscall.ENXIO
	}
	return uint64(next), errno(err)
}

// thread returns the number of the thread whose request it is.
func thread(ctx context.Context) uint32 {
	if c, ok := fuse.FromContext(ctx); ok {
		return c.Pid
	}
	return 0
}

// Statfs says that there is room, whatever the file's disk says.
func (n *node) Statfs(_ context.Context, out *fuse.StatfsOut) syscall.Errno {
	*out = fuse.StatfsOut{Blocks: 1 << 30, Bfree: 1 << 30, Bavail: 1 << 30, Bsize: 4096, Frsize: 4096, NameLen: 255}
	return 0
}

// errno returns the error number in err.
func errno(err error) syscall.Errno {
	var no syscall.Errno
	switch {
	case err == nil:
		return 0
	case errors.As(err, &no):
		return no
	}
	return syscall.EIO
}
