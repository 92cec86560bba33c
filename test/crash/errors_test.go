package crash

// The real program over files that fail: an error harms the request that met
// it and no other (9), calls that do part of their work or are interrupted
// harm none, and after a failed sync the store says that it is broken.

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/cowdev/cowdev/block"
	"github.com/cowdev/cowdev/exception"
	"github.com/cowdev/cowdev/internal/crash"
	"github.com/cowdev/cowdev/internal/disktest"
)

// A failingCase is a server whose base and store are seen through FUSE.
type failingCase struct {
	t         *testing.T
	base, cow *disktest.File
	paths     [2]string
	dir       string
	server    *server
	known

	baseFault, cowFault atomic.Pointer[injection]
}

type injection func(disktest.Op) disktest.Fault

func newFailingCase(t *testing.T) *failingCase {
	m := newMount(t)
	c := &failingCase{t: t, dir: shortDir(t), known: newKnown(1 << 20)}
	crash.Stamp(c.content, 0, c.stamp)
	c.base, c.cow = disktest.FromBytes(1, c.content), disktest.New(1)
	c.paths = [2]string{m.show(c.base), m.show(c.cow)}
	geo := block.Geometry{Size: int64(len(c.content)), ChunkSize: 16 << 10}
	if err := exception.Create(c.cow, exception.Params{Geometry: geo, Base: identityOf(t, c.paths[0])}); err != nil {
		t.Fatal(err)
	}
	c.base.Inject, c.cow.Inject = injected(&c.baseFault), injected(&c.cowFault)
	c.start()
	t.Cleanup(func() {
		c.server.kill()
		c.server.wait()
	})
	return c
}

func injected(by *atomic.Pointer[injection]) injection {
	return func(op disktest.Op) disktest.Fault {
		if f := by.Load(); f != nil {
			return (*f)(op)
		}
		return disktest.Fault{}
	}
}

func (c *failingCase) start() {
	c.t.Helper()
	var err error
	if c.server, err = serve(c.dir, "--existing", "--format=raw", "--base-digest=sample", c.paths[0], c.paths[1]); err != nil {
		c.t.Fatal(err)
	}
	if c.dev, err = c.server.dial(); err != nil {
		c.t.Fatal(err)
	}
}

func (c *failingCase) must(err error) {
	c.t.Helper()
	if err != nil {
		c.t.Fatal(err)
	}
}

// mustFail expects EIO.
func (c *failingCase) mustFail(what string, err error) {
	c.t.Helper()
	if !errors.Is(err, syscall.EIO) {
		c.t.Fatalf("%s: %v, expected EIO", what, err)
	}
}

func (c *failingCase) read(off int64, n int) error {
	c.t.Helper()
	p := make([]byte, n)
	if _, err := c.dev.ReadAt(p, off); err != nil {
		return err
	}
	if at := differs(p, c.content[off:][:n]); at >= 0 {
		c.t.Fatalf("sector %d from %d reads as %s, expected %s", at, off, describe(p, at), describe(c.content[off:], at))
	}
	return nil
}

// failAt makes each operation of a kind that touches [off, off+n) fail.
func failAt(kind disktest.Kind, off, n int64) *injection {
	f := injection(func(op disktest.Op) disktest.Fault {
		if op.Kind == kind && op.Off < off+n && op.Off+op.Len > off {
			return disktest.Fault{Err: syscall.EIO}
		}
		return disktest.Fault{}
	})
	return &f
}

const everywhere = 1 << 60

func TestErrorsHarmTheirRequest(t *testing.T) {
	c := newFailingCase(t)
	// A bad sector of the base.
	c.baseFault.Store(failAt(disktest.Read, 512<<10, 512))
	c.mustFail("read of a bad sector of the base", c.read(512<<10, 4096))
	c.mustFail("write of a part of its block", c.write(512<<10, 100))
	c.must(c.read(0, 256<<10))
	c.must(c.read(513<<10, 4096))
	c.must(c.write(512<<10, 4096)) // the block as a whole needs nothing of it
	c.must(c.read(512<<10, 4096))
	c.baseFault.Store(nil)
	c.must(c.read(0, len(c.content)))

	// The store cannot be read, then written.
	c.must(c.dev.Flush())
	c.cowFault.Store(failAt(disktest.Read, 0, everywhere))
	c.mustFail("read of a block that the store has", c.read(512<<10, 4096))
	c.must(c.read(0, 256<<10))
	c.cowFault.Store(failAt(disktest.Write, 0, everywhere))
	c.mustFail("write", c.write(0, 8192))
	c.must(c.read(0, 256<<10))
	c.cowFault.Store(nil)
	c.must(c.write(0, 8192))
	c.must(c.dev.Flush())
	c.must(c.read(0, len(c.content)))
	c.must(c.server.close())
	c.start()
	c.must(c.read(0, len(c.content)))
}

