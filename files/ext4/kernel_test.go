package ext4_test

// The kernel is the judge: mke2fs makes file systems with dozens of feature
// combinations, the kernel mounts and changes them, the image is copied while
// it is still mounted, so that its journal is needed, and what this package
// reads from the copy must be what the kernel shows after mounting another
// copy: type, mode, owner, size, times, links, device, attributes, content and
// where the content lies.

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/cowdev/cowdev/files/ext4"
	"golang.org/x/sys/unix"
)

// wait bounds every command that a test runs.
const wait = 60 * time.Second

// run runs a command, and fails the test if it fails or takes too long.
func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := tryRun(name, args...)
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return out
}

func tryRun(name string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), wait)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	if ctx.Err() != nil {
		err = fmt.Errorf("not done after %v", wait)
	}
	return string(out), err
}

// scratch returns a directory for images that goes with the test: in memory
// where there is room, since the kernel syncs a lot.
func scratch(t testing.TB) string {
	t.Helper()
	const room = 1 << 30
	var st unix.Statfs_t
	if unix.Statfs("/dev/shm", &st) != nil || st.Bavail*uint64(st.Bsize) < room {
		return t.TempDir()
	}
	dir, err := os.MkdirTemp("/dev/shm", "cowdev-ext4-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// makeImage returns a new file system of size bytes in a sparse file.
func makeImage(t testing.TB, size int64, mkfs ...string) string {
	t.Helper()
	path := filepath.Join(scratch(t), "image")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	run(t, "mke2fs", append(append([]string{"-q", "-F"}, mkfs...), path)...)
	return path
}

// mount mounts an image through a loop device until the test ends, or until
// the function it returns is called.
func mount(t testing.TB, image, options string) (dir string, unmount func()) {
	t.Helper()
	dir, unmount, err := tryMount(t, image, options)
	if err != nil {
		t.Fatal(err)
	}
	return dir, unmount
}

// mountNew is mount for an image that mke2fs just made; it skips the test if
// the kernel lacks one of its features.
func mountNew(t testing.TB, image, options string) (dir string, unmount func()) {
	t.Helper()
	dir, unmount, err := tryMount(t, image, options)
	if err != nil {
		t.Skip("needs a kernel that mounts this: ", err)
	}
	return dir, unmount
}

func tryMount(t testing.TB, image, options string) (dir string, unmount func(), err error) {
	dir = t.TempDir()
	if out, err := tryRun("mount", "-t", "ext4", "-o", "loop,"+options, image, dir); err != nil {
		return "", nil, fmt.Errorf("mount -o %s: %w: %s", options, err, strings.TrimSpace(out))
	}
	unmount = sync.OnceFunc(func() {
		out, err := tryRun("umount", dir)
		if err != nil {
			tryRun("umount", "-l", dir)
			t.Errorf("umount %s: %v\n%s", dir, err, out)
		}
	})
	t.Cleanup(unmount)
	return dir, unmount, nil
}

// needMount skips the test where images cannot be mounted through loop
// devices.
func needMount(t *testing.T) {
	t.Helper()
	if why := mountable(t); why != "" {
		t.Skip("needs to mount ext4 over a loop device: " + why)
	}
}

var (
	mountableOnce sync.Once
	mountableWhy  string
)

func mountable(t *testing.T) string {
	mountableOnce.Do(func() {
		if os.Getuid() != 0 {
			mountableWhy = "not root"
			return
		}
		image := makeImage(t, 8<<20, "-t", "ext4")
		dir := t.TempDir()
		out, err := tryRun("mount", "-t", "ext4", "-o", "loop", image, dir)
		if err != nil {
			mountableWhy = strings.TrimSpace(out)
			return
		}
		if out, err := tryRun("umount", dir); err != nil {
			mountableWhy = strings.TrimSpace(out)
		}
	})
	return mountableWhy
}

// copyImage copies an image as it is now, holes kept.
func copyImage(t testing.TB, from string) string {
	t.Helper()
	to := filepath.Join(scratch(t), "copy")
	run(t, "cp", "--sparse=always", from, to)
	return to
}

// fileReader is an image in a file.
type fileReader struct {
	*os.File
	size int64
}

func (r fileReader) Size() int64 { return r.size }

func openImage(t testing.TB, path string) *ext4.FS {
	t.Helper()
	fs, err := ext4.Open(imageReader(t, path))
	if err != nil {
		t.Fatal(err)
	}
	return fs
}

func imageReader(t testing.TB, path string) fileReader {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	info, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	return fileReader{f, info.Size()}
}

// facts are what is known of a file, each on a line of its own.
type facts map[string]string

func (f facts) set(key, format string, args ...any) { f[key] = fmt.Sprintf(format, args...) }

// maxHashed is the size up to which a file's content is compared; larger ones
// are holes for the most part.
const maxHashed = 64 << 20

// readTree returns the facts of all files that this package reads.
func readTree(t testing.TB, fs *ext4.FS) map[string]facts {
	t.Helper()
	tree := map[string]facts{}
	var walk func(path string, n *ext4.Inode)
	walk = func(path string, n *ext4.Inode) {
		tree[path] = inodeFacts(t, path, n)
		if !n.IsDir() {
			return
		}
		var names []string
		err := fs.ReadDir(n, func(e ext4.Dirent) error {
			names = append(names, string(e.Name))
			return nil
		})
		if err != nil {
			t.Fatalf("%s: %v", path, err)
		}
		for _, name := range names {
			ino, typ, err := fs.Lookup(n, name)
			if err != nil {
				t.Fatal(err)
			}
			child, err := fs.Inode(ino)
			if err != nil {
				t.Fatalf("%s/%s: %v", path, name, err)
			}
			if typ != 0 && typ != child.Type() {
				t.Errorf("%s/%s: directory says type %#x, inode %#x", path, name, typ, child.Type())
			}
			walk(path+"/"+name, child)
		}
	}
	root, err := fs.Inode(ext4.RootIno)
	if err != nil {
		t.Fatal(err)
	}
	walk("", root)
	return tree
}

func inodeFacts(t testing.TB, path string, n *ext4.Inode) facts {
	t.Helper()
	f := facts{}
	f.set("stat", "ino %d mode %o uid %d gid %d", n.Ino, n.Mode, n.UID, n.GID)
	f.set("links", "%d", n.Links)
	f.set("size", "%d", n.Size)
	f.set("blocks", "%d", n.Blocks)
	f.set("device", "%d:%d", n.Major, n.Minor)
	f.set("generation", "%d", n.Generation)
	f.set("atime", "%d", n.Atime.UnixNano())
	f.set("mtime", "%d", n.Mtime.UnixNano())
	f.set("ctime", "%d", n.Ctime.UnixNano())
	if !n.Crtime.IsZero() {
		f.set("crtime", "%d", n.Crtime.UnixNano())
	}
	xattrs, err := n.Xattrs()
	if err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	for _, x := range xattrs {
		f.set("xattr "+x.Name, "%d bytes %x", len(x.Value), sha256.Sum256(x.Value))
	}
	if n.IsSymlink() {
		target, err := n.Symlink()
		if err != nil {
			t.Fatalf("%s: %v", path, err)
		}
		f.set("target", "%s", target)
	}
	if n.IsRegular() && n.Size <= maxHashed {
		h := sha256.New()
		if size, err := io.Copy(h, n.Reader()); err != nil || size != n.Size {
			t.Fatalf("%s: read %d bytes of %d: %v", path, size, n.Size, err)
		}
		f.set("content", "%x", h.Sum(nil))
	}
	if n.IsRegular() {
		extents, err := n.Extents()
		if err != nil {
			t.Fatalf("%s: %v", path, err)
		}
		f.set("extents", "%v", extents)
	}
	return f
}

// kernelTree returns the facts of all files below dir as the kernel shows them.
func kernelTree(t testing.TB, dir string) map[string]facts {
	t.Helper()
	tree := map[string]facts{}
	err := filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		tree[strings.TrimPrefix(path, dir)], err = kernelFacts(path)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return tree
}

func kernelFacts(path string) (facts, error) {
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, path, unix.AT_SYMLINK_NOFOLLOW, unix.STATX_BASIC_STATS|unix.STATX_BTIME, &st); err != nil {
		return nil, err
	}
	f := facts{}
	f.set("stat", "ino %d mode %o uid %d gid %d", st.Ino, st.Mode, st.Uid, st.Gid)
	f.set("links", "%d", st.Nlink)
	f.set("size", "%d", st.Size)
	f.set("blocks", "%d", st.Blocks)
	f.set("device", "%d:%d", st.Rdev_major, st.Rdev_minor)
	for key, ts := range map[string]unix.StatxTimestamp{"atime": st.Atime, "mtime": st.Mtime, "ctime": st.Ctime} {
		f.set(key, "%d", time.Unix(ts.Sec, int64(ts.Nsec)).UnixNano())
	}
	if st.Mask&unix.STATX_BTIME != 0 {
		f.set("crtime", "%d", time.Unix(st.Btime.Sec, int64(st.Btime.Nsec)).UnixNano())
	}
	if err := kernelXattrs(path, f); err != nil {
		return nil, err
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFLNK:
		target, err := os.Readlink(path)
		if err != nil {
			return nil, err
		}
		f.set("target", "%s", target)
	case unix.S_IFREG:
		if err := kernelContent(path, int64(st.Size), f); err != nil {
			return nil, err
		}
	}
	return f, nil
}

func kernelXattrs(path string, f facts) error {
	list := make([]byte, 64<<10)
	n, err := unix.Llistxattr(path, list)
	if err != nil {
		return err
	}
	for _, name := range strings.Split(strings.TrimSuffix(string(list[:n]), "\x00"), "\x00") {
		if name == "" {
			continue
		}
		value := make([]byte, 64<<10)
		n, err := unix.Lgetxattr(path, name, value)
		if err != nil {
			return fmt.Errorf("%s: %s: %w", path, name, err)
		}
		f.set("xattr "+name, "%d bytes %x", n, sha256.Sum256(value[:n]))
	}
	return nil
}

func kernelContent(path string, size int64, f facts) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer file.Close()
	if size <= maxHashed {
		h := sha256.New()
		if _, err := io.Copy(h, file); err != nil {
			return err
		}
		f.set("content", "%x", h.Sum(nil))
	}
	extents, err := fiemap(file)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	f.set("extents", "%v", extents)
	const getVersion = 0x80087601 // FS_IOC_GETVERSION
	generation, err := unix.IoctlGetUint32(int(file.Fd()), getVersion)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	f.set("generation", "%d", generation)
	return nil
}

