package crash

// What walks have found once in millions of states, made certain.

import (
	"bytes"
	"io"
	"math/rand/v2"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/cowdev/cowdev/block"
	"github.com/cowdev/cowdev/exception"
	"github.com/cowdev/cowdev/internal/disktest"
)

// TestFoundFailedSyncWithoutWord lets each sync of a session fail in turn,
// with no memory to leave word in, and cuts the power in each step of the next
// session's first change. A store must be left.
func TestFoundFailedSyncWithoutWord(t *testing.T) {
	for seed := range uint64(3) {
		for n := 1; ; n++ {
			f, failed := failSync(t, seed, n)
			if !failed {
				break
			}
			cutNextSession(t, f, rand.New(rand.NewPCG(seed, uint64(n))))
		}
	}
}

// failSync changes a new store, closes it with the nth sync failing, and
// returns the file for the next process and whether there was an nth sync.
func failSync(t *testing.T, seed uint64, n int) (f *disktest.File, failed bool) {
	f = disktest.New(seed)
	if err := exception.Create(f, exception.Params{Geometry: block.Geometry{Size: 16384, ChunkSize: 8192}, LogSize: 32 << 10}); err != nil {
		t.Fatal(err)
	}
	s, dev, err := open(make([]byte, 16384), f, exception.Options{})
	if err != nil {
		t.Fatal(err)
	}
	f.Inject = disktest.FailNth(n, disktest.Fault{Err: syscall.EIO}, func(op disktest.Op) bool { return op.Kind == disktest.Sync })
	_, werr := dev.WriteAt(make([]byte, 512), 0)
	cerr := s.Close()
	return f.Kill(nil), werr != nil || cerr != nil
}

