package disktest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"syscall"
	"testing"
)

// sectors returns n sectors filled with b.
func sectors(n int, b byte) []byte { return bytes.Repeat([]byte{b}, n*SectorSize) }

func rng(seed uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, 1)) }

// states returns every content that crashes of f leave, each shown as one
// letter a sector.
func states(f *File, n int) map[string]int {
	seen := make(map[string]int)
	r := rng(7)
	for range n {
		seen[letters(f.Crash(r).Bytes())]++
	}
	return seen
}

// letters shows each sector by its first byte; a sector of two bytes is '?'.
func letters(p []byte) string {
	var s []byte
	for ; len(p) > 0; p = p[min(len(p), SectorSize):] {
		sector, b := p[:min(len(p), SectorSize)], p[0]
		if !bytes.Equal(sector, bytes.Repeat([]byte{b}, len(sector))) {
			b = '?'
		} else if b == 0 {
			b = '.'
		}
		s = append(s, b)
	}
	return string(s)
}

func write(t *testing.T, f *File, off int, p []byte) {
	t.Helper()
	if n, err := f.WriteAt(p, int64(off)); n != len(p) || err != nil {
		t.Fatalf("WriteAt(%d bytes, %d) = %d, %v", len(p), off, n, err)
	}
}

func mustSync(t *testing.T, f *File) {
	t.Helper()
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
}

// expect compares the states that crashes leave with those that may be.
func expect(t *testing.T, f *File, want ...string) {
	t.Helper()
	seen := states(f, 3000)
	for _, w := range want {
		if seen[w] == 0 {
			t.Errorf("state %q never came up, got %v", w, seen)
		}
		delete(seen, w)
	}
	if len(seen) > 0 {
		t.Errorf("impossible states %v, only %q can be", seen, want)
	}
}

// TestReadsBack compares a file with a slice of bytes under random operations
// of any alignment, some far out.
func TestReadsBack(t *testing.T) {
	for seed := range uint64(30) {
		r := rng(seed)
		f := New(seed)
		var model []byte
		for range 300 {
			off, n := r.IntN(40000), r.IntN(9000)
			switch r.IntN(5) {
			case 0, 1:
				p := bytes.Repeat([]byte{byte(1 + r.IntN(255))}, n)
				write(t, f, off, p)
				if n > 0 {
					model = append(model, make([]byte, max(0, off+n-len(model)))...)
				}
				copy(model[min(off, len(model)):], p)
			case 2:
				if err := f.PunchHole(int64(off), int64(n)); err != nil {
					t.Fatal(err)
				}
				clear(model[min(off, len(model)):min(off+n, len(model))])
			case 3:
				if r.IntN(4) == 0 {
					if err := f.Truncate(int64(off)); err != nil {
						t.Fatal(err)
					}
					model = append(model[:min(off, len(model))], make([]byte, max(0, off-len(model)))...)
				}
			case 4:
				p := make([]byte, n)
				got, err := f.ReadAt(p, int64(off))
				want := max(0, min(n, len(model)-off))
				if got != want || (err == io.EOF) != (want < n) {
					t.Fatalf("seed %d: ReadAt(%d, %d) = %d, %v, want %d bytes", seed, n, off, got, err, want)
				}
			}
			if r.IntN(20) == 0 {
				mustSync(t, f)
			}
			if !bytes.Equal(f.Bytes(), model) {
				t.Fatalf("seed %d: contents differ from the model", seed)
			}
			if disk := f.onDisk(); f.astray || disk.n != f.view.n || !bytes.Equal(content(&disk, len(model)), model) {
				t.Fatalf("seed %d: what is durable or pending is not what the cache holds", seed)
			}
		}
		mustSync(t, f)
		if !bytes.Equal(f.Crash(r).Bytes(), model) {
			t.Fatalf("seed %d: synced contents differ after a crash", seed)
		}
	}
}

// content returns the first n bytes of a table.
func content(t *pages, n int) []byte {
	p := make([]byte, n)
	t.read(p, 0)
	return p
}

