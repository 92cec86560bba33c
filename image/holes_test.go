package image

// Where the image is a hole it reads as zeros, wherever the hole begins and
// ends, and takes no page of the cache; what is not a hole is never taken for
// one.

import (
	"bytes"
	"errors"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"testing"
)

func TestHoles(t *testing.T) {
	const most = 5 * region
	rng := rand.New(rand.NewPCG(1, 2))
	for range 12 {
		size := 1 + rng.Int64N(most)
		data := []extent{{rng.Int64N(size), 1}}
		for range rng.IntN(40) {
			at := rng.Int64N(size) >> rng.IntN(20) << rng.IntN(20) % size
			data = append(data, extent{at, min(1+rng.Int64N(int64(1)<<rng.IntN(24)), size-at)})
		}
		path := write(t, size, data...)
		want, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		b := open(t, path)
		for range 500 {
			off := rng.Int64N(size)
			n := min(1+rng.Int64N(int64(1)<<rng.IntN(26)), size-off)
			if n > 1<<20 && rng.IntN(100) > 0 {
				n = 4096
			}
			n = min(n, size-off)
			if vecs, ok := b.View(nil, off, n); ok && !bytes.Equal(bytes.Join(vecs, nil), want[off:off+n]) {
				t.Fatalf("view of %d bytes at %d of %d: wrong bytes, with data at %v", n, off, size, data)
			}
			got := bytes.Repeat([]byte{1}, int(n))
			if k, err := b.ReadAt(got, off); int64(k) != n || err != nil && err != io.EOF || !bytes.Equal(got, want[off:off+n]) {
				t.Fatalf("read of %d bytes at %d of %d: %d, %v, or wrong bytes, with data at %v", n, off, size, k, err, data)
			}
		}
		past := make([]byte, 2)
		if n, err := b.ReadAt(past, size-1); n != 1 || err != io.EOF || past[0] != want[size-1] {
			t.Errorf("read over the end: %d, %v", n, err)
		}
		if n, err := b.ReadAt(past, size); n != 0 || err != io.EOF {
			t.Errorf("read behind the end: %d, %v", n, err)
		}
	}
}

// A hole that was read is known, all of it, and never got into memory.
func TestHolesTakeNoMemory(t *testing.T) {
	const data, size = 40 * region, 100*region + 5000
	b := open(t, write(t, size, extent{data, 4096}))
	if b.holes == nil {
		t.Skip("the filesystem of the test's files is none whose word on holes is taken")
	}
	for _, off := range []int64{0, data + grain, data + region, size - 70000, size - 100} {
		if _, err := b.ReadAt(make([]byte, 100), off); err != nil && err != io.EOF {
			t.Fatal(err)
		}
	}
	for _, hole := range []extent{{0, 1 << 20}, {data - 8192, 8192}, {data + grain, region}, {size - 70000, 70000}} {
		vecs, ok := b.View(nil, hole.off, hole.n)
		if !ok || !bytes.Equal(bytes.Join(vecs, nil), make([]byte, hole.n)) {
			t.Errorf("hole of %d bytes at %d: shown %v, or not zeros", hole.n, hole.off, ok)
		}
		if b.view.Cached(hole.off, hole.n) {
			t.Errorf("hole of %d bytes at %d: in memory", hole.n, hole.off)
		}
	}
	if b.holes.zero(data, 1) || b.holes.zero(data-1, 2) {
		t.Error("data is taken for a hole")
	}
	if b.holes.zero(size, 1) || b.holes.zero(0, size) {
		t.Error("what lies outside, or is not a hole throughout, is taken for one")
	}
}

// Of a file that was cut short nothing is learned.
func TestHolesCutShort(t *testing.T) {
	path := write(t, 10*region, extent{region, 4096})
	b := open(t, path)
	if err := os.Truncate(path, 2*region); err != nil {
		t.Fatal(err)
	}
	if _, err := b.ReadAt(make([]byte, 4096), 5*region); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("reading what was cut off: %v", err)
	}
}

// A base that is merged into has no holes for good.
func TestHolesFilled(t *testing.T) {
	b, err := Open(write(t, region), Options{Writable: true})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	got, want := make([]byte, 4096), bytes.Repeat([]byte{7}, 4096)
	if _, err := b.ReadAt(got, 8192); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Disk().WriteAt(want, 8192); err != nil {
		t.Fatal(err)
	}
	if _, err := b.ReadAt(got, 8192); err != nil || !bytes.Equal(got, want) {
		t.Errorf("a hole that was filled reads as %x…, %v", got[:4], err)
	}
}

// Ranges that do not lie in the image are no holes, and nothing is learned of
// them; an image too large to be asked about has none.
func TestHolesOutside(t *testing.T) {
	const size = region + 5
	b := open(t, write(t, size))
	for _, e := range []extent{{-1, 1}, {0, 0}, {0, size + 1}, {size, 1}, {math.MaxInt64 - 1, 10}, {1, math.MaxInt64}} {
		b.holes.learn(e.off, e.n)
		if b.holes.zero(e.off, e.n) {
			t.Errorf("%d bytes at %d are taken for a hole of an image of %d", e.n, e.off, size)
		}
	}
	if h := newHoles(b.f, math.MaxInt64); h != nil {
		t.Error("an image of 8 EiB is asked about")
	}
}
