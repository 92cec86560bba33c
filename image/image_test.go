package image

// A base reads as its file does, at any size, and is told from any other: a
// changed byte anywhere is found by the full digest and its range named, one
// in the sample at once.

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cowdev/cowdev/internal/disk"
)

// write makes an image of size bytes, with random data in the given ranges.
func write(t *testing.T, size int64, data ...extent) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "base.img")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	rng := rand.NewChaCha8([32]byte{7})
	for _, e := range data {
		p := make([]byte, e.n)
		rng.Read(p)
		if _, err := f.WriteAt(p, e.off); err != nil {
			t.Fatal(err)
		}
	}
	return path
}

func open(t *testing.T, path string) *Base {
	t.Helper()
	b, err := Open(path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.Close() })
	return b
}

// change flips a byte and gives the file its old times back, or a new one.
func change(t *testing.T, path string, off int64, keepTime bool) {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var p [1]byte
	if _, err := f.ReadAt(p[:], off); err != nil {
		t.Fatal(err)
	}
	p[0]++
	if _, err := f.WriteAt(p[:], off); err != nil {
		t.Fatal(err)
	}
	to := info.ModTime()
	if !keepTime {
		to = to.Add(time.Second)
	}
	if err := os.Chtimes(path, to, to); err != nil {
		t.Fatal(err)
	}
}

func TestReadAt(t *testing.T) {
	for _, size := range []int64{1, 511, 4096, 4097, 1<<20 + 3} {
		path := write(t, size, extent{0, size})
		want, _ := os.ReadFile(path)
		b := open(t, path)
		if b.Size() != size {
			t.Fatalf("size %d, expected %d", b.Size(), size)
		}
		got := make([]byte, size+10)
		n, err := b.ReadAt(got, 0)
		if int64(n) != size || err != io.EOF || !bytes.Equal(got[:n], want) {
			t.Errorf("size %d: read %d bytes, %v, equal %v", size, n, err, bytes.Equal(got[:n], want))
		}
		vecs, ok := b.View(nil, 0, size)
		if !ok || !bytes.Equal(bytes.Join(vecs, nil), want) {
			t.Errorf("size %d: what was just read is not viewable (%v), or differs", size, ok)
		}
	}
}

func TestCutShort(t *testing.T) {
	path := write(t, 1<<20, extent{0, 1 << 20})
	b := open(t, path)
	if err := os.Truncate(path, 4096); err != nil {
		t.Fatal(err)
	}
	if _, err := b.ReadAt(make([]byte, 4096), 8192); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("reading what was cut off: %v", err)
	}
}

func TestExtents(t *testing.T) {
	const mib = 1 << 20
	b := open(t, write(t, 10*mib, extent{2 * mib, mib}, extent{5 * mib, mib}))
	runs, err := b.Extents(mib, 8*mib, 100)
	if err != nil {
		t.Fatal(err)
	}
	if len(runs) == 1 && !runs[0].Hole {
		t.Skip("this filesystem tells no holes")
	}
	at := int64(mib)
	for i, r := range runs {
		if r.Off != at || r.Hole != (i%2 == 0) {
			t.Errorf("run %d: %+v, expected to begin at %d", i, r, at)
		}
		at = r.End()
	}
	if len(runs) != 5 || at != 9*mib {
		t.Errorf("%d runs up to %d, expected 5 up to %d", len(runs), at, 9*mib)
	}
	if runs, err = b.Extents(0, 10*mib, 2); err != nil || len(runs) != 2 {
		t.Errorf("limit 2: %d runs, %v", len(runs), err)
	}
}

func TestRefused(t *testing.T) {
	dir := t.TempDir()
	empty := filepath.Join(dir, "empty")
	os.WriteFile(empty, nil, 0o600)
	for path, want := range map[string]error{
		empty:                     ErrUnusable,
		dir:                       disk.ErrKind,
		filepath.Join(dir, "no"):  os.ErrNotExist,
		filepath.Join(empty, "x"): nil,
	} {
		_, err := Open(path, Options{})
		if err == nil || (want != nil && !errors.Is(err, want)) {
			t.Errorf("%s: %v, expected %v", path, err, want)
		}
		if err != nil && !strings.Contains(err.Error(), path) {
			t.Errorf("%v: does not name %s", err, path)
		}
	}
}

func TestLocks(t *testing.T) {
	path := write(t, 4096)
	a := open(t, path)
	b := open(t, path)
	if _, err := Open(path, Options{Writable: true}); !errors.Is(err, disk.ErrLocked) {
		t.Fatalf("writable beside readers: %v", err)
	}
	a.Close()
	b.Close()
	w, err := Open(path, Options{Writable: true})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if _, err := Open(path, Options{}); !errors.Is(err, disk.ErrLocked) {
		t.Fatalf("a reader beside the writer: %v", err)
	}
	if look, err := Open(path, Options{NoLock: true}); err != nil {
		t.Fatalf("looking without a lock: %v", err)
	} else {
		look.Close()
	}
}