// fiemap asks the kernel for a file's extents; those that follow one another
// are joined.
func fiemap(file *os.File) ([]ext4.Extent, error) {
	const (
		request   = 0xC020660B
		last      = 0x1
		unwritten = 0x800
		inline    = 0x200
		batch     = 256
	)
	type extent struct {
		logical, phys, n uint64
		_                [2]uint64
		flags            uint32
		_                [3]uint32
	}
	var out []ext4.Extent
	for start := uint64(0); ; {
		var arg struct {
			start, length               uint64
			flags, mapped, count, spare uint32
			extents                     [batch]extent
		}
		arg.start, arg.length, arg.count = start, ^uint64(0)-start, batch
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, file.Fd(), request, uintptr(unsafe.Pointer(&arg))); errno != 0 {
			return nil, errno
		}
		for _, e := range arg.extents[:arg.mapped] {
			start = e.logical + e.n
			if e.flags&inline == 0 {
				out = joinExtent(out, ext4.Extent{Off: int64(e.logical), Phys: int64(e.phys), N: int64(e.n), Unwritten: e.flags&unwritten != 0})
			}
			if e.flags&last != 0 {
				return out, nil
			}
		}
		if arg.mapped == 0 {
			return out, nil
		}
	}
}

func joinExtent(to []ext4.Extent, e ext4.Extent) []ext4.Extent {
	if n := len(to); n > 0 {
		if l := &to[n-1]; l.Off+l.N == e.Off && l.Phys+l.N == e.Phys && l.Unwritten == e.Unwritten {
			l.N += e.N
			return to
		}
	}
	return append(to, e)
}

