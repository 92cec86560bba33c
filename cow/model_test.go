// Random changes, merges, closes, deaths of the process and power cuts on one
// device, held against a plain slice of bytes after each step.
package cow_test

import (
	"bytes"
	"flag"
	"io"
	"math/rand/v2"
	"testing"

	"github.com/cowdev/cowdev/block"
	"github.com/cowdev/cowdev/cow"
	"github.com/cowdev/cowdev/exception"
	"github.com/cowdev/cowdev/internal/crash"
	"github.com/cowdev/cowdev/internal/disktest"
	"github.com/cowdev/cowdev/merge"
)

var seedFlag = flag.Uint64("seed", 0, "run only this seed of the random test")

type base []byte

func (b base) Size() int64 { return int64(len(b)) }
func (b base) ReadAt(p []byte, off int64) (int, error) {
	if off >= int64(len(b)) {
		return 0, io.EOF
	}
	n := copy(p, b[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// mergeable is a base that can be merged into.
type mergeable struct {
	*disktest.File
	size int64
}

func (m mergeable) Size() int64 { return m.size }

func TestDeviceAgainstBytes(t *testing.T) {
	seeds := []uint64{*seedFlag}
	if *seedFlag == 0 {
		seeds = seeds[:0]
		for i := range uint64(60) {
			seeds = append(seeds, i+1)
		}
	}
	for _, seed := range seeds {
		walk(t, seed)
		if t.Failed() {
			t.Fatalf("replay with -seed %d", seed)
		}
	}
}

func walk(t *testing.T, seed uint64) {
	rng := rand.New(rand.NewPCG(seed, 1))
	geo := block.Geometry{Size: int64(8192*12 - rng.IntN(9000)), ChunkSize: 8192}
	want := make([]byte, geo.Size)
	for i := range want {
		want[i] = byte(rng.Uint32())
	}
	origin := mergeable{disktest.FromBytes(seed, want), geo.Size}
	file := disktest.New(seed)
	if err := exception.Create(file, exception.Params{Geometry: geo, LogSize: 32 << 10}); err != nil {
		t.Fatal(err)
	}
	mem := crash.NewMemory()
	var capacity int64
	if rng.IntN(2) == 0 { // as on a block device, which keeps what was in a slot
		capacity = 2 << 20
		if err := file.Truncate(capacity); err != nil {
			t.Fatal(err)
		}
	}
	open := func() *cow.Device {
		s, err := exception.Open(file, exception.Options{Memory: mem, Capacity: capacity})
		if err != nil {
			t.Fatalf("seed %d: open: %v", seed, err)
		}
		return cow.New(origin, s, cow.Options{})
	}
	d := open()
	check := func(when string) {
		got := make([]byte, geo.Size)
		if _, err := d.ReadAt(got, 0); err != nil {
			t.Fatalf("seed %d: read %s: %v", seed, when, err)
		}
		if !bytes.Equal(got, want) {
			for i := range got {
				if got[i] != want[i] {
					t.Fatalf("seed %d: %s: byte %d (chunk %d) is %#x, expected %#x", seed, when, i, i/8192, got[i], want[i])
				}
			}
		}
	}
	for range 120 {
		off := rng.Int64N(geo.Size)
		n := min(rng.Int64N(20000)+1, geo.Size-off)
		if rng.IntN(2) == 0 {
			off, n = off/512*512, max(512, n/512*512)
			n = min(n, geo.Size-off)
		}
		var err error
		switch k := rng.IntN(20); {
		case k < 3:
			err = writeBatch(d, rng, want)
		case k < 9:
			p := make([]byte, n)
			if rng.IntN(6) > 0 {
				for i := range p {
					p[i] = byte(rng.Uint32())
				}
			}
			_, err = d.WriteAt(p, off)
			copy(want[off:], p)
		case k < 11:
			err = d.Trim(off, n)
			clear(want[off : off+n])
		case k < 13:
			flags := block.ZeroFlags(0)
			if rng.IntN(2) == 0 {
				flags = block.NoHole
			}
			err = d.WriteZeroes(off, n, flags)
			clear(want[off : off+n])
		case k < 17:
			err = d.Flush()
		case k == 17 && rng.IntN(3) == 0:
			err = merge.Into(t.Context(), origin.File, d.Store(), merge.Options{
				Identify: func() ([]byte, error) { return nil, nil },
			})
			merged := make([]byte, geo.Size)
			if _, e := origin.File.ReadAt(merged, 0); e != nil || !bytes.Equal(merged, want) {
				t.Fatalf("seed %d: the merged base differs from the device before (error %v)", seed, e)
			}
		case k == 17:
			if err = d.Store().Close(); err != nil {
				break
			}
			file = file.Kill(nil)
			d = open()
		default: // the process dies
			file = file.Kill(func() { mem = mem.Copy() })
			d = open()
		}
		if err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		check("after a step")
	}
	// A power cut after a flush loses nothing.
	if err := d.Flush(); err != nil {
		t.Fatal(err)
	}
	mem = crash.NewMemory()
	file = file.Crash(rng)
	d = open()
	check("after a power cut")
}

// writeBatch does some writes at once, of which some may overlap, and some are
// of zeros.
func writeBatch(d *cow.Device, rng *rand.Rand, want []byte) error {
	w := make([]block.Write, 1+rng.IntN(12))
	for i := range w {
		off := rng.IntN(len(want)) / 512 * 512
		n := min(512*(1+rng.IntN(4)), len(want)-off)
		if rng.IntN(8) == 0 {
			n = min(n, 100)
		}
		w[i] = block.Write{Data: bytes.Repeat([]byte{byte(rng.IntN(5))}, n), Off: int64(off)}
		copy(want[off:], w[i].Data)
	}
	d.WriteBatch(w)
	for i := range w {
		if w[i].Err != nil {
			return w[i].Err
		}
	}
	return nil
}
