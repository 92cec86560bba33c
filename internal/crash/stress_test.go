package crash

// The live device on a real file, with everything at once: changes and
// flushes of many goroutines, reads by copy and by views of the mapped files
// that are looked at late, slots given up, punched and taken again all the
// time. The rule is the oracle's: a sector reads as a version that was not
// out when the read began, or as one that began before the read ended; while
// one of them is under way, as a mixture.

import (
	"bytes"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cowdev/cowdev/block"
	"github.com/cowdev/cowdev/cow"
	"github.com/cowdev/cowdev/exception"
	"github.com/cowdev/cowdev/image"
	"github.com/cowdev/cowdev/internal/disk"
)

// stress is a device under stress.
type stress struct {
	t      *testing.T
	dev    *cow.Device
	oracle *Oracle
	stamp  atomic.Uint64
	ops    atomic.Int64
	views  atomic.Int64
	until  time.Time
}

func TestStress(t *testing.T) {
	const chunks, workers = 12, 8
	s := newStress(t, block.Geometry{Size: chunks*block.MinChunkSize - 700, ChunkSize: block.MinChunkSize})
	limit, most := 2*time.Second, int64(60_000)
	if os.Getenv("COWDEV_LONG") != "" {
		limit, most = 2*time.Minute, 1<<62
	}
	s.until = time.Now().Add(limit)
	var all sync.WaitGroup
	for i := range workers {
		all.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(i), 5))
			session := s.dev.Session()
			defer session.Close()
			for s.ops.Add(1) < most && time.Now().Before(s.until) && !t.Failed() {
				s.one(rng, session)
			}
		})
	}
	all.Wait()
	t.Logf("%d operations, %d views", s.ops.Load(), s.views.Load())
}

// newStress makes a device of mapped files.
func newStress(t *testing.T, geo block.Geometry) *stress {
	dir := t.TempDir()
	content := make([]byte, geo.Size)
	Stamp(content, 0, BaseStamp)
	if err := os.WriteFile(filepath.Join(dir, "base"), content, 0o600); err != nil {
		t.Fatal(err)
	}
	base, err := image.Open(filepath.Join(dir, "base"), image.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { base.Close() })
	f, err := disk.OpenOS(filepath.Join(dir, "cow"), os.O_RDWR|os.O_CREATE)
	if err != nil {
		t.Fatal(err)
	}
	if err := exception.Create(f, exception.Params{Geometry: geo, LogSize: 64 << 10}); err != nil {
		t.Fatal(err)
	}
	m, err := disk.NewMapping(f.File(), 64<<20)
	if err != nil {
		t.Fatal(err)
	}
	store, err := exception.Open(f, exception.Options{Interval: 10 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	s := &stress{t: t, dev: cow.New(base, store, cow.Options{View: m}), oracle: NewOracle(content)}
	s.oracle.Torn = true
	s.stamp.Store(BaseStamp)
	t.Cleanup(func() {
		if err := s.dev.Close(); err != nil {
			t.Error(err)
		}
		if err := store.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// one does one operation.
func (s *stress) one(rng *rand.Rand, session block.Session) {
	geo := s.dev.Geometry
	cs := int64(geo.ChunkSize)
	off := rng.Int64N(geo.Chunks())*cs + sectorSize*rng.Int64N(16)
	n := sectorSize * (1 + rng.Int64N(6))
	if rng.IntN(4) == 0 { // a whole chunk: a slot comes or goes
		off, n = off/cs*cs, cs
	}
	off = min(off, geo.Size-1) / sectorSize * sectorSize
	n = min(n, geo.Size-off)
	switch k := rng.IntN(100); {
	case k < 30:
		p := make([]byte, n)
		Stamp(p, off, s.stamp.Add(1))
		s.change(p, off, func() error {
			if k < 10 {
				_, err := s.dev.WriteAt(p, off)
				return err
			}
			w := []block.Write{{Data: p, Off: off}} // by the mapping, if it can be
			s.dev.WriteBatch(w)
			return w[0].Err
		})
	case k < 44:
		s.change(make([]byte, n), off, func() error { return s.dev.Trim(off, n) })
	case k < 50:
		flags := []block.ZeroFlags{0, block.NoHole}[rng.IntN(2)]
		s.change(make([]byte, n), off, func() error { return s.dev.WriteZeroes(off, n, flags) })
	case k < 55:
		f := s.oracle.Flush()
		err := s.dev.Flush()
		f.Done(err)
		s.must(err)
	case k < 75:
		p := make([]byte, n)
		r := s.oracle.Reading()
		_, err := s.dev.ReadAt(p, off)
		s.must(r.Done(p, off))
		s.must(err)
	default:
		s.view(rng, session, off, n)
	}
}

func (s *stress) change(p []byte, off int64, do func() error) {
	c, ok := s.oracle.Write(p, off)
	if !ok {
		return // a part of the last sector is being changed
	}
	err := do()
	c.Done(err)
	s.must(err)
}

// view looks at the device's bytes where they lie, some time after it was
// told where.
func (s *stress) view(rng *rand.Rand, session block.Session, off, n int64) {
	r := s.oracle.Reading()
	vecs, ok := session.View(nil, off, n)
	if !ok {
		s.must(r.Done(nil, off))
		session.Done()
		return
	}
	s.views.Add(1)
	for range rng.IntN(50) {
		runtime.Gosched()
	}
	p := bytes.Join(vecs, nil)
	session.Done()
	s.must(r.Done(p, off))
}

func (s *stress) must(err error) {
	if err != nil {
		s.t.Error(err)
	}
}