// TestFarOut writes where pages are held in the map, too.
func TestFarOut(t *testing.T) {
	f := New(1)
	const far = 1 << 40
	write(t, f, 100, []byte("near"))
	write(t, f, far-2, []byte("far"))
	mustSync(t, f)
	g := f.Crash(rng(1))
	p := make([]byte, 3)
	if _, err := g.ReadAt(p, far-2); err != nil || string(p) != "far" {
		t.Fatalf("read %q, %v", p, err)
	}
	if off, err := g.NextData(4096); off != far-4096 || err != nil {
		t.Fatalf("NextData(4096) = %d, %v, want %d", off, err, int64(far-4096))
	}
	if got := g.Allocated(); got != 3*4096 {
		t.Fatalf("%d bytes allocated, want three pages", got)
	}
	if err := g.Truncate(200); err != nil {
		t.Fatal(err)
	}
	if got := g.Allocated(); got != 4096 {
		t.Fatalf("%d bytes allocated after Truncate, want one page", got)
	}
	if off, err := g.NextData(4096); off != 200 || err != nil {
		t.Fatalf("NextData behind the end = %d, %v, want the size", off, err)
	}
}

// TestCrashStates shows that exactly the states that the fault model allows
// come up.
func TestCrashStates(t *testing.T) {
	start := func() *File { return FromBytes(1, sectors(2, 'a')) }

	t.Run("nothing pending", func(t *testing.T) {
		expect(t, start(), "aa")
	})
	t.Run("a torn write", func(t *testing.T) {
		f := start()
		write(t, f, 0, sectors(2, 'b'))
		expect(t, f, "aa", "ab", "ba", "bb")
	})
	t.Run("two writes, any version of a sector", func(t *testing.T) {
		f := start()
		write(t, f, 0, sectors(2, 'b'))
		write(t, f, 0, sectors(2, 'c'))
		expect(t, f, "aa", "ab", "ac", "ba", "bb", "bc", "ca", "cb", "cc")
	})
	t.Run("two sectors in any order", func(t *testing.T) {
		f := start()
		write(t, f, 0, sectors(1, 'b'))
		write(t, f, SectorSize, sectors(1, 'c'))
		expect(t, f, "aa", "ba", "ac", "bc")
	})
	t.Run("a sync between", func(t *testing.T) {
		f := start()
		write(t, f, 0, sectors(2, 'b'))
		mustSync(t, f)
		write(t, f, 0, sectors(1, 'c'))
		expect(t, f, "bb", "cb")
	})
	t.Run("a punch", func(t *testing.T) {
		f := start()
		write(t, f, 0, sectors(1, 'b'))
		if err := f.PunchHole(0, 2*SectorSize); err != nil {
			t.Fatal(err)
		}
		expect(t, f, "aa", "ba", ".a", "a.", "b.", "..")
	})
	t.Run("a growing file", func(t *testing.T) {
		f := start()
		write(t, f, 3*SectorSize, sectors(1, 'b'))
		expect(t, f, "aa", "aa..", "aa.b")
	})
	t.Run("a shrinking file", func(t *testing.T) {
		f := start()
		if err := f.Truncate(SectorSize); err != nil {
			t.Fatal(err)
		}
		expect(t, f, "aa", "a.", "a")
	})
	t.Run("a write of part of a sector", func(t *testing.T) {
		f := start()
		write(t, f, 10, []byte("x"))
		expect(t, f, "aa", "?a")
	})
}

// TestWriteSync shows what a synchronous write makes durable: itself, its end
// of the file, and the loss of what was there before, and nothing else.
func TestWriteSync(t *testing.T) {
	f := FromBytes(1, sectors(2, 'a'))
	write(t, f, 0, sectors(2, 'b'))
	if err := f.WriteSync(sectors(1, 'c'), SectorSize); err != nil {
		t.Fatal(err)
	}
	expect(t, f, "ac", "bc")

	write(t, f, 2*SectorSize, sectors(1, 'd')) // un-synced growth
	if err := f.WriteSync(sectors(1, 'e'), 3*SectorSize); err != nil {
		t.Fatal(err)
	}
	expect(t, f, "ac.e", "bc.e", "acde", "bcde")
}

