package crash

// A real ext4 filesystem of some megabytes, filled to the last byte under a
// server: what was written stays, flushes and checkpoints go on, and when
// there is room writes do too, without a restart.

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cowdev/cowdev/internal/nbd"
	"github.com/cowdev/cowdev/internal/nbdclient"
)

const blockSize = 4096

// newSmallDisk mounts a new ext4 filesystem of n bytes until the test ends. It
// skips the test where that cannot be had.
func newSmallDisk(t *testing.T, n int64) string {
	t.Helper()
	return newDisk(t, n, "mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal", "-E", "nodiscard")
}

// newDisk is newSmallDisk of a filesystem that mkfs makes.
func newDisk(t *testing.T, n int64, mkfs string, args ...string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting a filesystem: needs root")
	}
	dir := t.TempDir()
	img, at := filepath.Join(dir, "img"), filepath.Join(dir, "at")
	if err := os.WriteFile(img, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(img, n); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(at, 0o755); err != nil {
		t.Fatal(err)
	}
	if out, err := command(patience, mkfs, append(args, img)...); err != nil {
		t.Fatalf("%s: %v\n%s", mkfs, err, out)
	}
	if out, err := command(patience, "mount", "-o", "loop", img, at); err != nil {
		t.Skipf("mounting a filesystem of %s by a loop device: %v: %s", mkfs, err, out)
	}
	t.Cleanup(func() {
		if out, err := command(patience, "umount", at); err != nil {
			t.Errorf("umount: %v\n%s", err, out)
			command(patience, "umount", "-l", at)
		}
	})
	return at
}

// fill writes a file until its filesystem is full, and returns its path.
func fill(t *testing.T, dir string) string {
	t.Helper()
	path := filepath.Join(dir, "ballast")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for n := 1 << 20; n >= 512; {
		if _, err = f.Write(make([]byte, n)); err != nil {
			n /= 2
		}
	}
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("fill the filesystem: %v", err)
	}
	return path
}

// A fullCase is a server whose store lies on a small filesystem.
type fullCase struct {
	t      *testing.T
	dir    string
	base   string
	store  string
	flags  []string
	server *server
	known
}

func newFullCase(t *testing.T, flags ...string) *fullCase {
	return newFullCaseOn(t, newSmallDisk(t, 32<<20), flags...)
}

// newFullCaseOn is newFullCase with the store in dir.
func newFullCaseOn(t *testing.T, dir string, flags ...string) *fullCase {
	c := &fullCase{t: t, dir: dir, flags: flags, known: newKnown(64 << 20)}
	sockets := shortDir(t)
	c.base, c.store = filepath.Join(sockets, "base"), filepath.Join(c.dir, "cow")
	f, err := os.Create(c.base)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(int64(len(c.content))); err != nil {
		t.Fatal(err)
	}
	c.start()
	t.Cleanup(func() { // before the filesystem goes
		c.server.kill()
		c.server.wait()
	})
	return c
}

func (c *fullCase) start() {
	c.t.Helper()
	var err error
	args := append(append([]string{"--format=raw", "--base-digest=sample"}, c.flags...), c.base, c.store)
	if c.server, err = serve(filepath.Dir(c.base), args...); err != nil {
		c.t.Fatal(err)
	}
	if c.dev, err = c.server.dial(); err != nil {
		c.t.Fatal(err)
	}
}

func (c *fullCase) mustWrite(off int64, n int) {
	c.t.Helper()
	if err := c.write(off, n); err != nil {
		c.t.Fatalf("write of %d bytes at %d: %v", n, off, err)
	}
}

func (c *fullCase) mustFlush() {
	c.t.Helper()
	if err := c.dev.Flush(); err != nil {
		c.t.Fatalf("flush: %v", err)
	}
}

// compare reads all of the device but [from, to), of which writes failed.
func (c *fullCase) compare(from, to int64) {
	c.t.Helper()
	p := make([]byte, 1<<20)
	for off := int64(0); off < int64(len(c.content)); off += int64(len(p)) {
		if _, err := c.dev.ReadAt(p, off); err != nil {
			c.t.Fatalf("read at %d: %v", off, err)
		}
		want := bytes.Clone(c.content[off:][:len(p)])
		if lo, hi := max(off, from), min(off+int64(len(p)), to); lo < hi {
			copy(want[lo-off:hi-off], p[lo-off:hi-off])
		}
		if at := differs(p, want); at >= 0 {
			c.t.Fatalf("sector %d of the MiB at %d reads as %s, was written as %s", at, off, describe(p, at), describe(want, at))
		}
	}
}

