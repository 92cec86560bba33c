package disk

// A mapping hands out the file's bytes, only those that are proven readable,
// and forgets its proofs.

import (
	"bytes"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// mapTest maps a file of n random bytes by a mapping of size bytes.
func mapTest(t testing.TB, n int, size int64) (*Mapping, *OS, []byte) {
	t.Helper()
	o, err := OpenOS(filepath.Join(t.TempDir(), "f"), os.O_RDWR|os.O_CREATE)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { o.Close() })
	data := make([]byte, n)
	rng := rand.NewChaCha8([32]byte{1})
	rng.Read(data)
	if _, err := o.WriteAt(data, 0); err != nil {
		t.Fatal(err)
	}
	m, err := NewMapping(o.File(), size)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	return m, o, data
}

func TestViewIsTheFile(t *testing.T) {
	const n = 3<<20 + 1234
	m, _, data := mapTest(t, n, n)
	if !m.asks {
		t.Skip("the kernel does not tell what is in memory")
	}
	for _, r := range [][2]int64{{0, n}, {0, 1}, {n - 1, 1}, {4095, 2}, {1 << 20, 4096}, {262143, 262146}, {5, 0}} {
		vecs, ok := m.View(nil, r[0], r[1])
		if !ok {
			t.Fatalf("[%d, +%d): not viewable, though just written", r[0], r[1])
		}
		if got := bytes.Join(vecs, nil); !bytes.Equal(got, data[r[0]:r[0]+r[1]]) {
			t.Fatalf("[%d, +%d): other bytes than the file's", r[0], r[1])
		}
	}
}

func TestViewFollowsTheFile(t *testing.T) {
	m, o, _ := mapTest(t, 4096, 1<<40)
	if _, err := o.WriteAt([]byte("grown"), 1<<30); err != nil {
		t.Fatal(err)
	}
	m.Prove(1<<30, pageSize)
	vecs, ok := m.View(nil, 1<<30, 5)
	if !ok || string(bytes.Join(vecs, nil)) != "grown" {
		t.Fatalf("what was written after mapping: %q, %v", vecs, ok)
	}
}

// TestProof takes the kernel's word away, so that only Prove counts.
func TestProof(t *testing.T) {
	const n = 100*pageSize + 10
	m, _, _ := mapTest(t, n, n)
	m.asks, m.grows = false, false
	viewable := func(off, n int64) bool { _, ok := m.View(nil, off, n); return ok }

	if viewable(0, 1) {
		t.Fatal("viewable without a proof")
	}
	m.Prove(pageSize-1, 70*pageSize) // pages 1 to 69 wholly
	for _, c := range []struct {
		off, n int64
		want   bool
	}{{0, 1, false}, {pageSize, 1, true}, {pageSize, 69 * pageSize, true}, {pageSize, 69*pageSize + 1, false}, {70 * pageSize, 1, false}} {
		if got := viewable(c.off, c.n); got != c.want {
			t.Errorf("[%d, +%d): viewable %v, expected %v", c.off, c.n, got, c.want)
		}
	}
	m.Prove(n-10, 10) // the partial page at the end
	if !viewable(n-10, 10) {
		t.Error("the last page was proven, and is not viewable")
	}
	m.Prove(90*pageSize+1, 100)
	if viewable(90*pageSize+1, 100) {
		t.Error("a page that was read in part counts as proven")
	}
	if viewable(n-10, 11) {
		t.Error("what lies beyond the mapping is viewable")
	}
	m.Prove(n+pageSize, pageSize)
	m.forget()
	if viewable(pageSize, 1) {
		t.Error("viewable after the proofs were forgotten")
	}
}

// TestHolesOfTmpfs: a read proves nothing of a hole in a tmpfs, of which a touch
// makes a page. Where there is no room for it that is a fault.
func TestHolesOfTmpfs(t *testing.T) {
	f, err := os.CreateTemp("/dev/shm", "cowdev-*")
	if err != nil {
		t.Skipf("a tmpfs: %v", err)
	}
	defer f.Close()
	defer os.Remove(f.Name())
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &fs); err != nil || fs.Type != unix.TMPFS_MAGIC {
		t.Skip("/dev/shm is no tmpfs")
	}
	if _, err := f.WriteAt(make([]byte, pageSize), 2*pageSize); err != nil {
		t.Fatal(err)
	}
	m, err := NewMapping(f, 3*pageSize)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	m.Prove(0, 3*pageSize)
	if _, ok := m.View(nil, 0, pageSize); ok {
		t.Error("a hole is viewable")
	}
	if _, ok := m.View(nil, 2*pageSize, pageSize); !ok && m.asks {
		t.Error("a page that is there is not viewable")
	}
}

func TestMappingConcurrent(t *testing.T) {
	const n = 1 << 20
	m, _, data := mapTest(t, n, n)
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(1, uint64(g)))
			for range 20000 {
				off := rng.Int64N(n - 8192)
				if vecs, ok := m.View(nil, off, 8192); ok {
					if !bytes.Equal(vecs[0][:16], data[off:off+16]) {
						t.Error("other bytes than the file's")
						return
					}
				}
				if rng.IntN(100) == 0 {
					m.forget()
				} else if rng.IntN(10) == 0 {
					m.Prove(off, 8192)
				}
			}
		})
	}
	wg.Wait()
}

func BenchmarkView(b *testing.B) {
	const n = 64 << 20
	m, _, _ := mapTest(b, n, n)
	vecs := make([][]byte, 0, 4)
	b.ReportAllocs()
	var i int64
	for b.Loop() {
		i = (i*6364136223846793005 + 1442695040888963407) & (1<<62 - 1)
		if _, ok := m.View(vecs[:0], i%(n/pageSize)*pageSize, pageSize); !ok {
			b.Fatal("not viewable")
		}
	}
}
