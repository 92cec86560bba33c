package clients

// A base on a disk with a bad place, shown by FUSE: what lies there is an
// error of the requests that touch it, and of no others.

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// The bad place, in bytes of the base.
const (
	badAt   = 5<<20 + 8192
	badSize = 4096
)

// badFile is a file whose bad place cannot be read.
type badFile struct {
	fs.Inode
	data []byte
}

func (f *badFile) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	out.Mode, out.Size, out.Mtime = 0o444, uint64(len(f.data)), 1e9
	return 0
}

func (f *badFile) Open(context.Context, uint32) (fs.FileHandle, uint32, syscall.Errno) {
	return nil, 0, 0
}

func (f *badFile) Read(_ context.Context, _ fs.FileHandle, dest []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	end := min(off+int64(len(dest)), int64(len(f.data)))
	if off < badAt+badSize && end > badAt {
		return nil, syscall.EIO
	}
	return fuse.ReadResultData(f.data[off:end]), 0
}

// badBase mounts a base with a bad place and returns its path and its bytes.
func badBase(t *testing.T) (string, []byte) {
	t.Helper()
	needFUSE(t)
	dir := filepath.Join(shortDir(t), "m")
	check(t, os.Mkdir(dir, 0o755))
	file := &badFile{data: make([]byte, 16<<20)}
	rnd := rand.NewChaCha8([32]byte{2})
	rnd.Read(file.data)
	root := &fs.Inode{}
	raw := fs.NewNodeFS(root, &fs.Options{})
	server, err := fuse.NewServer(raw, dir, &fuse.MountOptions{DirectMountStrict: true, FsName: "bad", Name: "bad"})
	if err != nil {
		t.Skipf("mounting a FUSE filesystem: %v", err)
	}
	go server.Serve()
	check(t, server.WaitMount())
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
	root.AddChild("base.img", root.NewPersistentInode(context.Background(), file, fs.StableAttr{Mode: syscall.S_IFREG}), true)
	return filepath.Join(dir, "base.img"), file.data
}

// needFUSE skips the test where FUSE cannot be had.
func needFUSE(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting a FUSE filesystem: needs root")
	}
	dev, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		t.Skipf("mounting a FUSE filesystem: %v", err)
	}
	dev.Close()
}

func TestBadSector(t *testing.T) {
	base, data := badBase(t)
	s := serveBase(t, base, "--base-digest=off")
	script := strings.NewReplacer("AT", fmt.Sprint(badAt), "AFTER", fmt.Sprint(badAt+badSize)).Replace(`
import errno
good = h.pread(4096, AT - 65536)
def bad(n, off):
    try:
        h.pread(n, off)
    except nbd.Error as e:
        assert e.errno == "EIO", e
        return
    raise SystemExit("a read of the bad place succeeded")
for i in range(3):
    bad(4096, AT)
bad(512, AT + 1024)
bad(1 << 20, AT - 65536)
# Many at once: one fails, the others do not.
buffers, failed = [], []
def done(i, err):
    if err != 0:
        failed.append(i)
    return 1
for i in range(64):
    b = nbd.Buffer(4096)
    buffers.append(b)
    h.aio_pread(b, AT - 32 * 65536 + i * 65536, lambda err, i=i: done(i, err.value))
while h.aio_in_flight() > 0:
    h.poll(-1)
assert failed == [32], failed
assert h.pread(4096, AT - 65536) == good
# A block that is written whole needs nothing of the base; part of it does.
try:
    h.pwrite(b"x" * 100, AT + 10)
    raise SystemExit("a copy-up of the bad place succeeded")
except nbd.Error as e:
    assert e.errno == "EIO", e
h.pwrite(b"y" * 4096, AT)
h.flush()
assert h.pread(4096, AT) == b"y" * 4096
import sys
sys.stdout.buffer.write(good)
`)
	cmd := command(t, python(), "-m", "nbd", "-u", s.uri, "-c", script)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("nbdsh: %v\n%s", err, &stderr)
	}
	if !bytes.Equal(out, data[badAt-65536:][:4096]) {
		t.Error("the base's good bytes are not what is read")
	}
	// The server goes on for others.
	run(t, "nbdinfo", "--size", s.uri)
}