// compareTrees fails the test where got is not want, but for the keys that
// skip tells it to leave out; keys that the kernel cannot tell do not count.
func compareTrees(t testing.TB, got, want map[string]facts, skip func(f facts, key string) bool) {
	t.Helper()
	reported := 0
	report := func(format string, args ...any) {
		if reported++; reported <= 20 {
			t.Errorf(format, args...)
		}
	}
	for _, path := range slices.Sorted(maps.Keys(want)) {
		g, ok := got[path]
		if !ok {
			report("%s: missing", path)
			continue
		}
		for _, key := range slices.Sorted(maps.Keys(want[path])) {
			if w := want[path][key]; g[key] != w && !skip(want[path], key) {
				report("%s: %s\n got %.300s\nwant %.300s", path, key, g[key], w)
			}
		}
		for key := range g {
			if _, ok := want[path][key]; !ok && strings.HasPrefix(key, "xattr") {
				report("%s: %s is not there", path, key)
			}
		}
	}
	for _, path := range slices.Sorted(maps.Keys(got)) {
		if _, ok := want[path]; !ok {
			report("%s: is not there", path)
		}
	}
	if reported > 20 {
		t.Errorf("and %d more", reported-20)
	}
}

func isDir(f facts) bool { return bytes.Contains([]byte(f["stat"]), []byte(" mode 4")) }