// TestInterruptedCalls: each second call of the server on its files is
// interrupted before it has done anything, or in the middle: it reads or
// writes less than it was asked to.
func TestInterruptedCalls(t *testing.T) {
	c := newFailingCase(t)
	var interrupted, short atomic.Int64
	fault := func() *injection {
		var n atomic.Uint64
		f := injection(func(op disktest.Op) disktest.Fault {
			k := n.Add(1)
			if k%2 == 0 || op.Kind == disktest.Sync || op.Kind == disktest.Truncate {
				return disktest.Fault{}
			}
			f := disktest.Fault{Err: syscall.EINTR}
			if k%4 == 1 && op.Len > disktest.SectorSize && (op.Kind == disktest.Read || op.Kind == disktest.Write) {
				f.Done = op.Len / 2 / disktest.SectorSize * disktest.SectorSize
			}
			if f.Done > 0 {
				short.Add(1)
			} else {
				interrupted.Add(1)
			}
			return f
		})
		return &f
	}
	c.baseFault.Store(fault())
	c.cowFault.Store(fault())
	rng := rand.New(rand.NewPCG(1, 1))
	for i := range 200 {
		off := rng.Int64N(1<<20-70000) / 512 * 512
		switch n := 512 * (1 + rng.IntN(128)); rng.IntN(4) {
		case 0:
			c.must(c.read(off, n))
		case 1:
			c.must(c.dev.Trim(off, int64(n)))
			clear(c.content[off:][:n])
		default:
			c.must(c.write(off, n))
		}
		if i%8 == 0 {
			c.must(c.dev.Flush())
		}
	}
	c.must(c.read(0, len(c.content)))
	c.must(c.server.close())
	c.start()
	c.must(c.read(0, len(c.content)))
	if short.Load() < 20 || interrupted.Load() < 20 {
		t.Errorf("%d calls were cut short and %d interrupted, expected many", short.Load(), interrupted.Load())
	}
	t.Logf("%d calls cut short, %d interrupted", short.Load(), interrupted.Load())
}

// TestFailedSyncIsTold: after a failed sync nothing is written any more, what
// is known to be on the disk can be read, `info` says so, and so does the log.
func TestFailedSyncIsTold(t *testing.T) {
	c := newFailingCase(t)
	c.must(c.write(0, 256<<10))
	c.must(c.dev.Flush())
	durable := bytes.Clone(c.content)
	c.must(c.write(512<<10, 256<<10))
	c.cowFault.Store(failAt(disktest.Sync, -1, everywhere))
	c.mustFail("flush", c.dev.Flush())
	c.cowFault.Store(nil)
	c.mustFail("second flush", c.dev.Flush())
	c.mustFail("write", c.write(0, 4096))
	c.mustFail("read of what was not synced", c.read(512<<10, 4096))
	c.must(c.read(0, 256<<10))
	c.must(c.read(256<<10, 256<<10))
	if !strings.Contains(c.server.stderr(), "nothing more is written") {
		t.Errorf("the log does not tell of it:\n%s", c.server.stderr())
	}
	if out, err := command(patience, program, "info", c.paths[1]); err != nil || !strings.Contains(out, "BROKEN since a sync failed") {
		t.Errorf("info does not tell that the store is broken: %v\n%s", err, out)
	}
	c.server.kill()
	c.must(c.server.wait())
	c.start()
	c.content = durable
	c.must(c.read(0, 512<<10))
	c.must(c.write(512<<10, 256<<10)) // the rest of it may be old or new
	c.must(c.dev.Flush())
	c.must(c.read(0, len(c.content)))
	if out, err := command(patience, program, "info", c.paths[1]); err != nil || strings.Contains(out, "BROKEN") {
		t.Errorf("info of the store that was served anew: %v\n%s", err, out)
	}
}

// TestTruncated cuts the base, and then the store, under a server that has
// them mapped: what is gone is an error, or ends that client's connection
// after the header of the reply; the server lives on and all else is read.
func TestTruncated(t *testing.T) {
	dir := shortDir(t)
	c := &failingCase{t: t, dir: dir, known: newKnown(8 << 20), paths: [2]string{filepath.Join(dir, "base"), filepath.Join(dir, "cow")}}
	crash.Stamp(c.content, 0, crash.BaseStamp)
	c.must(os.WriteFile(c.paths[0], c.content, 0o600))
	if out, err := command(patience, program, "create", "--format=raw", c.paths[0], c.paths[1]); err != nil {
		t.Fatalf("create: %v\n%s", err, out)
	}
	c.start()
	t.Cleanup(func() { c.server.kill(); c.server.wait() })
	c.must(c.write(0, 1<<20))
	c.must(c.dev.Flush())
	c.must(c.read(0, len(c.content))) // all of it is resident, and proven to be
	gone := func(what string, path string, size, off int64) {
		t.Helper()
		c.must(os.Truncate(path, size))
		for _, n := range []int{1, 512, 4096, 64 << 10, 512 << 10} {
			d, err := c.server.dial()
			c.must(err)
			p := make([]byte, n)
			if _, err := d.ReadAt(p, off); err == nil {
				t.Fatalf("%d bytes of %s are read after it was cut: %s", n, what, describe(p, 0))
			}
			d.c.Close()
		}
		select {
		case <-c.server.exited:
			t.Fatalf("the server did not live on after %s was cut:\n%s", what, c.server.stderr())
		default:
		}
	}
	gone("the base", c.paths[0], 4<<20, 5<<20)
	c.must(c.read(0, 4<<20))
	gone("the store", c.paths[1], 512<<10, 0)
	c.must(c.read(1<<20, 3<<20))
}