// exhaust writes until there is no room, and returns where the write was that
// failed.
func (c *fullCase) exhaust(from int64) int64 {
	c.t.Helper()
	for off := from; off < int64(len(c.content)); off += blockSize * 4 {
		if err := c.write(off, blockSize*4); errors.Is(err, syscall.ENOSPC) {
			return off
		} else if err != nil {
			c.t.Fatalf("write at %d: %v, expected ENOSPC", off, err)
		}
	}
	c.t.Fatal("the filesystem took everything")
	return 0
}

func TestFullDisk(t *testing.T) {
	c := newFullCase(t)
	for off := int64(0); off < 4<<20; off += 1 << 20 {
		c.mustWrite(off, 256<<10)
	}
	c.mustFlush()
	ballast := fill(t, c.dir)
	failed := c.exhaust(8 << 20)
	c.compare(failed, failed+4*blockSize)

	// Overwrites and flushes need no room, and enough of them fill the log
	// again and again, so that it is checkpointed.
	for i := range int64(300) {
		c.mustWrite(i%64*blockSize, blockSize)
		c.mustFlush()
	}
	c.compare(failed, failed+4*blockSize)

	// Killed and started again, still without room.
	c.mustWrite(0, blockSize)
	c.server.kill()
	if err := c.server.wait(); err != nil {
		t.Fatal(err)
	}
	c.start()
	c.compare(failed, failed+4*blockSize)
	c.toldOfRoom()
	if err := c.write(20<<20, 1<<20); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("write without room: %v, expected ENOSPC", err)
	}

	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	c.mustWrite(20<<20, 1<<20)
	c.mustWrite(failed, 4*blockSize)
	c.mustFlush()
	c.compare(0, 0)
	if err := c.server.close(); err != nil {
		t.Fatal(err)
	}
	c.check()
}

// TestFullDiskSparseCopy serves, on a full disk, a copy of a store in which
// zeros of its superblocks, log and table became holes.
func TestFullDiskSparseCopy(t *testing.T) {
	for _, policy := range []string{"enospc", "park"} {
		t.Run(policy, func(t *testing.T) {
			newFullCase(t, "--on-full="+policy).serveCopy("--sparse=always", policy)
		})
	}
}

// TestFullDiskReflinkCopy serves, on a full disk, a copy of a store that shares
// all of its blocks with it.
func TestFullDiskReflinkCopy(t *testing.T) {
	for _, policy := range []string{"enospc", "park"} {
		t.Run(policy, func(t *testing.T) {
			c := newFullCaseOn(t, newDisk(t, 320<<20, "mkfs.xfs", "-q", "-m", "reflink=1"), "--on-full="+policy)
			c.serveCopy("--reflink=always", policy)
		})
	}
}