func TestIdentityRoundTrip(t *testing.T) {
	b := open(t, write(t, 9<<20+5, extent{0, 3 << 20}))
	id, err := b.Identify(DigestFull)
	if err != nil {
		t.Fatal(err)
	}
	if id.Full, err = b.FullDigest(context.Background(), FullOptions{}); err != nil {
		t.Fatal(err)
	}
	for _, want := range []Identity{{}, {Size: 5, Device: true, Stamp: -1}, id} {
		got, err := DecodeIdentity(want.Encode())
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got.Encode(), want.Encode()) || (got.Full == nil) != (want.Full == nil) {
			t.Errorf("decoded %+v, expected %+v", got, want)
		}
	}
}

func TestSampleCoversTheEdges(t *testing.T) {
	for _, size := range []int64{1, 1 << 20, 1<<20 + 1, 2 << 20, 3<<20 + 7, 200 << 20, 1 << 40} {
		for i := range samplePieces {
			for _, e := range samplePiece(size, i) {
				if e.n <= 0 || e.n > edge || e.off < 0 || e.off+e.n > size {
					t.Fatalf("size %d, piece %d: [%d, +%d) lies outside", size, i, e.off, e.n)
				}
			}
		}
		covers := func(at int64) bool {
			for i := range samplePieces {
				for _, e := range samplePiece(size, i) {
					if at >= e.off && at < e.off+e.n {
						return true
					}
				}
			}
			return false
		}
		for _, at := range []int64{0, min(size, 1<<20) - 1, max(0, size-1<<20), size - 1} {
			if !covers(at) {
				t.Errorf("size %d: byte %d is not in the sample", size, at)
			}
		}
	}
}

func TestDigestIgnoresHoles(t *testing.T) {
	const size = 41<<20 + 99
	sparse := write(t, size, extent{9 << 20, 5000}, extent{33 << 20, 1 << 20})
	data, _ := os.ReadFile(sparse)
	full := filepath.Join(t.TempDir(), "full.img")
	os.WriteFile(full, data, 0o600)
	var digests []Digest
	for _, path := range []string{sparse, full} {
		b := open(t, path)
		var last int64
		d, err := b.FullDigest(context.Background(), FullOptions{Gentle: true, Progress: func(n int64) { last = n }})
		if err != nil {
			t.Fatal(err)
		}
		if last != size {
			t.Errorf("progress ended at %d, expected %d", last, size)
		}
		digests = append(digests, d.Root)
	}
	if digests[0] != digests[1] {
		t.Error("the same bytes with and without holes have different digests")
	}
}

func TestDigestEnds(t *testing.T) {
	b := open(t, write(t, 64<<20, extent{0, 1 << 20}))
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := b.FullDigest(ctx, FullOptions{}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	// In the middle of one long run of data, too.
	const size = 32 << 20
	dense := open(t, write(t, size, extent{0, size}))
	ctx, cancel = context.WithCancel(context.Background())
	var last int64
	_, err := dense.FullDigest(ctx, FullOptions{Progress: func(n int64) { last = n; cancel() }})
	if !errors.Is(err, context.Canceled) || last > leafSize {
		t.Errorf("cancelled after %d bytes of %d: %v", last, size, err)
	}
	boom := errors.New("boom")
	if _, err := b.FullDigest(context.Background(), FullOptions{Wait: func(context.Context) error { return boom }}); !errors.Is(err, boom) {
		t.Errorf("a wait that fails: %v", err)
	}
}

// TestRecognise changes one byte in and out of the sample, with the time kept
// or not, and with what a store may remember.
func TestRecognise(t *testing.T) {
	const size = 64<<20 + 777
	const sampled, unsampled = 5, 1<<20 + 80<<10
	for _, c := range []struct {
		name     string
		at       int64 // of the changed byte; -1 none
		keepTime bool
		full     bool // the store knows the full digest
		look     Digests
		deep     bool
		ok       bool
		says     string
	}{
		{name: "same", at: -1, keepTime: true, ok: true},
		{name: "same, deep", at: -1, keepTime: true, full: true, deep: true, ok: true},
		{name: "touched, full known", at: -1, full: true, ok: true},
		{name: "touched, full not known", at: -1, says: "--accept-base"},
		{name: "touched, not looked at", at: -1, look: DigestOff, says: "nothing is known"},
		{name: "sample changed", at: sampled, keepTime: true, says: "bytes 0 to 1048575 differ"},
		{name: "sample and time changed", at: sampled, says: "bytes 0 to 1048575 differ"},
		{name: "the end changed", at: size - 1, keepTime: true, says: "to 67109640 differ"},
		{name: "elsewhere, time changed", at: unsampled, full: true, says: "bytes 0 to 4194303 differ"},
		{name: "elsewhere, time kept", at: unsampled, keepTime: true, full: true, ok: true},
		{name: "elsewhere, time kept, deep", at: unsampled, keepTime: true, full: true, deep: true, says: "differ"},
		{name: "not looked at", at: sampled, keepTime: true, look: DigestOff, ok: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := write(t, size, extent{0, 2 << 20}, extent{30 << 20, 1 << 20})
			b := open(t, path)
			was, err := b.Identify(c.look)
			if err != nil {
				t.Fatal(err)
			}
			if c.full {
				if was.Full, err = b.FullDigest(context.Background(), FullOptions{}); err != nil {
					t.Fatal(err)
				}
			}
			change(t, path, max(c.at, 0), c.keepTime)
			if c.at < 0 { // back to what it was
				for range 255 {
					change(t, path, 0, true)
				}
			}
			now, err := b.Recognise(context.Background(), Question{Was: was, Look: c.look, Deep: c.deep})
			if c.ok != (err == nil) {
				t.Fatalf("recognised: %v, expected ok %v", err, c.ok)
			}
			if err != nil && (!errors.Is(err, ErrWrongBase) || !strings.Contains(err.Error(), c.says)) {
				t.Errorf("%v: expected ErrWrongBase that says %q", err, c.says)
			}
			if c.ok && c.full && now.Full == nil {
				t.Error("the full digest was forgotten")
			}
		})
	}
}

