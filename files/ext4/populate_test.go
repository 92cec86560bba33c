package ext4_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// A populator changes a mounted file system at random, the same way for the
// same seed.
type populator struct {
	t     testing.TB
	dir   string
	rnd   *rand.Rand
	files []string // regular ones that may be changed
	dirs  []string
	n     int // names given
}

func newPopulator(t testing.TB, dir string, seed uint64) *populator {
	return &populator{t: t, dir: dir, rnd: rand.New(rand.NewPCG(seed, 0)), dirs: []string{dir}}
}

// must fails the test on an error other than those that an old file system
// gives for what it does not have.
func (p *populator) must(err error) {
	p.t.Helper()
	if err != nil && !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.EFBIG) {
		p.t.Fatal(err)
	}
}

func (p *populator) bytes(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(p.rnd.Uint32())
	}
	return b
}

// newName returns a name in one of the directories; one in ten is as long as
// names get.
func (p *populator) newName() string {
	p.n++
	name := fmt.Sprintf("f%d-é", p.n)
	if p.rnd.IntN(10) == 0 {
		name += strings.Repeat("x", 255-len(name))
	}
	return filepath.Join(p.dirs[p.rnd.IntN(len(p.dirs))], name)
}

// special makes one of everything that a file can be.
func (p *populator) special() {
	dir := filepath.Join(p.dir, "special")
	p.must(os.Mkdir(dir, 0o750))
	at := func(name string) string { return filepath.Join(dir, name) }
	for _, n := range []int{1, 20, 59, 60, 61, 155, 156, 200, 1000} {
		p.must(os.Symlink(strings.Repeat("t", n), at(fmt.Sprintf("symlink-%d", n))))
	}
	p.must(unix.Mknod(at("char"), unix.S_IFCHR|0o600, int(unix.Mkdev(5, 1))))
	p.must(unix.Mknod(at("block"), unix.S_IFBLK|0o640, int(unix.Mkdev(259, 70000))))
	p.must(unix.Mkfifo(at("fifo"), 0o644))
	p.must(unix.Mknod(at("socket"), unix.S_IFSOCK|0o755, 0))
	for _, n := range []int{0, 1, 59, 60, 61, 100, 150, 160, 1023, 1024, 4095, 4096, 4097, 65536} {
		p.must(os.WriteFile(at(fmt.Sprintf("size-%d", n)), p.bytes(n), 0o644))
	}
	p.must(os.WriteFile(at("setuid"), nil, 0o644))
	p.must(os.Chown(at("setuid"), 70000, 80000))
	p.must(unix.Chmod(at("setuid"), 0o6755))
	p.must(os.WriteFile(at("linked"), []byte("linked"), 0o600))
	for i := range 5 {
		p.must(os.Link(at("linked"), at(fmt.Sprintf("link-%d", i))))
	}
	magic := p.bytes(16384) // looks like blocks of a journal
	for off := 0; off < len(magic); off += 1024 {
		binary.BigEndian.PutUint32(magic[off:], 0xC03B3998)
	}
	p.must(os.WriteFile(at("journal-magic"), magic, 0o644))
	p.times(at("old"), -1<<31, 123456789)
	p.times(at("new"), 1<<32+1<<33, 999999999)
	p.times(at("before"), -1, 1)
	p.sparse(at("sparse"), 5<<20, 40)
	p.sparse(at("huge"), 1<<33, 60)
	p.fragmented(at("fragmented"))
	p.fallocated(at("fallocated"))
	p.xattrs(at("xattrs"))
	p.acl(dir)
}

func (p *populator) times(path string, sec, nsec int64) {
	p.must(os.WriteFile(path, nil, 0o644))
	ts := []unix.Timespec{{Sec: sec, Nsec: nsec}, {Sec: sec, Nsec: nsec}}
	p.must(unix.UtimesNanoAt(unix.AT_FDCWD, path, ts, 0))
}

// sparse writes blocks at random into a file of the given size.
func (p *populator) sparse(path string, size int64, blocks int) {
	f, err := os.Create(path)
	p.must(err)
	defer f.Close()
	p.must(f.Truncate(size))
	for range blocks {
		_, err := f.WriteAt(p.bytes(1+p.rnd.IntN(5000)), p.rnd.Int64N(size-5000))
		p.must(err)
	}
}

// fragmented makes a file of so many extents that their tree is two blocks
// deep where blocks are small.
func (p *populator) fragmented(path string) {
	f, err := os.Create(path)
	p.must(err)
	defer f.Close()
	for i := range int64(600) {
		_, err := f.WriteAt(p.bytes(10), i*2*4096)
		p.must(err)
	}
}

// fallocated makes unwritten extents, after the end of the file too, writes
// into some and punches a hole.
func (p *populator) fallocated(path string) {
	f, err := os.Create(path)
	p.must(err)
	defer f.Close()
	fd := int(f.Fd())
	p.must(unix.Fallocate(fd, 0, 0, 300<<10))
	p.must(unix.Fallocate(fd, unix.FALLOC_FL_KEEP_SIZE, 300<<10, 100<<10))
	_, err = f.WriteAt(p.bytes(10000), 50000)
	p.must(err)
	p.must(f.Sync())
	p.must(unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 100<<10, 20<<10))
}

// xattrs gives a file attributes of all kinds and sizes.
func (p *populator) xattrs(path string) {
	p.must(os.WriteFile(path, []byte("attributes"), 0o644))
	for name, size := range map[string]int{"user.small": 3, "user.empty": 0, "user.middle": 90, "trusted.t": 20,
		"security.s": 8, "user.large": 700, "user.huge": 3000} {
		p.must(unix.Setxattr(path, name, p.bytes(size), 0))
	}
}