// TestWriteSyncUnderWay crashes in the middle of a synchronous write.
func TestWriteSyncUnderWay(t *testing.T) {
	f := FromBytes(1, sectors(2, 'a'))
	var at []string
	f.OnStep = func(op Op, p Phase) {
		at = append(at, p.String())
		switch p {
		case Begin:
			expect(t, f, "aa")
		case Half:
			expect(t, f, "aa", "ba")
		case Applied:
			expect(t, f, "aa", "ab", "ba", "bb")
		case Done:
			expect(t, f, "bb")
		}
	}
	if err := f.WriteSync(sectors(2, 'b'), 0); err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(at); got != "[begin half applied done]" {
		t.Fatalf("phases %v", got)
	}
}

// TestSyncCoversWhatWasThere shows that a write which arrives during a sync
// is not covered by it, whether it is synchronous or not.
func TestSyncCoversWhatWasThere(t *testing.T) {
	f := FromBytes(1, sectors(2, 'a'))
	write(t, f, 0, sectors(1, 'b'))
	once := true
	f.OnStep = func(op Op, p Phase) {
		if op.Kind == Sync && p == Applied && once {
			once = false
			write(t, f, 0, sectors(2, 'c'))
		}
	}
	mustSync(t, f)
	expect(t, f, "ba", "bc", "ca", "cc")
}

// TestFailedSync shows that what a failed sync covered is not saved by a later
// one, and that eviction shows it.
func TestFailedSync(t *testing.T) {
	lostOnes := 0
	for seed := range uint64(40) {
		f := New(seed)
		write(t, f, 0, sectors(2, 'a'))
		mustSync(t, f)
		write(t, f, 0, sectors(2, 'b'))
		f.Inject = FailNth(1, Fault{Err: syscall.EIO}, func(op Op) bool { return op.Kind == Sync })
		if err := f.Sync(); !errors.Is(err, syscall.EIO) {
			t.Fatalf("Sync = %v, want EIO", err)
		}
		mustSync(t, f)
		if got := letters(f.Bytes()); got != "bb" {
			t.Fatalf("reads %q, the cache has bb", got)
		}
		after := letters(f.Crash(rng(seed)).Bytes())
		if seed%2 == 0 {
			f.DropCache(0, 0)
		} else {
			f.DropCache(SectorSize, SectorSize)
			f.DropCache(0, SectorSize)
		}
		if letters(f.Bytes()) != after {
			t.Fatalf("evicted file reads %q, the disk has %q", letters(f.Bytes()), after)
		}
		if after != "bb" {
			lostOnes++
		}
	}
	if lostOnes == 0 || lostOnes == 40 {
		t.Fatalf("%d of 40 failed syncs lost something, want some", lostOnes)
	}
}

// TestKill shows that the page cache outlives a process and may still be lost.
func TestKill(t *testing.T) {
	f := FromBytes(1, sectors(2, 'a'))
	write(t, f, 0, sectors(1, 'b'))
	g := f.Kill(nil)
	if _, err := f.WriteAt(sectors(1, 'c'), 0); !errors.Is(err, ErrClosed) {
		t.Fatalf("write by a dead process: %v", err)
	}
	if got := letters(g.Bytes()); got != "ba" {
		t.Fatalf("after the kill %q, want ba", got)
	}
	expect(t, g, "aa", "ba")
	mustSync(t, g)
	expect(t, g, "ba")
}