func TestRecogniseSize(t *testing.T) {
	b := open(t, write(t, 4096))
	_, err := b.Recognise(context.Background(), Question{Was: Identity{Size: 8192}})
	if !errors.Is(err, ErrWrongBase) || !strings.Contains(err.Error(), "8192") {
		t.Errorf("another size: %v", err)
	}
}

// TestRecogniseHalfMerged: what may differ is not compared, the rest is.
func TestRecogniseHalfMerged(t *testing.T) {
	const size = 8 << 20
	path := write(t, size, extent{0, size})
	b := open(t, path)
	was, err := b.Identify(DigestSample)
	if err != nil {
		t.Fatal(err)
	}
	change(t, path, 100, false)
	first := func(off, n int64) bool { return off < 1<<20 }
	if _, err := b.Recognise(context.Background(), Question{Was: was, Except: first}); err != nil {
		t.Errorf("a change where it may be: %v", err)
	}
	change(t, path, size-1, false)
	if _, err := b.Recognise(context.Background(), Question{Was: was, Except: first}); !errors.Is(err, ErrWrongBase) {
		t.Errorf("a change where it may not be: %v", err)
	}
}

func TestSniff(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x")
	os.WriteFile(path, append([]byte("QFI\xfb"), make([]byte, 600)...), 0o600)
	if got := open(t, path).Sniff(); got != "qcow2" {
		t.Errorf("sniffed %q, expected qcow2", got)
	}
	if got := open(t, write(t, 10)).Sniff(); got != "" {
		t.Errorf("sniffed %q in zeros", got)
	}
}

func FuzzDecodeIdentity(f *testing.F) {
	f.Add(Identity{Size: 1, Sample: new(Sample), Full: new(Full)}.Encode())
	b := &Base{size: 1}
	f.Fuzz(func(t *testing.T, p []byte) {
		id, err := DecodeIdentity(p)
		if err != nil {
			return
		}
		if id.Sample != nil {
			_ = b.compareSamples(Question{Was: id}, new(Sample))
		}
		if id.Full != nil {
			_ = b.compareFull(id.Full, new(Full))
		}
	})
}

// TestBeginSample: a sample that was begun beforehand serves Recognise, once.
func TestBeginSample(t *testing.T) {
	const size = 8 << 20
	path := write(t, size, extent{0, size})
	b := open(t, path)
	identify := func() *Sample {
		id, err := b.Identify(DigestSample)
		if err != nil {
			t.Fatal(err)
		}
		return id.Sample
	}
	was := identify()
	for _, look := range []Digests{DigestSample, DigestOff} {
		change(t, path, 100, true)
		id, err := b.Identify(DigestSample)
		if err != nil {
			t.Fatal(err)
		}
		b.BeginSample()
		if _, err := b.begun(); err != nil {
			t.Fatal(err)
		}
		change(t, path, 100, true)
		if _, err := b.Recognise(context.Background(), Question{Was: id, Look: look}); err != nil {
			t.Errorf("look %v, with the sample from before the change: %v", look, err)
		}
		if now := identify(); *now == *id.Sample || *now == *was {
			t.Errorf("look %v: the sample is one from before the base was changed", look)
		}
	}
	b.BeginSample() // Close waits for it
}