// acl gives a directory an access control list and a default one.
func (p *populator) acl(dir string) {
	acl := binary.LittleEndian.AppendUint32(nil, 2)
	for _, e := range []struct {
		tag, perm uint16
		id        uint32
	}{{1, 7, ^uint32(0)}, {2, 5, 1234}, {4, 5, ^uint32(0)}, {8, 4, 4321}, {16, 7, ^uint32(0)}, {32, 0, ^uint32(0)}} {
		acl = binary.LittleEndian.AppendUint16(acl, e.tag)
		acl = binary.LittleEndian.AppendUint16(acl, e.perm)
		acl = binary.LittleEndian.AppendUint32(acl, e.id)
	}
	p.must(unix.Setxattr(dir, "system.posix_acl_access", acl, 0))
	p.must(unix.Setxattr(dir, "system.posix_acl_default", acl, 0))
}

// manyNames fills a directory with n names.
func (p *populator) manyNames(name string, n int) {
	dir := filepath.Join(p.dir, name)
	p.must(os.Mkdir(dir, 0o755))
	first := filepath.Join(dir, "entry-0")
	p.must(os.WriteFile(first, []byte("many names"), 0o644))
	for i := 1; i < n; i++ {
		path := filepath.Join(dir, fmt.Sprintf("entry-%d", i))
		if i%4 == 0 {
			p.must(os.WriteFile(path, nil, 0o644))
		} else {
			p.must(os.Symlink("entry-0", path))
		}
	}
}

// churn does n random things.
func (p *populator) churn(n int) {
	for range n {
		if len(p.files) == 0 {
			p.create()
			continue
		}
		i := p.rnd.IntN(len(p.files))
		path := p.files[i]
		switch p.rnd.IntN(14) {
		case 0, 1, 2, 3:
			p.create()
		case 4:
			dir := p.newName()
			p.must(os.Mkdir(dir, 0o755))
			p.dirs = append(p.dirs, dir)
		case 5, 6:
			p.must(os.Remove(path))
			p.files = append(p.files[:i], p.files[i+1:]...)
		case 7:
			to := p.newName()
			p.must(os.Rename(path, to))
			p.files[i] = to
		case 8:
			to := p.newName()
			p.must(os.Link(path, to))
			p.files = append(p.files, to)
		case 9:
			p.must(os.Truncate(path, p.rnd.Int64N(100000)))
		case 10:
			p.must(os.Chmod(path, os.FileMode(p.rnd.IntN(0o1000))))
		case 11:
			p.must(unix.Setxattr(path, fmt.Sprintf("user.%d", p.rnd.IntN(4)), p.bytes(p.rnd.IntN(200)), 0))
		case 12:
			dir := p.newName() // made and removed: its block is revoked
			p.must(os.Mkdir(dir, 0o700))
			p.must(os.WriteFile(filepath.Join(dir, "x"), nil, 0o600))
			p.must(os.RemoveAll(dir))
		case 13:
			p.overwrite(path)
		}
	}
}

// churnSimple does n random things that fast commits know; what kinds of them
// is chosen first, since some keep the kernel from making fast commits.
func (p *populator) churnSimple(n int) {
	kinds := p.rnd.Perm(10)[:3]
	for range n {
		if len(p.files) == 0 {
			p.create()
		}
		i := p.rnd.IntN(len(p.files))
		switch path := p.files[i]; kinds[p.rnd.IntN(len(kinds))] {
		case 0, 1:
			p.create()
		case 2:
			p.must(os.Remove(path))
			p.files = append(p.files[:i], p.files[i+1:]...)
		case 3:
			to := p.newName()
			p.must(os.Link(path, to))
			p.files = append(p.files, to)
		case 4:
			p.must(os.Truncate(path, p.rnd.Int64N(100000)))
		case 5:
			to := p.newName()
			p.must(os.Rename(path, to))
			p.files[i] = to
		case 6:
			p.overwrite(path)
		case 7:
			dir := p.newName()
			p.must(os.Mkdir(dir, 0o755))
			p.dirs = append(p.dirs, dir)
		case 8:
			p.must(os.Symlink(strings.Repeat("s", 1+p.rnd.IntN(90)), p.newName()))
		case 9:
			p.must(unix.Mknod(p.newName(), unix.S_IFCHR|0o600, int(unix.Mkdev(5, 1))))
		}
	}
}

func (p *populator) create() {
	path := p.newName()
	p.must(os.WriteFile(path, p.bytes(p.rnd.IntN(20000)), 0o644))
	p.files = append(p.files, path)
}

func (p *populator) overwrite(path string) {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	p.must(err)
	defer f.Close()
	_, err = f.WriteAt(p.bytes(1+p.rnd.IntN(9000)), p.rnd.Int64N(100000))
	p.must(err)
}

// syncFS makes everything durable, by transactions of the journal.
func (p *populator) syncFS() {
	f, err := os.Open(p.dir)
	p.must(err)
	defer f.Close()
	p.must(unix.Syncfs(int(f.Fd())))
}

// fsyncSome calls fsync on some files: with fast commits each is one.
func (p *populator) fsyncSome(n int) {
	for range min(n, len(p.files)) {
		f, err := os.Open(p.files[p.rnd.IntN(len(p.files))])
		p.must(err)
		p.must(f.Sync())
		f.Close()
	}
}
