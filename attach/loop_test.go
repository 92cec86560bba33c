package attach

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cowdev/cowdev/block"
)

const testLimit = 60 * time.Second

// A memory is a block.Device in memory that counts what is asked of it.
type memory struct {
	mu             sync.RWMutex
	bytes          []byte
	readOnly       bool
	flushes, trims atomic.Int64
}

func (m *memory) ReadAt(p []byte, off int64) (int, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	n := copy(p, m.bytes[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (m *memory) WriteAt(p []byte, off int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return copy(m.bytes[off:], p), nil
}

func (m *memory) WriteZeroes(off, n int64, _ block.ZeroFlags) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	clear(m.bytes[off : off+n])
	return nil
}

func (m *memory) Trim(off, n int64) error {
	m.trims.Add(1)
	return m.WriteZeroes(off, n, 0)
}

func (m *memory) Size() int64              { return int64(len(m.bytes)) }
func (m *memory) Flush() error             { m.flushes.Add(1); return nil }
func (m *memory) Cache(off, n int64) error { return nil }
func (m *memory) ReadOnly() bool           { return m.readOnly }
func (m *memory) Extents(off, n int64, _ int) ([]block.Extent, error) {
	return []block.Extent{{Off: off, N: n, State: block.Stored}}, nil
}

// needDevices skips a test, by name, where the machine gives no loop devices
// or no FUSE.
func needDevices(t *testing.T) {
	t.Helper()
	for _, name := range []string{"/dev/fuse", "/dev/loop-control"} {
		f, err := os.OpenFile(name, os.O_RDWR, 0)
		if err != nil {
			t.Skipf("this machine has no usable %s: %v", name, err)
		}
		f.Close()
	}
	dir := t.TempDir()
	if err := unix.Mount("none", dir, "tmpfs", 0, ""); err != nil {
		t.Skipf("this machine does not let us mount: %v", err)
	}
	if err := unix.Unmount(dir, 0); err != nil {
		t.Fatal(err)
	}
}

// run runs a tool, which must succeed.
func run(t *testing.T, name string, args ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), testLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), "PATH=/usr/sbin:/usr/bin:/sbin:/bin")
	cmd.WaitDelay = time.Second
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
}

