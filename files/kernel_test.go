package files

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cowdev/cowdev/block"
)

// Two states of an ext file system that the real kernel made: populated,
// copied, changed at random.

// pairOf is a base image and a changed copy of it.
type pairOf struct {
	old, new string
	changed  []block.Extent // where their bytes differ
}

var canMount = sync.OnceValue(func() error {
	if os.Geteuid() != 0 {
		return errors.New("not root")
	}
	dir, err := os.MkdirTemp("", "cowdev-probe-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	image := filepath.Join(dir, "image")
	for _, cmd := range [][]string{
		{"truncate", "-s", "8M", image}, {"mke2fs", "-q", "-t", "ext4", image}, {"mkdir", dir + "/mnt"},
		{"mount", "-o", "loop", image, dir + "/mnt"}, {"umount", dir + "/mnt"},
	} {
		if out, err := command(cmd[0], cmd[1:]...); err != nil {
			return fmt.Errorf("%s: %v: %s", strings.Join(cmd, " "), err, out)
		}
	}
	return nil
})

// needMount skips a test where ext images cannot be mounted.
func needMount(t testing.TB) {
	t.Helper()
	if err := canMount(); err != nil {
		t.Skipf("mounting an ext4 image over a loop device does not work here: %v", err)
	}
}

// mount mounts an image until the returned function is called, at the latest
// at the test's end.
func mount(t testing.TB, image, options string) (dir string, unmount func()) {
	t.Helper()
	dir = t.TempDir()
	if err := patiently("mount", "-o", "loop,"+options, image, dir); err != nil {
		t.Fatal(err)
	}
	unmount = sync.OnceFunc(func() {
		if err := patiently("umount", dir); err != nil {
			t.Error(err)
			_, _ = command("umount", "-l", dir)
		}
	})
	t.Cleanup(unmount)
	return dir, unmount
}

// patiently runs a tool again for a while when it fails: other tests may have
// all loop devices, or some process may look at a mount.
func patiently(name string, args ...string) error {
	for end := time.Now().Add(toolTimeout); ; time.Sleep(200 * time.Millisecond) {
		out, err := command(name, args...)
		if err == nil || time.Now().After(end) || !strings.Contains(out, "loop") && !strings.Contains(out, "busy") {
			if err != nil {
				err = fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, out)
			}
			return err
		}
	}
}

// makePair makes a pair with mke2fs's options. With unclean the new image is
// copied while it is mounted, so that its journal is needed.
func makePair(t testing.TB, rng *rand.Rand, size int64, files, changes int, unclean bool, mkfs ...string) pairOf {
	t.Helper()
	needMount(t)
	p := pairOf{old: blank(t, size), new: filepath.Join(t.TempDir(), "new.img")}
	run(t, "mke2fs", append(mkfs, "-q", "-F", p.old)...)
	dir, unmount := mount(t, p.old, "user_xattr,acl")
	m := &mutator{t: t, rng: rng, top: dir}
	for range files {
		m.create()
	}
	unmount()
	run(t, "cp", "--sparse=always", p.old, p.new)
	mounted := p.new
	if unclean {
		mounted = filepath.Join(t.TempDir(), "live.img")
		run(t, "cp", "--sparse=always", p.old, mounted)
	}
	dir, unmount = mount(t, mounted, "user_xattr,acl")
	m.top, m.known = dir, nil
	m.age() // so that what is written from here has other times
	for range changes {
		m.change()
	}
	if unclean {
		run(t, "sync", "-f", dir)
		run(t, "cp", "--sparse=always", mounted, p.new)
	}
	unmount()
	p.changed = differences(t, p.old, p.new)
	return p
}

// differences returns the blocks of 4 KiB in which two files differ.
func differences(t testing.TB, old, new string) []block.Extent {
	t.Helper()
	a, b := openReader(t, old), openReader(t, new)
	x, y := make([]byte, 4096), make([]byte, 4096)
	var out []block.Extent
	for off := int64(0); off < a.Size(); off += 4096 {
		n := int(min(4096, a.Size()-off))
		if readFull(a, x[:n], off) != nil || readFull(b, y[:n], off) != nil {
			t.Fatalf("read the images at %d", off)
		}
		if bytes.Equal(x[:n], y[:n]) {
			continue
		}
		if last := len(out) - 1; last >= 0 && out[last].End() == off {
			out[last].N += int64(n)
			continue
		}
		out = append(out, block.Extent{Off: off, N: int64(n), State: block.Stored})
	}
	return out
}

// mutator changes a tree at random.
type mutator struct {
	t   testing.TB
	rng *rand.Rand
	top string
	n   int

	known []found // what is in the tree; nil when that has to be looked up
}

