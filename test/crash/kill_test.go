package crash

// kill -9 of the real server, on a real filesystem, in the middle of what
// several connections do: the next one has everything that was acknowledged,
// flushed or not (3b), wherever the killed one stood.

import (
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cowdev/cowdev/internal/crash"
	"github.com/cowdev/cowdev/internal/disktest"
)

func TestKill(t *testing.T) {
	const connections = 3
	rounds := 20
	if long() {
		rounds = 300
	}
	dir := shortDir(t)
	base, store := filepath.Join(dir, "base"), filepath.Join(dir, "cow")
	content := make([]byte, 1<<20)
	crash.Stamp(content, 0, crash.BaseStamp)
	if err := os.WriteFile(base, content, 0o600); err != nil {
		t.Fatal(err)
	}
	oracle := crash.NewOracle(content)
	oracle.Torn = true
	var stamp, ops atomic.Uint64
	stamp.Store(crash.BaseStamp)

	begin, done := time.Now(), 0
	for ; done < rounds && (long() || time.Since(begin) < 8*time.Second); done++ {
		s, err := serve(dir, "--chunk-size=8K", "--format=raw", base, store)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(s.kill)
		found(t, s, oracle, done)
		var all sync.WaitGroup
		for i := range connections {
			w := &worker{t: t, oracle: oracle, stamp: &stamp, ops: &ops, rng: rand.New(rand.NewPCG(firstSeed()+uint64(done), uint64(i)))}
			if w.dev, err = s.dial(); err != nil {
				t.Fatal(err)
			}
			all.Go(w.run)
		}
		target := ops.Load() + 20 + rand.Uint64N(300)
		waitFor(t, "operations", func() bool { return ops.Load() >= target || t.Failed() })
		oracle.While(func() {
			s.kill()
			oracle.Die()
		})
		all.Wait()
		if err := s.wait(); err != nil {
			t.Fatal(err)
		}
	}
	s, err := serve(dir, "--format=raw", base, store)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.kill)
	found(t, s, oracle, done)
	if err := s.close(); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d kills, %d operations in %.1fs", done, ops.Load(), time.Since(begin).Seconds())
}

// shortDir returns a new directory whose path leaves room for a socket's name.
func shortDir(t *testing.T) string {
	dir, err := os.MkdirTemp("", "cowdev-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// waitFor waits until a condition holds.
func waitFor(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !holds(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("no %s within %v", what, patience)
		}
	}
}

// found reads the device after a death of the process and tells the oracle.
func found(t *testing.T, s *server, o *crash.Oracle, round int) {
	t.Helper()
	dev, err := s.dial()
	if err != nil {
		t.Fatal(err)
	}
	defer dev.c.Close()
	p := make([]byte, o.Size())
	if _, err := dev.ReadAt(p, 0); err != nil {
		t.Fatal(err)
	}
	if err := o.Check(p, crash.Process); err != nil {
		t.Fatalf("round %d: %v", round, err)
	}
	o.Found(p, crash.Process)
}

// A worker changes the device over its own connection until that ends.
type worker struct {
	t          *testing.T
	dev        *nbdDevice
	oracle     *crash.Oracle
	stamp, ops *atomic.Uint64
	rng        *rand.Rand
}

func (w *worker) run() {
	defer w.dev.c.Close()
	for w.one() == nil {
		w.ops.Add(1)
	}
}

// one does one thing. Its error is the connection's end.
func (w *worker) one() error {
	const sector = disktest.SectorSize
	n := sector * (1 + w.rng.Int64N(40))
	off := w.rng.Int64N((w.oracle.Size()-n)/sector) * sector / 8 // near the beginning, so that they meet
	off = off / sector * sector
	switch k := w.rng.IntN(100); {
	case k < 60:
		p := make([]byte, n)
		crash.Stamp(p, off, w.stamp.Add(1))
		return w.change(p, off, func() error { _, err := w.dev.WriteAt(p, off); return err })
	case k < 75:
		return w.change(make([]byte, n), off, func() error { return w.dev.Trim(off, n) })
	case k < 85:
		f := w.oracle.Flush()
		err := w.dev.Flush()
		f.Done(err)
		return err
	}
	p := make([]byte, n)
	r := w.oracle.Reading()
	if _, err := w.dev.ReadAt(p, off); err != nil {
		r.Done(nil, off)
		return err
	}
	if err := r.Done(p, off); err != nil {
		w.t.Error(err)
		return err
	}
	return nil
}

func (w *worker) change(p []byte, off int64, do func() error) error {
	c, ok := w.oracle.Write(p, off)
	if !ok {
		return nil
	}
	err := do()
	c.Done(err)
	return err
}