// cutNextSession opens the store in f, changes it, and cuts the power on
// copies in each step.
func cutNextSession(t *testing.T, f *disktest.File, rng *rand.Rand) {
	base := make([]byte, 16384)
	s, dev, err := open(base, f, exception.Options{})
	if err != nil {
		t.Fatal(err)
	}
	f.OnStep = func(op disktest.Op, phase disktest.Phase) {
		if op.Kind == disktest.Read {
			return
		}
		for range 10 {
			left, _, err := open(base, f.Crash(rng), exception.Options{})
			if err != nil {
				t.Fatalf("power cut in %v, %v: %v", op, phase, err)
			}
			left.Abandon()
		}
	}
	if _, err := dev.WriteAt(make([]byte, 512), 0); err != nil {
		t.Fatal(err)
	}
	f.OnStep = nil
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestFoundFailedSyncToldOnce lets the sync of a checkpoint fail while a commit
// that relies on the same sync's data is on its way. A system tells of lost
// data once to each opening of a file: the commit must learn of it too.
func TestFoundFailedSyncToldOnce(t *testing.T) {
	const size = 64 << 10
	f := disktest.New(1)
	if err := exception.Create(f, exception.Params{Geometry: block.Geometry{Size: size, ChunkSize: 8192}, LogSize: 64 << 10}); err != nil {
		t.Fatal(err)
	}
	s, dev, err := open(make([]byte, size), f, exception.Options{})
	if err != nil {
		t.Fatal(err)
	}
	write := func(n int, off int64) {
		if _, err := dev.WriteAt(bytes.Repeat([]byte{1}, n), off); err != nil {
			t.Error(err)
		}
	}
	// Enough records for a checkpoint, each durable by itself.
	var armed, once atomic.Bool
	told := make(chan error, 1)
	f.Inject = func(op disktest.Op) disktest.Fault {
		if op.Kind == disktest.Sync && armed.CompareAndSwap(true, false) {
			write(40<<10, 24<<10) // too much for the log: a commit must sync it in place
			return disktest.Fault{Err: syscall.EIO}
		}
		return disktest.Fault{}
	}
	f.OnFailed = func() {
		if once.CompareAndSwap(false, true) {
			told <- dev.Flush()
		}
	}
	write(512, 0)
	armed.Store(true)
	for range 5 { // records of 4 KiB: one more than a checkpoint waits for
		write(512, 0)
		if err := dev.Flush(); err != nil {
			break // the checkpoint has failed by now
		}
	}
	select {
	case err := <-told:
		if err == nil {
			t.Error("power cut in what a flush relied on: it succeeded, and the failed sync of the checkpoint may have lost its data")
		}
	case <-time.After(time.Minute):
		t.Fatal("no checkpoint synced")
	}
	s.Abandon()
}

// TestFoundBaseSetAfterDeath lets a process die at each step of a session's
// begin, and cuts the power while the next one, which has not begun its own,
// records the base's identity. What the dead one wrote of the superblocks may be
// in the page cache alone: the other copy is the only one until it is durable.
func TestFoundBaseSetAfterDeath(t *testing.T) {
	base := make([]byte, 16384)
	f := disktest.New(1)
	if err := exception.Create(f, exception.Params{Geometry: block.Geometry{Size: 16384, ChunkSize: 8192}, LogSize: 32 << 10}); err != nil {
		t.Fatal(err)
	}
	mem := NewMemory()
	s, dev, err := open(base, f, exception.Options{Memory: mem})
	if err != nil {
		t.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(1, 2))
	deaths := 0
	f.OnStep = func(op disktest.Op, phase disktest.Phase) {
		if op.Kind != disktest.Read {
			deaths++
			var left *Memory
			g := f.Fork(func() { left = mem.Copy() })
			cutSetBase(t, g, left, rng)
		}
	}
	for range 2 {
		if _, err := dev.WriteAt(make([]byte, 512), 0); err != nil {
			t.Fatal(err)
		}
	}
	f.OnStep = nil
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if deaths == 0 {
		t.Fatal("no step to die in")
	}
}

// cutSetBase opens the store in f, sets its base, and cuts the power on copies in
// each step.
func cutSetBase(t *testing.T, f *disktest.File, mem *Memory, rng *rand.Rand) {
	base := make([]byte, 16384)
	s, _, err := open(base, f, exception.Options{Memory: mem})
	if err != nil {
		t.Fatal(err)
	}
	f.OnStep = func(op disktest.Op, phase disktest.Phase) {
		if op.Kind == disktest.Read {
			return
		}
		for range 20 {
			left, _, err := open(base, f.Crash(rng), exception.Options{})
			if err != nil {
				t.Fatalf("power cut in %v, %v: %v", op, phase, err)
			}
			left.Abandon()
		}
	}
	if err := s.SetBase([]byte("another")); err != nil {
		t.Fatal(err)
	}
	f.OnStep = nil
	s.Abandon()
}

// TestFoundRepairAfterDeath lets a process die while it writes a superblock, the
// other go bad, and cuts the power while that is repaired. The good one may be in
// the page cache alone.
func TestFoundRepairAfterDeath(t *testing.T) {
	base := make([]byte, 16384)
	f := disktest.New(1)
	if err := exception.Create(f, exception.Params{Geometry: block.Geometry{Size: 16384, ChunkSize: 8192}, LogSize: 32 << 10}); err != nil {
		t.Fatal(err)
	}
	s, dev, err := open(base, f, exception.Options{})
	if err != nil {
		t.Fatal(err)
	}
	var dead *disktest.File
	f.OnStep = func(op disktest.Op, phase disktest.Phase) {
		if dead == nil && op.Kind == disktest.Write && op.Off == 64<<10 && phase == disktest.Applied {
			dead = f.Fork(nil)
		}
	}
	if _, err := dev.WriteAt(make([]byte, 512), 0); err != nil {
		t.Fatal(err)
	}
	f.OnStep = nil
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	dead.Poke([]byte("bad"), 0)
	rep, err := exception.Check(dead)
	if err != nil {
		t.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(1, 2))
	writes := false
	dead.OnStep = func(op disktest.Op, phase disktest.Phase) {
		writes = writes || op.Kind == disktest.Write
		if !writes || op.Kind == disktest.Read {
			return // before, no copy may be good
		}
		for range 20 {
			left, _, err := open(base, dead.Crash(rng), exception.Options{})
			if err != nil {
				t.Fatalf("power cut in %v, %v: %v", op, phase, err)
			}
			left.Abandon()
		}
	}
	done, err := exception.Repair(dead, rep, io.Discard)
	if err != nil || len(done) != 1 {
		t.Fatalf("repaired: %v, %v", done, err)
	}
}