// TestKillUnderWay kills inside a write: the rest of it never happens.
func TestKillUnderWay(t *testing.T) {
	f := FromBytes(1, sectors(2, 'a'))
	var g *File
	f.OnStep = func(_ Op, p Phase) {
		if p == Half {
			g = f.Kill(nil)
		}
	}
	if _, err := f.WriteAt(sectors(2, 'b'), 0); !errors.Is(err, ErrClosed) {
		t.Fatalf("WriteAt = %v, want ErrClosed", err)
	}
	if got := letters(g.Bytes()); got != "ba" {
		t.Fatalf("after the kill %q, want ba", got)
	}
}

// TestFaults fails operations in part.
func TestFaults(t *testing.T) {
	f := FromBytes(1, sectors(2, 'a'))
	f.Record(10)
	f.Inject = FailNth(2, Fault{Err: syscall.EIO, Done: SectorSize}, func(op Op) bool { return op.Kind == Write })
	write(t, f, 0, sectors(2, 'b'))
	n, err := f.WriteAt(sectors(2, 'c'), 0)
	if n != SectorSize || !errors.Is(err, syscall.EIO) || letters(f.Bytes()) != "cb" {
		t.Fatalf("short write: %d, %v, %q", n, err, letters(f.Bytes()))
	}
	f.Inject = FailNth(1, Fault{Err: syscall.EIO}, func(Op) bool { return true })
	if n, err := f.ReadAt(make([]byte, 9), 0); n != 0 || !errors.Is(err, syscall.EIO) {
		t.Fatalf("failing read: %d, %v", n, err)
	}
	ops := f.Ops()
	if len(ops) != 3 || ops[0].Failed || !ops[1].Failed || !ops[2].Failed || ops[2].Kind != Read {
		t.Fatalf("recorded %v", ops)
	}
}

// TestFullDisk fills the disk and makes room again.
func TestFullDisk(t *testing.T) {
	f := New(1)
	f.SetSpace(2 * pageSize)
	write(t, f, 0, make([]byte, pageSize))
	n, err := f.WriteAt(make([]byte, 2*pageSize), pageSize)
	if n != pageSize || !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("write into a full disk: %d, %v", n, err)
	}
	write(t, f, 100, sectors(8, 'b')) // in place
	if err := f.WriteSync([]byte{1}, 5*pageSize); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("WriteSync into a full disk: %v", err)
	}
	if err := f.PunchHole(0, pageSize); err != nil {
		t.Fatal(err)
	}
	if err := f.WriteSync([]byte{1}, 5*pageSize); err != nil {
		t.Fatal(err)
	}
}

// TestSameSeedSameState holds Crash to its promise.
func TestSameSeedSameState(t *testing.T) {
	f := New(1)
	for i := range 20 {
		write(t, f, i*300, sectors(3, byte('a'+i)))
	}
	for seed := range uint64(50) {
		if !bytes.Equal(f.Crash(rng(seed)).Bytes(), f.Crash(rng(seed)).Bytes()) {
			t.Fatalf("seed %d: two states", seed)
		}
	}
}

// TestCopiesAreApart changes a file and its copies and sees that none sees
// another's bytes.
func TestCopiesAreApart(t *testing.T) {
	f := FromBytes(1, sectors(8, 'a'))
	c, k := f.Crash(rng(1)), f.Fork(nil)
	write(t, f, 0, sectors(1, 'f'))
	write(t, c, 0, sectors(1, 'c'))
	write(t, k, 0, sectors(1, 'k'))
	mustSync(t, k)
	for want, g := range map[byte]*File{'f': f, 'c': c, 'k': k} {
		if got := g.Bytes()[0]; got != want {
			t.Errorf("reads %q, want %q", got, want)
		}
	}
}

// BenchmarkCrash makes states of a small file with 30 changes pending.
func BenchmarkCrash(b *testing.B) {
	f := New(1)
	f.WriteAt(make([]byte, 256<<10), 0)
	f.Sync()
	for i := range 30 {
		f.WriteAt(sectors(1+i%9, 'x'), int64(i*7919%(200<<10)))
	}
	r := rng(1)
	b.ReportAllocs()
	for b.Loop() {
		f.Crash(r)
	}
}