// serveCopy fills the disk and goes on with a copy of the store: what needs room
// is answered ENOSPC or waits, and the store is not broken by what the session
// itself writes.
func (c *fullCase) serveCopy(how, policy string) {
	t := c.t
	t.Helper()
	c.mustWrite(0, 1<<20)
	c.mustFlush()
	if err := c.server.close(); err != nil {
		t.Fatal(err)
	}
	twin := filepath.Join(c.dir, "twin")
	if out, err := command(patience, "cp", how, c.store, twin); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	c.store = twin
	ballast := fill(t, c.dir)
	c.start()
	c.compare(0, 0)
	if policy == "park" {
		time.AfterFunc(200*time.Millisecond, func() { os.Remove(ballast) })
		c.mustWrite(0, blockSize)
	} else {
		if err := c.write(0, blockSize); !errors.Is(err, syscall.ENOSPC) {
			t.Fatalf("write without room: %v, expected ENOSPC", err)
		}
		c.mustFlush() // of nothing
		if err := os.Remove(ballast); err != nil {
			t.Fatal(err)
		}
		waitFor(t, "room", func() bool { return c.write(0, blockSize) == nil }) // XFS gives it back later
	}
	for off := int64(0); off < 2<<20; off += 1 << 18 {
		c.mustWrite(off, blockSize)
	}
	c.mustFlush()
	// Full again in the middle of the session: what it writes over is its own.
	ballast = fill(t, c.dir)
	for i := range int64(100) {
		if err := c.write(3<<18, blockSize); err != nil {
			t.Fatalf("overwrite %d: %v", i, err)
		}
		c.mustFlush()
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	c.compare(0, 0)
	if err := c.server.close(); err != nil {
		t.Fatal(err)
	}
	c.check()
}

// check runs `cowdev check`.
func (c *fullCase) check() {
	c.t.Helper()
	if out, err := command(patience, program, "check", "--quiet", c.store); err != nil {
		c.t.Fatalf("check: %v\n%s", err, out)
	}
}

// toldOfRoom waits for the server's log to tell that there is hardly any room,
// and looks for it in `info`.
func (c *fullCase) toldOfRoom() {
	c.t.Helper()
	const low = "LOW, below 1 %"
	waitFor(c.t, "word of little room", func() bool { return strings.Contains(c.server.stderr(), low) })
	if out, err := command(patience, program, "info", c.store); err != nil || !strings.Contains(out, low) {
		c.t.Errorf("info does not tell how little room there is: %v\n%s", err, out)
	}
}

// TestFullDiskParkEnds: a write that has waited for as long as it was told to
// is answered ENOSPC, and the next one goes on when there is room.
func TestFullDiskParkEnds(t *testing.T) {
	c := newFullCase(t, "--on-full=park=200ms")
	c.mustWrite(0, 1<<20)
	ballast := fill(t, c.dir)
	begin := time.Now()
	if err := c.write(16<<20, 2<<20); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("a write that nothing makes room for: %v, expected ENOSPC", err)
	}
	if waited := time.Since(begin); waited < 200*time.Millisecond {
		t.Errorf("it waited for %v, expected 200ms", waited)
	}
	c.compare(16<<20, 18<<20)
	c.mustFlush()
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	c.mustWrite(16<<20, 2<<20)
	c.compare(0, 0)
	if err := c.server.close(); err != nil {
		t.Fatal(err)
	}
	c.check()
}

// TestFullDiskPark: a write waits for room while reads go on.
func TestFullDiskPark(t *testing.T) {
	c := newFullCase(t, "--on-full=park")
	c.mustWrite(0, 1<<20)
	c.mustFlush()
	ballast := fill(t, c.dir)
	reader, err := c.server.dial()
	if err != nil {
		t.Fatal(err)
	}
	defer reader.c.Close()
	written := make(chan error, 1)
	go func() { written <- c.write(16<<20, 2<<20) }()
	waitFor(t, "word of a full store", func() bool { return strings.Contains(c.server.stderr(), "full") })
	for range 50 {
		p := make([]byte, blockSize)
		if _, err := reader.ReadAt(p, 0); err != nil || !bytes.Equal(p, c.content[:blockSize]) {
			t.Fatalf("read beside a parked write: %v", err)
		}
	}
	select {
	case err := <-written:
		t.Fatalf("the write did not wait for room: %v", err)
	default:
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-written:
		if err != nil {
			t.Fatalf("the parked write: %v", err)
		}
	case <-time.After(patience):
		t.Fatalf("the parked write was not done within %v of there being room", patience)
	}
	c.mustFlush()
	c.compare(0, 0)
	if err := c.server.close(); err != nil {
		t.Fatal(err)
	}
	c.check()
}