// loopOver makes a loop device of dev for the time of the test.
func loopOver(t *testing.T, dev block.Device, o LoopOptions) (name string, detach func()) {
	t.Helper()
	dir := t.TempDir()
	file, err := MountFuse(dev, dir)
	if err != nil {
		t.Skipf("this machine does not let us mount FUSE: %v", err)
	}
	l, err := AttachLoop(file.Path(), o)
	if err != nil {
		file.Close()
		t.Skipf("this machine gives no loop device: %v", err)
	}
	detach = sync.OnceFunc(func() {
		ctx, cancel := context.WithTimeout(context.Background(), testLimit)
		defer cancel()
		if err := l.Detach(ctx); err != nil {
			t.Error(err)
		}
		if err := file.Close(); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(detach)
	return l.Path(), detach
}

// mounted mounts device at a directory for as long as use runs.
func mounted(t *testing.T, device, options string, use func(dir string)) {
	t.Helper()
	dir := t.TempDir()
	if err := MountDevice(device, dir, "", options); errors.Is(err, unix.ENODEV) {
		t.Skipf("this kernel lacks the filesystem: %v", err)
	} else if err != nil {
		t.Fatal(err)
	}
	if got := MountedAt(dir); got != device {
		t.Errorf("%q is mounted at %s, expected %s", got, dir, device)
	}
	defer func() {
		if err := Unmount(dir); err != nil {
			unix.Unmount(dir, unix.MNT_DETACH)
			t.Fatal(err)
		}
	}()
	use(dir)
}

// Filesystems are made, filled, trimmed and checked on a device that is served
// through FUSE and loop, and their contents are there when it is attached
// again.
func TestFilesystemsOverLoop(t *testing.T) {
	needDevices(t)
	for _, fs := range []struct {
		name        string
		size        int
		mkfs, check []string
	}{
		{"ext4", 64 << 20, []string{"mke2fs", "-q", "-t", "ext4"}, []string{"e2fsck", "-fn"}},
		{"xfs", 320 << 20, []string{"mkfs.xfs", "-q"}, []string{"xfs_repair", "-n"}},
	} {
		t.Run(fs.name, func(t *testing.T) {
			dev := &memory{bytes: make([]byte, fs.size)}
			loop, detach := loopOver(t, dev, LoopOptions{Direct: true})
			run(t, fs.mkfs[0], append(fs.mkfs[1:], loop)...)
			content := randomBytes(5 << 20)
			mounted(t, loop, "noatime", func(dir string) { fill(t, dir, content) })
			run(t, fs.check[0], append(fs.check[1:], loop)...)
			detach()
			if dev.flushes.Load() == 0 {
				t.Error("no flush came through")
			}
			if dev.trims.Load() == 0 {
				t.Error("no discard came through")
			}
			dev.readOnly = true
			loop, _ = loopOver(t, dev, LoopOptions{ReadOnly: true})
			mounted(t, loop, "ro", func(dir string) { compare(t, dir, content) })
		})
	}
}

func randomBytes(n int) []byte {
	b := make([]byte, n)
	rng := rand.NewChaCha8([32]byte{1})
	rng.Read(b)
	return b
}

func fill(t *testing.T, dir string, content []byte) {
	t.Helper()
	for _, name := range []string{"kept", "removed"} {
		f, err := os.Create(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.Write(content); err != nil {
			t.Error(err)
		}
		if err := f.Sync(); err != nil {
			t.Error(err)
		}
		f.Close()
	}
	if err := os.Remove(filepath.Join(dir, "removed")); err != nil {
		t.Error(err)
	}
	run(t, "fstrim", dir)
}

func compare(t *testing.T, dir string, content []byte) {
	t.Helper()
	got, err := os.ReadFile(filepath.Join(dir, "kept"))
	if err != nil || !bytes.Equal(got, content) {
		t.Errorf("kept: %d bytes (%v), expected the %d that were written", len(got), err, len(content))
	}
	if _, err := os.Stat(filepath.Join(dir, "removed")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("removed: %v, expected none", err)
	}
}

// A device that is in use is not torn down under its user.
func TestBusy(t *testing.T) {
	needDevices(t)
	dev := &memory{bytes: make([]byte, 16<<20)}
	loop, _ := loopOver(t, dev, LoopOptions{})
	run(t, "mke2fs", "-q", loop)
	mounted(t, loop, "", func(string) {
		if busy, err := Busy(loop); !busy || err != nil {
			t.Errorf("mounted: busy %v, %v", busy, err)
		}
	})
	if busy, err := Busy(loop); busy || err != nil {
		t.Errorf("not mounted: busy %v, %v", busy, err)
	}
}

// A part of a device is a device of its own, and goes with its mount.
func TestPartOfDevice(t *testing.T) {
	needDevices(t)
	dev := &memory{bytes: make([]byte, 16<<20)}
	whole, _ := loopOver(t, dev, LoopOptions{})
	part, err := AttachLoop(whole, LoopOptions{Off: 1 << 20, N: 8 << 20, Autoclear: true})
	if err != nil {
		t.Fatal(err)
	}
	run(t, "mke2fs", "-q", part.Path())
	mounted(t, part.Path(), "", func(dir string) {
		part.Release()
		if busy, err := Busy(whole); !busy || err != nil {
			t.Errorf("a part of %s is mounted: busy %v, %v", whole, busy, err)
		}
		if got := MountOf(whole); got != dir {
			t.Errorf("a part of %s is mounted at %q, expected %s", whole, got, dir)
		}
	})
	ctx, cancel := context.WithTimeout(context.Background(), testLimit)
	defer cancel()
	if err := poll(ctx, func() (bool, error) { return LoopBack(part.Path()) == "", nil }); err != nil {
		t.Errorf("%s is still there after its unmount: %v", part.Path(), err)
	}
	if !bytes.Equal(dev.bytes[:1<<20], make([]byte, 1<<20)) {
		t.Error("something was written before the part")
	}
	if dev.bytes[1<<20+0x438] != 0x53 {
		t.Error("no ext mark where the part begins")
	}
}

// The name of a loop device that was ended may be another's at once: that one is
// left alone, and not waited for. One that is reserved cannot be mounted.
func TestLoopOfAnother(t *testing.T) {
	needDevices(t)
	image := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(image, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	l, err := AttachLoop(image, LoopOptions{})
	if err != nil {
		t.Skipf("this machine gives no loop device: %v", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), testLimit)
	defer cancel()
	if err := DetachLoop(ctx, l.Path(), "/run/cowdev/fuse-1/disk"); err != nil {
		t.Error(err)
	}
	if LoopBack(l.Path()) != clip(image) {
		t.Error("a device was ended that has another file behind it")
	}
	if free, err := l.Reserve(); !free || err != nil {
		t.Errorf("reserve a device that nobody uses: %v, %v", free, err)
	}
	if busy, err := Busy(l.Path()); !busy || err != nil {
		t.Errorf("a device that is reserved: busy %v, %v", busy, err)
	}
	if err := l.Detach(ctx); err != nil {
		t.Error(err)
	}
	if LoopBack(l.Path()) == clip(image) {
		t.Error("the device is still there")
	}
}

// A program that is started beside a FUSE filesystem does not get its
// connection: it would keep it from ending with the process that answers.
func TestFuseIsNotInherited(t *testing.T) {
	needDevices(t)
	dir := t.TempDir()
	file, err := MountFuse(&memory{bytes: make([]byte, 1<<20)}, dir)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	out, err := exec.Command("ls", "-l", "/proc/self/fd").CombinedOutput()
	if err != nil || bytes.Contains(out, []byte("fuse")) {
		t.Errorf("%v: a program has open:\n%s", err, out)
	}
}
