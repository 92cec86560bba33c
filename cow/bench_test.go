package cow_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/cowdev/cowdev/block"
	"github.com/cowdev/cowdev/cow"
	"github.com/cowdev/cowdev/exception"
	"github.com/cowdev/cowdev/image"
	"github.com/cowdev/cowdev/internal/disk"
)

// benchSize is the size of the device that is measured, in bytes.
const benchSize = 256 << 20

// newBench returns a device as a server would open it, over a sparse base.
func newBench(b *testing.B) *cow.Device {
	b.Helper()
	dir := b.TempDir()
	path := filepath.Join(dir, "base")
	if err := os.WriteFile(path, []byte("base"), 0o644); err != nil {
		b.Fatal(err)
	}
	if err := os.Truncate(path, benchSize); err != nil {
		b.Fatal(err)
	}
	origin, err := image.Open(path, image.Options{})
	if err != nil {
		b.Fatal(err)
	}
	f, err := disk.OpenOS(filepath.Join(dir, "store"), os.O_RDWR|os.O_CREATE)
	if err != nil {
		b.Fatal(err)
	}
	geo := block.Geometry{Size: benchSize, ChunkSize: block.DefaultChunkSize}
	s, view := newStore(b, f, exception.Params{Geometry: geo})
	d := cow.New(origin, s, cow.Options{View: view})
	b.Cleanup(func() {
		d.Close()
		s.Close()
		origin.Close()
	})
	return d
}

// offset returns where the i-th of n-byte requests goes: every place once,
// and none beside the one before.
func offset(i int, n int64) int64 {
	const stride = 40503 // prime
	return int64(i) * stride % (benchSize / n) * n
}

func BenchmarkWriteFirst(b *testing.B) {
	d := newBench(b)
	p := []byte{1<<12 - 1: 1}
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		if _, err := d.WriteAt(p, offset(i, int64(len(p)))); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkOverwrite(b *testing.B) {
	d := newBench(b)
	p := []byte{1<<12 - 1: 1}
	const blocks = 4096
	for i := range blocks {
		d.WriteAt(p, offset(i, int64(len(p))))
	}
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		if _, err := d.WriteAt(p, offset(i%blocks, int64(len(p)))); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkTrim1M(b *testing.B) {
	d := newBench(b)
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		if err := d.Trim(offset(i, 1<<20), 1<<20); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkView(b *testing.B) {
	d := newBench(b)
	p := []byte{1<<12 - 1: 1}
	for i := range 4096 {
		d.WriteAt(p, offset(i, int64(len(p))))
	}
	s := d.Session()
	defer s.Close()
	vecs := make([][]byte, 0, 8)
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		s.View(vecs[:0], offset(i%4096, int64(len(p))), int64(len(p)))
		if i%16 == 15 {
			s.Done()
		}
	}
}

func BenchmarkFlush(b *testing.B) {
	d := newBench(b)
	p := []byte{1<<12 - 1: 1}
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		d.WriteAt(p, offset(i, int64(len(p))))
		if err := d.Flush(); err != nil {
			b.Fatal(err)
		}
	}
}