// TestFullDiskParkBesideReads: a write that finds no room holds up nothing that
// its own connection sends after it, be it the first that finds none, and sent
// alone or with others.
func TestFullDiskParkBesideReads(t *testing.T) {
	for _, n := range []int{blockSize, 32 << 10, 1 << 20} {
		t.Run(strconv.Itoa(n), func(t *testing.T) {
			c := newFullCase(t, "--on-full=park")
			c.mustWrite(0, 1<<20)
			ballast := fill(t, c.dir)
			sent := make(chan error, 1)
			go func() {
				var err error
				for off := 16 << 20; err == nil && !strings.Contains(c.server.stderr(), "full"); off += n {
					_, err = c.dev.c.Request(nbdclient.Request{Type: nbd.CmdWrite, Offset: uint64(off), Payload: bytes.Repeat([]byte{1}, n)})
					time.Sleep(time.Millisecond)
				}
				sent <- err
			}()
			waitFor(t, "word of a full store", func() bool { return strings.Contains(c.server.stderr(), "full") })
			if err := <-sent; err != nil {
				t.Fatal(err)
			}
			read, err := c.dev.c.Request(nbdclient.Request{Type: nbd.CmdRead, Length: blockSize})
			if err != nil {
				t.Fatal(err)
			}
			answered := make(chan error, 1)
			go func() {
				for {
					if m, err := c.dev.c.Receive(); err != nil || m.Cookie == read {
						answered <- err
						return
					}
				}
			}()
			select {
			case err := <-answered:
				if err != nil {
					t.Fatal(err)
				}
			case <-time.After(patience / 6):
				t.Error("the read waits for room")
			}
			if err := os.Remove(ballast); err != nil {
				t.Fatal(err)
			}
			c.dev.c.Close()
			if err := c.server.close(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// TestFullDiskParkStops: a parked write does not hold up the end of the server.
// It is answered ENOSPC, and what was acknowledged is there afterwards.
func TestFullDiskParkStops(t *testing.T) {
	c := newFullCase(t, "--on-full=park")
	c.mustWrite(0, 1<<20)
	ballast := fill(t, c.dir)
	parked := make(chan int64, 1)
	go func() { // each is received whole, so that it has a right to an answer
		off := int64(16 << 20)
		var err error
		for ; err == nil && off < int64(len(c.content)); off += blockSize * 4 {
			err = c.write(off, blockSize*4)
		}
		if !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("a write that was parked when the server was ended: %v, expected ENOSPC", err)
		}
		parked <- off - blockSize*4
	}()
	waitFor(t, "word of a full store", func() bool { return strings.Contains(c.server.stderr(), "full") })
	if err := c.server.close(); err != nil {
		t.Fatal(err)
	}
	failed := <-parked
	c.check()
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	c.start()
	c.compare(failed, failed+4*blockSize)
	c.mustWrite(failed, 4*blockSize)
	c.compare(0, 0)
	if err := c.server.close(); err != nil {
		t.Fatal(err)
	}
	c.check()
}

// TestFullDiskMerge merges into a base, full of holes, on a full filesystem.
func TestFullDiskMerge(t *testing.T) {
	c := newFullCase(t)
	for off := int64(0); off < 8<<20; off += 1 << 20 {
		c.mustWrite(off, 128<<10)
	}
	if err := c.server.close(); err != nil {
		t.Fatal(err)
	}
	c.bringBase()
	ballast := fill(t, c.dir)
	out, err := c.merge()
	if err == nil || !strings.Contains(out, "no space") {
		t.Fatalf("merge without room: %v\n%s", err, out)
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	if out, err := c.merge(); err != nil {
		t.Fatalf("merge taken up again: %v\n%s", err, out)
	}
	c.checkMerged()
}

// bringBase copies the base to the filesystem of the store, with its times and
// holes, and goes on with the copy.
func (c *fullCase) bringBase() {
	c.t.Helper()
	base := filepath.Join(c.dir, "base")
	if out, err := command(patience, "cp", "-p", "--sparse=always", c.base, base); err != nil {
		c.t.Fatalf("cp: %v\n%s", err, out)
	}
	c.base = base
}

// merge runs `cowdev merge`, in place.
func (c *fullCase) merge() (out string, err error) {
	return command(patience, program, "merge", "--quiet", "--format=raw", "--base-digest=sample", c.base, c.store)
}

// checkMerged holds the base against the device's content, and checks the store.
func (c *fullCase) checkMerged() {
	c.t.Helper()
	p, err := os.ReadFile(c.base)
	if err != nil {
		c.t.Fatal(err)
	}
	if at := differs(p, c.content); at >= 0 {
		c.t.Fatalf("sector %d of the merged base reads as %s, was written as %s", at, describe(p, at), describe(c.content, at))
	}
	c.check()
}

// written returns the bytes that were ever written to the disk of the case's
// filesystem, of which nothing is left to be written.
func (c *fullCase) written() int64 {
	c.t.Helper()
	if out, err := command(patience, "sync", "-f", c.dir); err != nil {
		c.t.Fatalf("sync: %v\n%s", err, out)
	}
	source, err := command(patience, "findmnt", "-n", "-o", "SOURCE", c.dir)
	if err != nil {
		c.t.Fatalf("findmnt: %v\n%s", err, source)
	}
	stat, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(strings.TrimSpace(source)), "stat"))
	if err != nil {
		c.t.Fatal(err)
	}
	const sectorsWritten = 6 // Documentation/block/stat.rst
	n, err := strconv.ParseInt(strings.Fields(string(stat))[sectorsWritten], 10, 64)
	if err != nil {
		c.t.Fatal(err)
	}
	return n * 512
}
