package files

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cowdev/cowdev/block"
)

// counted counts the bytes that are read.
type counted struct {
	block.Reader
	n atomic.Int64
}

func (c *counted) ReadAt(p []byte, off int64) (int, error) {
	n, err := c.Reader.ReadAt(p, off)
	c.n.Add(int64(n))
	return n, err
}

// TestSpeed prints the table of docs/files.md: how long a comparison takes and
// how much of the images it reads. It takes minutes and 8 GiB of disk.
//
//	COWDEV_LONG=1 go test -run TestSpeed -v -timeout 60m ./files
func TestSpeed(t *testing.T) {
	if os.Getenv("COWDEV_LONG") == "" {
		t.Skip("takes minutes; COWDEV_LONG=1 runs it")
	}
	needMount(t)
	t.Log("  image   changed      time  of the base of the overlay  of the image")
	for _, gib := range []int64{1, 10, 100} {
		old := filepath.Join(t.TempDir(), "old.img")
		populateLarge(t, old, gib<<30)
		for _, mib := range []int64{10, 100, 1024} {
			if mib<<20 > gib<<30/4 {
				continue
			}
			new := filepath.Join(t.TempDir(), "new.img")
			run(t, "cp", "--sparse=always", old, new)
			changeLarge(t, new, mib<<20)
			changed := sparseDifferences(t, old, new)
			for range 2 { // the first run fills the cache
				measure(t, old, new, changed, fmt.Sprintf("%4d GiB  %4d MiB", gib, mib))
			}
			measureWhy(t, old, new, changed)
			if err := os.Remove(new); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.Remove(old); err != nil {
			t.Fatal(err)
		}
	}
}

// measure compares and logs a line.
func measure(t *testing.T, old, new string, changed []block.Extent, label string) {
	t.Helper()
	a, b := &counted{Reader: openReader(t, old)}, &counted{Reader: openReader(t, new)}
	began := time.Now()
	x, err := Open(a)
	if err != nil {
		t.Fatal(err)
	}
	y, err := Open(b)
	if err != nil {
		t.Fatal(err)
	}
	r, err := Compare(x, y, Options{Changed: changed})
	if err != nil {
		t.Fatal(err)
	}
	took := time.Since(began)
	const mib = 1 << 20
	t.Logf("%s  %6.2f s  %8.1f MiB  %8.1f MiB  %.2f %%  (%d changes)", label, took.Seconds(),
		float64(a.n.Load())/mib, float64(b.n.Load())/mib, 100*float64(a.n.Load()+b.n.Load())/float64(b.Size()), len(r.Changes))
}

// measureWhy logs how long it takes to tell where the changed space went.
func measureWhy(t *testing.T, old, new string, changed []block.Extent) {
	t.Helper()
	b := &counted{Reader: openReader(t, new)}
	began := time.Now()
	fsys, err := Open(b)
	if err != nil {
		t.Fatal(err)
	}
	r, err := Why(openReader(t, old), b, fsys, changed)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("                why:  %6.2f s, %.1f MiB read of the overlay, %.1f MiB in it, %d files", time.Since(began).Seconds(),
		float64(b.n.Load())/(1<<20), float64(r.Total.Stored)/(1<<20), len(r.Files))
}

// populateLarge makes an ext4 image with 20,000 small files and as many large
// ones as fit, at most 2 GiB.
func populateLarge(t *testing.T, name string, size int64) {
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	f.Close()
	run(t, "mke2fs", "-q", "-F", "-t", "ext4", "-E", "lazy_itable_init=1", name)
	dir, unmount := mount(t, name, "rw")
	rng := rand.New(rand.NewPCG(1, 1))
	for i := range 20_000 {
		sub := filepath.Join(dir, fmt.Sprintf("d%d", i/100))
		if err := os.MkdirAll(sub, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(sub, fmt.Sprint(i)), randomBytes(rng, 1000+rng.IntN(5000)), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for i := range min(20, size>>30*6) {
		writeLarge(t, filepath.Join(dir, fmt.Sprintf("large%d", i)), 100<<20)
	}
	unmount()
}

// writeLarge writes a file of size bytes.
func writeLarge(t *testing.T, name string, size int64) {
	t.Helper()
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := io.CopyN(f, rand.NewChaCha8([32]byte{byte(size)}), size); err != nil {
		t.Fatal(err)
	}
}

// changeLarge changes size bytes: one half over large files, the other half in
// new files of 1 MiB, and a hundred small files besides.
func changeLarge(t *testing.T, image string, size int64) {
	dir, unmount := mount(t, image, "rw")
	defer unmount()
	large, err := filepath.Glob(filepath.Join(dir, "large*"))
	if err != nil || len(large) == 0 {
		t.Fatal("no large file", err)
	}
	rng := rand.New(rand.NewPCG(2, 2))
	piece := randomBytes(rng, 256<<10)
	for off, i := int64(0), 0; off < size/2; off, i = off+int64(len(piece)), i+1 {
		f, err := os.OpenFile(large[i%len(large)], os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt(piece, int64(i/len(large))*int64(len(piece))); err != nil {
			t.Fatal(err)
		}
		f.Close()
	}
	for i := range size / 2 >> 20 {
		writeLarge(t, filepath.Join(dir, fmt.Sprintf("new%d", i)), 1<<20)
	}
	for i := range 100 {
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("d%d/%d", i, i*100)), []byte("changed"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// sparseDifferences is differences for images that are mostly holes.
func sparseDifferences(t *testing.T, old, new string) []block.Extent {
	t.Helper()
	a, b := openReader(t, old), openReader(t, new)
	const piece = 1 << 20
	x, y := make([]byte, piece), make([]byte, piece)
	var out []block.Extent
	for off := int64(0); off < b.Size(); off += piece {
		if off = min(nextData(a, off), nextData(b, off)); off >= b.Size() {
			break
		}
		off = off / piece * piece
		n := min(piece, b.Size()-off)
		if readFull(a, x[:n], off) != nil || readFull(b, y[:n], off) != nil {
			t.Fatalf("read the images at %d", off)
		}
		for i := int64(0); i < n; i += 4096 {
			if end := min(i+4096, n); !bytes.Equal(x[i:end], y[i:end]) {
				out = append(out, block.Extent{Off: off + i, N: end - i, State: block.Stored})
			}
		}
	}
	return out
}

// nextData returns where data begins at or after off; far away when none does.
func nextData(f imageFile, off int64) int64 {
	at, err := unix.Seek(int(f.Fd()), off, unix.SEEK_DATA)
	if err != nil {
		return farAway
	}
	return at
}