// found is a path in the tree and what it is.
type found struct {
	path string
	mode fs.FileMode
}

// check ends the test on an error; a full file system is none.
func (m *mutator) check(err error) {
	m.t.Helper()
	if err != nil && !errors.Is(err, syscall.ENOSPC) {
		m.t.Fatal(err)
	}
}

// age moves the modification times of nothing: it waits for the kernel's
// coarse clock to go on.
func (m *mutator) age() {
	was := time.Now()
	for time.Since(was) < 20*time.Millisecond {
		time.Sleep(5 * time.Millisecond)
	}
}

func (m *mutator) name() string {
	m.n++
	name := fmt.Sprintf("%c%d", 'a'+m.rng.IntN(26), m.n)
	switch m.rng.IntN(20) {
	case 0:
		name = fmt.Sprintf("%s-%d", strings.Repeat("n", 200), m.n)
	case 1:
		name += " with spaces"
	}
	return name
}

// paths lists what is in the tree, of the kinds that keep accepts.
func (m *mutator) paths(keep func(fs.FileMode) bool) []string {
	if m.known == nil {
		m.look()
	}
	var out []string
	for _, f := range m.known {
		if keep(f.mode) {
			out = append(out, f.path)
		}
	}
	return out
}

func (m *mutator) look() {
	m.known = []found{}
	m.check(filepath.WalkDir(m.top, func(p string, e fs.DirEntry, err error) error {
		if err == nil && filepath.Base(p) == "lost+found" {
			return fs.SkipDir
		}
		if err == nil && p != m.top {
			m.known = append(m.known, found{p, e.Type()})
		}
		return err
	}))
}

func (m *mutator) pick(paths []string) string {
	if len(paths) == 0 {
		return ""
	}
	return paths[m.rng.IntN(len(paths))]
}

func isReg(mode fs.FileMode) bool  { return mode.IsRegular() }
func isDir(mode fs.FileMode) bool  { return mode.IsDir() }
func isLink(mode fs.FileMode) bool { return mode&fs.ModeSymlink != 0 }
func isAny(fs.FileMode) bool       { return true }
func notLink(mode fs.FileMode) bool {
	return mode&fs.ModeSymlink == 0
}

func (m *mutator) dir() string {
	return m.pick(append(m.paths(isDir), m.top))
}

// create makes one file of any kind, a directory at times.
func (m *mutator) create() {
	name := filepath.Join(m.dir(), m.name())
	switch m.rng.IntN(14) {
	case 0, 1:
		m.check(os.Mkdir(name, 0o755))
	case 2:
		m.check(os.Symlink(strings.Repeat("t", 1+m.rng.IntN(100)), name))
	case 3:
		if f := m.pick(m.paths(isReg)); f != "" {
			m.check(os.Link(f, name))
		}
	case 4:
		m.check(syscall.Mkfifo(name, 0o600))
	case 5:
		m.check(syscall.Mknod(name, syscall.S_IFCHR|0o644, int(unix.Mkdev(uint32(m.rng.IntN(300)), uint32(m.rng.IntN(300))))))
	case 6: // sparse
		f, err := os.Create(name)
		m.check(err)
		_, err = f.WriteAt(randomBytes(m.rng, 3000), int64(m.rng.IntN(40))*4096+int64(m.rng.IntN(4096)))
		m.check(err)
		m.check(f.Close())
	default:
		m.check(os.WriteFile(name, randomBytes(m.rng, m.rng.IntN(20000)), 0o644))
	}
	if info, err := os.Lstat(name); err == nil && m.known != nil {
		m.known = append(m.known, found{name, info.Mode().Type()})
	}
}

// change makes one change of any kind.
func (m *mutator) change() {
	steps := []func(){
		m.create, m.create, m.overwrite, m.overwrite, m.resize, m.replace, m.touch, m.chmod, m.chown,
		m.setXattr, m.setACL, m.dropXattr, m.remove, m.removeTree, m.rename, m.rename, m.relink, m.punch, m.quietWrite,
	}
	steps[m.rng.IntN(len(steps))]()
}

func (m *mutator) withFile(do func(f *os.File, size int64)) {
	name := m.pick(m.paths(isReg))
	if name == "" {
		return
	}
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	m.check(err)
	defer f.Close()
	info, err := f.Stat()
	m.check(err)
	do(f, info.Size())
}

func (m *mutator) overwrite() {
	m.withFile(func(f *os.File, size int64) {
		_, err := f.WriteAt(randomBytes(m.rng, 1+m.rng.IntN(6000)), m.rng.Int64N(size+5000))
		m.check(err)
	})
}

