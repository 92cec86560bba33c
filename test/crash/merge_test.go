package crash

// `cowdev merge` of the real program, with base and store seen through FUSE:
// at each step of it the power is cut, on copies, for both at once. Whatever
// is left, the device reads as before through the overlay, and a merge that is
// taken up again gives a base that reads so (8).

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/cowdev/cowdev/block"
	"github.com/cowdev/cowdev/cow"
	"github.com/cowdev/cowdev/exception"
	"github.com/cowdev/cowdev/image"
	"github.com/cowdev/cowdev/internal/crash"
	"github.com/cowdev/cowdev/internal/disktest"
	"github.com/cowdev/cowdev/merge"
)

func TestMerge(t *testing.T) {
	m := newMount(t)
	rounds, limit := 4, 3*time.Second
	if long() {
		rounds, limit = 1<<62, campaignTime(t)/4
	}
	begin, states := time.Now(), 0
	for n := 0; n < rounds && time.Since(begin) < limit; n++ {
		states += mergeOnce(t, m, firstSeed()+uint64(n))
	}
	t.Logf("%d states in %.1fs", states, time.Since(begin).Seconds())
}

// A merging is a base and a store in the middle of a merge.
type merging struct {
	base, cow *disktest.File
	want      []byte // the device

	mu     sync.Mutex
	rng    *rand.Rand
	states int
	failed error
}

// mergeOnce merges a store of random changes, and returns the number of states
// it looked at.
func mergeOnce(t *testing.T, m *mount, seed uint64) int {
	g := &merging{rng: rand.New(rand.NewPCG(seed, 8))}
	basePath, cowPath := g.prepare(t, m, seed)
	g.base.OnStep, g.cow.OnStep = g.step, g.step
	out, err := command(patience, program, "merge", "--quiet", "--format=raw", "--base-digest=sample", basePath, cowPath)
	g.base.OnStep, g.cow.OnStep = nil, nil
	if g.failed != nil {
		t.Fatalf("seed %d: %v", seed, g.failed)
	}
	if err != nil {
		t.Fatalf("seed %d: merge: %v\n%s", seed, err, out)
	}
	if !bytes.Equal(g.base.Bytes(), g.want) {
		t.Fatalf("seed %d: the merged base is not what the device was", seed)
	}
	return g.states
}

// prepare makes a base and a store of some changes, and returns their paths.
func (g *merging) prepare(t *testing.T, m *mount, seed uint64) (basePath, cowPath string) {
	geo := block.Geometry{Size: 5*block.MinChunkSize - g.rng.Int64N(2)*700, ChunkSize: block.MinChunkSize}
	content := make([]byte, geo.Size)
	crash.Stamp(content, 0, crash.BaseStamp)
	g.base, g.cow = disktest.FromBytes(seed, content), disktest.New(seed)
	basePath = m.show(g.base)
	if err := exception.Create(g.cow, exception.Params{Geometry: geo, LogSize: 32 << 10, Base: identityOf(t, basePath)}); err != nil {
		t.Fatal(err)
	}
	f := g.cow.Fork(nil)
	s, err := exception.Open(f, exception.Options{})
	if err != nil {
		t.Fatal(err)
	}
	dev := cow.New(device(content), s, cow.Options{})
	for id := range uint64(12) {
		off := g.rng.Int64N(geo.Size)
		n := min(1+g.rng.Int64N(4000), geo.Size-off)
		p := make([]byte, n)
		if g.rng.IntN(3) > 0 {
			crash.Stamp(p, off, id+2)
			_, err = dev.WriteAt(p, off)
		} else {
			err = dev.Trim(off, n)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	g.want = make([]byte, geo.Size)
	if _, err := dev.ReadAt(g.want, 0); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	g.cow = f.Kill(nil)
	return basePath, m.show(g.cow)
}

// identityOf returns the identity of the base at path, for a store.
func identityOf(t *testing.T, path string) []byte {
	b, err := image.Open(path, image.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	id, err := b.Identify(image.DigestSample)
	if err != nil {
		t.Fatal(err)
	}
	return id.Encode()
}

// step cuts the power on copies of both files.
func (g *merging) step(op disktest.Op, phase disktest.Phase) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if op.Kind == disktest.Read || g.failed != nil {
		return
	}
	for range 4 {
		var store *disktest.File
		base := g.base.Fork(func() { store = g.cow.Crash(g.rng) }).Crash(g.rng)
		g.states++
		if err := g.look(base, store); err != nil {
			g.failed = fmt.Errorf("power cut in %v, %v: %w", op, phase, err)
			return
		}
	}
}

// look compares the device of a base and its store with what it was, takes the
// merge up again if it had begun, or sometimes if not, and compares the base.
func (g *merging) look(base, store *disktest.File) error {
	s, err := exception.Open(store, exception.Options{})
	if err != nil {
		return fmt.Errorf("open: %w", err)
	}
	defer s.Abandon()
	p := make([]byte, len(g.want))
	if _, err := cow.New(device(base.Bytes()), s, cow.Options{}).ReadAt(p, 0); err != nil {
		return err
	}
	if at := differs(p, g.want); at >= 0 {
		return fmt.Errorf("through the overlay, in state %v, sector %d reads as %s, was %s", s.Header().State, at, describe(p, at), describe(g.want, at))
	}
	if g.rng.IntN(4) > 0 {
		return nil
	}
	err = merge.Into(context.Background(), base, s, merge.Options{Identify: func() ([]byte, error) { return nil, nil }})
	if err != nil && !errors.Is(err, syscall.ENOSPC) {
		return fmt.Errorf("merge taken up again: %w", err)
	}
	p = base.Bytes()
	if at := differs(p, g.want); err == nil && at >= 0 {
		return fmt.Errorf("merge taken up again: sector %d of the base reads as %s, was %s", at, describe(p, at), describe(g.want, at))
	}
	return nil
}

// device is an image in memory.
type device []byte

func (d device) Size() int64 { return int64(len(d)) }

func (d device) ReadAt(p []byte, off int64) (int, error) {
	return bytes.NewReader(d).ReadAt(p, off)
}

// differs returns the first sector in which two images differ, or -1.
func differs(p, q []byte) int {
	for s := 0; s*disktest.SectorSize < len(p); s++ {
		if !bytes.Equal(sector(p, s), sector(q, s)) {
			return s
		}
	}
	return -1
}

func sector(p []byte, s int) []byte {
	return p[s*disktest.SectorSize : min((s+1)*disktest.SectorSize, len(p))]
}

func describe(p []byte, s int) string { return crash.Describe(sector(p, s)) }
