package merge

// A merge gives the base the bytes that the device had, and however it ends
// (a crash at any step, an operation that fails, a user who interrupts it) the
// base seen through the store has them too, and merging again finishes it.

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/cowdev/cowdev/block"
	"github.com/cowdev/cowdev/cow"
	"github.com/cowdev/cowdev/exception"
	"github.com/cowdev/cowdev/image"
	"github.com/cowdev/cowdev/internal/disk"
	"github.com/cowdev/cowdev/internal/disktest"
)

const (
	chunkSize = 8 << 10
	logSize   = 64 << 10
)

var (
	oldID = []byte("the base as it was")
	newID = []byte("the base as it is")
)

// reader is a file in memory as an origin.
type reader struct {
	*disktest.File
	size int64
}

func (r reader) Size() int64 { return r.size }

// pair is a base with its store, and what the device that they make must read.
type pair struct {
	base, store *disktest.File
	want        []byte
}

// newPair makes a base of size bytes and a store that has some of everything.
func newPair(t *testing.T, seed uint64, size int) pair {
	t.Helper()
	rng := rand.New(rand.NewPCG(seed, 1))
	bytesOf := func(n int) []byte {
		p := make([]byte, n)
		for i := range p {
			p[i] = byte(rng.Uint32())
		}
		return p
	}
	p := pair{store: disktest.New(seed), want: bytesOf(size)}
	clear(p.want[size/4 : size/2])
	p.base = disktest.FromBytes(seed, p.want)
	if err := exception.Create(p.store, exception.Params{
		Geometry: block.Geometry{Size: int64(size), ChunkSize: chunkSize}, LogSize: logSize, Base: oldID,
	}); err != nil {
		t.Fatal(err)
	}
	s := p.open(t)
	d := cow.New(reader{p.base, int64(size)}, s, cow.Options{})
	for range 30 {
		n := 1 + rng.IntN(3*chunkSize)
		off := rng.IntN(size - n)
		var err error
		if rng.IntN(3) == 0 {
			clear(p.want[off : off+n])
			err = d.Trim(int64(off), int64(n))
		} else {
			copy(p.want[off:], bytesOf(n))
			_, err = d.WriteAt(p.want[off:off+n], int64(off))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	p.close(t, s)
	return p
}

// open opens the store; its file is taken up again by a later open.
func (p *pair) open(t *testing.T) *exception.Store {
	t.Helper()
	s, err := exception.Open(p.store, exception.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func (p *pair) close(t *testing.T, s *exception.Store) {
	t.Helper()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	p.store = p.store.Kill(nil)
}

// merge merges once.
func (p *pair) merge(ctx context.Context, s *exception.Store) error {
	return Into(ctx, p.base, s, Options{Identify: func() ([]byte, error) { return newID, nil }})
}

// check says what is wrong with the view of a pair after a crash or a failure,
// and with the base after merging again.
func (p *pair) check(t *testing.T) error {
	s, err := exception.Open(p.store, exception.Options{})
	if err != nil {
		return fmt.Errorf("open after: %w", err)
	}
	d := cow.New(reader{p.base, int64(len(p.want))}, s, cow.Options{})
	got := make([]byte, len(p.want))
	if _, err := d.ReadAt(got, 0); err != nil {
		return fmt.Errorf("read after: %w", err)
	}
	if i := differ(got, p.want); i >= 0 {
		return fmt.Errorf("state %v: through the store byte %d is %#x, expected %#x", s.Header().State, i, got[i], p.want[i])
	}
	if err := p.merge(context.Background(), s); err != nil {
		return fmt.Errorf("merge again: %w", err)
	}
	return p.checkMerged(s)
}

// checkMerged says what is wrong after a merge that succeeded.
func (p *pair) checkMerged(s *exception.Store) error {
	if i := differ(p.base.Bytes(), p.want); i >= 0 {
		return fmt.Errorf("merged: byte %d of the base differs", i)
	}
	for c := range s.Entries(0) {
		return fmt.Errorf("merged: chunk %d has an exception still", c)
	}
	if h := s.Header(); h.State != exception.Active || !bytes.Equal(h.Base, newID) {
		return fmt.Errorf("merged: state %v, base %q", h.State, h.Base)
	}
	return s.Close()
}

func differ(a, b []byte) int {
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return -1
}

// eitherWay runs a test of merges that copy, and one of merges that share as
// much as they can.
func eitherWay(t *testing.T, test func(t *testing.T)) {
	defer func(was struct{ least, align int64 }) { sharing = was }(sharing)
	for name, least := range map[string]int64{"copied": 1 << 40, "shared": 1} {
		sharing.least, sharing.align = least, 1
		t.Run(name, test)
	}
}

func TestInto(t *testing.T) { eitherWay(t, testInto) }

func testInto(t *testing.T) {
	for seed := range uint64(10) {
		p := newPair(t, seed, 200_000+int(seed)*777)
		s := p.open(t)
		plan := Survey(s)
		var told int64
		err := Into(context.Background(), p.base, s, Options{
			Identify: func() ([]byte, error) { return newID, nil },
			Progress: func(n int64) { told = n },
		})
		if err != nil {
			t.Fatal(err)
		}
		if told != plan.Bytes() {
			t.Errorf("seed %d: progress ended at %d of %d", seed, told, plan.Bytes())
		}
		if err := p.checkMerged(s); err != nil {
			t.Errorf("seed %d: %v", seed, err)
		}
		if pending := p.base.Pending(); pending != 0 {
			t.Errorf("seed %d: %d changes of the base are not durable", seed, pending)
		}
	}
}

// TestIntoFreesZeros: what is trimmed takes no space in the base, and what was
// a hole and is written as zeros stays one.
func TestIntoFreesZeros(t *testing.T) {
	const size = 40 * chunkSize
	data := bytes.Repeat([]byte{1}, size)
	p := pair{base: disktest.FromBytes(1, data), store: disktest.New(1)}
	if err := exception.Create(p.store, exception.Params{Geometry: block.Geometry{Size: size, ChunkSize: chunkSize}, LogSize: logSize}); err != nil {
		t.Fatal(err)
	}
	s := p.open(t)
	d := cow.New(reader{p.base, size}, s, cow.Options{KeepZeroes: true})
	if err := d.Trim(0, size/2); err != nil {
		t.Fatal(err)
	}
	if _, err := d.WriteAt(make([]byte, size/4), size/2); err != nil { // stored as data
		t.Fatal(err)
	}
	if err := p.merge(context.Background(), s); err != nil {
		t.Fatal(err)
	}
	if got := p.base.Allocated(); got != size/4 {
		t.Errorf("the base takes up %d bytes, expected %d", got, size/4)
	}
}

// TestIntoCrash takes crashes of both files at steps all over a merge.
func TestIntoCrash(t *testing.T) { eitherWay(t, testIntoCrash) }

func testIntoCrash(t *testing.T) {
	seeds, every := uint64(4), int64(3)
	switch {
	case os.Getenv("COWDEV_LONG") != "":
		seeds, every = 200, 1
	case testing.Short():
		seeds = 1
	}
	states := 0
	for seed := range seeds {
		p := newPair(t, seed, 60_000)
		s := p.open(t)
		rng := rand.New(rand.NewPCG(seed, 2))
		var step atomic.Int64
		var looking sync.Mutex
		look := func(disktest.Op, disktest.Phase) {
			step := step.Add(1)
			if step%every != 0 || !looking.TryLock() {
				return
			}
			defer looking.Unlock()
			states++
			c := pair{base: p.base.Crash(rng), store: p.store.Crash(rng), want: p.want}
			if err := c.check(t); err != nil {
				t.Errorf("seed %d, crash at step %d: %v", seed, step, err)
			}
		}
		p.base.OnStep, p.store.OnStep = look, look
		if err := p.merge(context.Background(), s); err != nil {
			t.Fatal(err)
		}
		p.base.OnStep, p.store.OnStep = nil, nil
		if err := p.checkMerged(s); err != nil {
			t.Errorf("seed %d: %v", seed, err)
		}
		if t.Failed() {
			return
		}
	}
	t.Logf("%d crash states", states)
}

// TestIntoFailures fails each operation of either file in turn, until a merge
// meets no failure.
func TestIntoFailures(t *testing.T) { eitherWay(t, testIntoFailures) }

func testIntoFailures(t *testing.T) {
	for _, which := range []string{"base", "store"} {
		for n := 1; ; n++ {
			p := newPair(t, 5, 40_000)
			s := p.open(t)
			f := p.base
			if which == "store" {
				f = p.store
			}
			hit := false
			inject := disktest.FailNth(n, disktest.Fault{Err: syscall.EIO}, func(disktest.Op) bool { return true })
			f.Inject = func(op disktest.Op) disktest.Fault {
				fault := inject(op)
				hit = hit || fault.Err != nil
				return fault
			}
			err := p.merge(context.Background(), s)
			f.Inject = nil
			if !hit {
				if err != nil {
					t.Fatalf("%s: without a failure: %v", which, err)
				}
				t.Logf("%s: %d operations", which, n-1)
				break
			}
			if err != nil && !errors.Is(err, syscall.EIO) {
				t.Errorf("%s, operation %d: %v, expected EIO", which, n, err)
			}
			// The process ends, and another one finds the files.
			p.base, p.store = p.base.Kill(nil), p.store.Kill(nil)
			if err := p.check(t); err != nil {
				t.Fatalf("%s, operation %d: %v", which, n, err)
			}
		}
	}
}

func TestIntoInterrupted(t *testing.T) {
	p := newPair(t, 3, 100_000)
	s := p.open(t)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := p.merge(ctx, s); !errors.Is(err, context.Canceled) {
		t.Fatalf("interrupted: %v", err)
	}
	if st := s.Header().State; st != exception.Merging {
		t.Fatalf("state %v, expected merging", st)
	}
	p.close(t, s)
	if err := p.check(t); err != nil {
		t.Error(err)
	}
}

func TestIntoRemoves(t *testing.T) {
	p := newPair(t, 3, 100_000)
	s := p.open(t)
	removed := false
	err := Into(context.Background(), p.base, s, Options{Remove: func() error {
		removed = true
		if p.base.Pending() != 0 {
			t.Error("the store is removed before the base is durable")
		}
		return nil
	}})
	if err != nil || !removed {
		t.Fatalf("removed %v, %v", removed, err)
	}
	if i := differ(p.base.Bytes(), p.want); i >= 0 {
		t.Errorf("byte %d of the base differs", i)
	}
}

// view makes a view of real files.
func view(t *testing.T) (v View, want []byte) {
	t.Helper()
	const size = 3<<20 + 100
	dir := t.TempDir()
	want = make([]byte, size)
	rng := rand.NewChaCha8([32]byte{9})
	rng.Read(want[:1<<20])
	basePath := filepath.Join(dir, "base.img")
	if err := os.WriteFile(basePath, want[:1<<20], 0o640); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(basePath, size); err != nil {
		t.Fatal(err)
	}
	base, err := image.Open(basePath, image.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { base.Close() })
	f, err := disk.OpenOS(filepath.Join(dir, "cow.img"), os.O_RDWR|os.O_CREATE)
	if err != nil {
		t.Fatal(err)
	}
	if err := exception.Create(f, exception.Params{Geometry: block.Geometry{Size: size, ChunkSize: block.DefaultChunkSize}, LogSize: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	s, err := exception.Open(f, exception.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	d := cow.New(base, s, cow.Options{})
	for _, at := range []int{100, 500_000, 2 << 20, size - 50} {
		n := copy(want[at:], "changed, and longer than a sector is not needed here")
		if _, err := d.WriteAt(want[at:at+n], int64(at)); err != nil {
			t.Fatal(err)
		}
	}
	clear(want[600_000:700_000])
	if err := d.Trim(600_000, 100_000); err != nil {
		t.Fatal(err)
	}
	return View{Base: base, Store: s, Device: d}, want
}

func TestTo(t *testing.T) {
	v, want := view(t)
	path := filepath.Join(t.TempDir(), "new.img")
	if err := To(context.Background(), v, path, Options{}); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(path)
	if err != nil || !bytes.Equal(got, want) {
		t.Fatalf("the new image differs at byte %d (%d bytes of %d, %v)", differ(got, want), len(got), len(want), err)
	}
	info, _ := os.Stat(path)
	if info.Mode().Perm()&0o007 != 0 {
		t.Errorf("mode %v, though the base is not for others", info.Mode())
	}
	if blocks := info.Sys().(*syscall.Stat_t).Blocks * 512; blocks > 2<<20 {
		t.Errorf("the new image takes up %d bytes: its holes were not kept", blocks)
	}
	if err := To(context.Background(), v, path, Options{}); !errors.Is(err, os.ErrExist) {
		t.Errorf("over an existing file: %v", err)
	}
}

func TestToInterrupted(t *testing.T) {
	v, _ := view(t)
	dir := t.TempDir()
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := To(ctx, v, filepath.Join(dir, "new.img"), Options{}); !errors.Is(err, context.Canceled) {
		t.Errorf("interrupted: %v", err)
	}
	if names, _ := os.ReadDir(dir); len(names) != 0 {
		t.Errorf("left behind: %v", names)
	}
}

// TestCopier reads and writes where the kernel does not copy by itself.
func TestCopier(t *testing.T) {
	v, _ := view(t)
	out, err := disk.OpenTemp(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	c := copier{from: v.Base, to: out, inUser: true, buf: make([]byte, batchSize)}
	if err := c.copy(context.Background(), 1000, 2<<20); err != nil {
		t.Fatal(err)
	}
	got, want := make([]byte, 2<<20), make([]byte, 2<<20)
	out.ReadAt(got, 1000)
	v.Base.ReadAt(want, 1000)
	if !bytes.Equal(got, want) {
		t.Error("the copy differs")
	}
}