// quietWrite changes bytes and puts the times back.
func (m *mutator) quietWrite() {
	m.withFile(func(f *os.File, size int64) {
		info, err := f.Stat()
		m.check(err)
		_, err = f.WriteAt(randomBytes(m.rng, 100), m.rng.Int64N(size+1))
		m.check(err)
		m.check(os.Chtimes(f.Name(), info.ModTime(), info.ModTime()))
	})
}

func (m *mutator) punch() {
	m.withFile(func(f *os.File, size int64) {
		if size > 0 {
			m.check(unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, m.rng.Int64N(size), 8192))
		}
	})
}

func (m *mutator) resize() {
	m.withFile(func(f *os.File, size int64) { m.check(f.Truncate(m.rng.Int64N(2*size + 1))) })
}

// replace does as an editor: a new file takes an old one's name.
func (m *mutator) replace() {
	name := m.pick(m.paths(isReg))
	if name == "" {
		return
	}
	content, err := os.ReadFile(name)
	m.check(err)
	m.check(os.WriteFile(name+"~", append(content, "edited"...), 0o644))
	m.check(os.Rename(name+"~", name))
}

func (m *mutator) touch() {
	when := time.Unix(m.rng.Int64N(2_000_000_000), m.rng.Int64N(1_000_000_000))
	if name := m.pick(m.paths(notLink)); name != "" {
		m.check(os.Chtimes(name, when, when))
	}
}

func (m *mutator) chmod() {
	if name := m.pick(m.paths(notLink)); name != "" {
		m.check(syscall.Chmod(name, uint32(m.rng.IntN(0o10000))|0o500))
	}
}

func (m *mutator) chown() {
	if name := m.pick(m.paths(isAny)); name != "" {
		m.check(os.Lchown(name, m.rng.IntN(100_000), m.rng.IntN(100_000)))
	}
}

func (m *mutator) setXattr() {
	if name := m.pick(m.paths(func(mode fs.FileMode) bool { return mode.IsRegular() || mode.IsDir() })); name != "" {
		m.check(unix.Lsetxattr(name, fmt.Sprintf("user.x%d", m.rng.IntN(3)), randomBytes(m.rng, 1+m.rng.IntN(600)), 0))
	}
}

func (m *mutator) setACL() {
	// Version 2; owner, a named user, group, mask, others.
	acl := []byte{2, 0, 0, 0, 1, 0, 6, 0, 255, 255, 255, 255, 2, 0, byte(m.rng.IntN(8)), 0, 7, 3, 0, 0, 4, 0, 4, 0, 255, 255, 255, 255, 16, 0, 6, 0, 255, 255, 255, 255, 32, 0, 4, 0, 255, 255, 255, 255}
	if name := m.pick(m.paths(isReg)); name != "" {
		m.check(unix.Lsetxattr(name, "system.posix_acl_access", acl, 0))
	}
}

func (m *mutator) dropXattr() {
	for _, name := range m.paths(isReg) {
		if err := unix.Lremovexattr(name, "user.x1"); err == nil {
			return
		}
	}
}

func (m *mutator) remove() {
	if name := m.pick(m.paths(func(mode fs.FileMode) bool { return !mode.IsDir() })); name != "" {
		m.check(os.Remove(name))
		m.known = nil
	}
}

// removeTree removes a directory that holds little.
func (m *mutator) removeTree() {
	for range 5 {
		name := m.pick(m.paths(isDir))
		if name == "" {
			return
		}
		if below, err := filepath.Glob(name + "/*"); err == nil && len(below) < 4 {
			m.check(os.RemoveAll(name))
			m.known = nil
			return
		}
	}
}

// rename moves a file or a directory, often to another directory.
func (m *mutator) rename() {
	name, to := m.pick(m.paths(isAny)), m.dir()
	if name == "" || to == name || strings.HasPrefix(to, name+"/") {
		return
	}
	m.check(os.Rename(name, filepath.Join(to, m.name())))
	m.known = nil
}

// relink points a symbolic link elsewhere.
func (m *mutator) relink() {
	if name := m.pick(m.paths(isLink)); name != "" {
		m.check(os.Remove(name))
		m.check(os.Symlink(fmt.Sprintf("target%d", m.rng.IntN(1000)), name))
	}
}

// describe makes lines of changes for a comparison in tests.
func describe(changes []*Change) []string {
	out := make([]string, len(changes))
	for i, ch := range changes {
		out[i] = fmt.Sprintf("%v bytes=%d differ=%v from=%s link=%s", ch, ch.Bytes, ch.Differ, ch.From, ch.LinkTo)
	}
	return out
}

// onlyIn returns the lines of a that b has not.
func onlyIn(a, b []string) string {
	var out []string
	for _, line := range a {
		if !slices.Contains(b, line) {
			out = append(out, line)
		}
	}
	return strings.Join(out, "\n")
}
