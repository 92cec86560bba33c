package cow_test

// A device over a real file, read by system calls and through a mapping of it,
// held against a plain slice of bytes: what is written is read, flushed and
// found again.

import (
	"bytes"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/cowdev/cowdev/block"
	"github.com/cowdev/cowdev/cow"
	"github.com/cowdev/cowdev/exception"
	"github.com/cowdev/cowdev/internal/disk"
)

// newStore makes a store in f and opens it, with a mapping of it.
func newStore(tb testing.TB, f *disk.OS, p exception.Params) (*exception.Store, *disk.Mapping) {
	tb.Helper()
	if err := exception.Create(f, p); err != nil {
		tb.Fatal(err)
	}
	s, err := exception.Open(f, exception.Options{})
	if err != nil {
		tb.Fatal(err)
	}
	m, err := disk.NewMapping(f.File(), 4*p.Size)
	if err != nil {
		tb.Fatal(err)
	}
	return s, m
}

// shown is a base whose bytes can be sent from where they lie.
type shown struct{ base }

func (s shown) View(vecs [][]byte, off, n int64) ([][]byte, bool) {
	return append(vecs, s.base[off:off+n]), true
}

func TestRealFile(t *testing.T) {
	const size, writes = 64 * 8192, 3000
	path := filepath.Join(t.TempDir(), "store")
	open := func(flags int) *disk.OS {
		f, err := disk.OpenOS(path, flags)
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	geo := block.Geometry{Size: size, ChunkSize: 8192}
	f := open(os.O_RDWR | os.O_CREATE)
	store, m := newStore(t, f, exception.Params{Geometry: geo, LogSize: 64 << 10})
	origin := shown{make(base, size)}
	d := cow.New(origin, store, cow.Options{View: m})
	want := make([]byte, size)
	rng := rand.New(rand.NewPCG(1, 2))
	for range writes {
		w := make([]block.Write, 1+rng.IntN(4))
		for i := range w {
			n := 1 + rng.IntN(6000)
			off := rng.IntN(size - n)
			if rng.IntN(4) > 0 { // whole blocks
				off, n = off/512*512, (n+511)/512*512
			}
			p := want[off : off+n]
			for i := range p {
				p[i] = byte(rng.Uint32())
			}
			w[i] = block.Write{Data: bytes.Clone(p), Off: int64(off)}
		}
		d.WriteBatch(w)
		for i := range w {
			if w[i].Err != nil {
				t.Fatal(w[i].Err)
			}
		}
		if rng.IntN(100) == 0 {
			if err := d.Flush(); err != nil {
				t.Fatal(err)
			}
		}
	}
	compare := func(when string, d *cow.Device) {
		t.Helper()
		got := make([]byte, size)
		if _, err := d.ReadAt(got, 0); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Fatalf("%s: other bytes than were written", when)
		}
	}
	compare("open", d)
	session := d.Session()
	for off := int64(0); off < size; off += 8192 {
		pieces, ok := session.View(nil, off, 8192)
		if got := bytes.Join(pieces, nil); !ok || !bytes.Equal(got, want[off:off+8192]) {
			t.Fatalf("mapped, %v: other bytes than were written in the chunk at %d", ok, off)
		}
	}
	session.Done()
	session.Close()
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if err := store.Close(); err != nil {
		t.Fatal(err)
	}
	store, err := exception.Open(open(os.O_RDWR), exception.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	compare("opened again", cow.New(origin, store, cow.Options{}))
}
