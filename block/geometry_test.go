package block_test

import (
	"math/rand/v2"
	"testing"

	"github.com/cowdev/cowdev/block"
)

// Spans of random ranges cover each byte once, in order, inside their chunks;
// Cover agrees with a count of each block's bytes.
func TestSpansAndCover(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for range 2000 {
		g := block.Geometry{Size: 1 + rng.Int64N(200_000), ChunkSize: 8192 << rng.IntN(4)}
		off := rng.Int64N(g.Size)
		n := rng.Int64N(g.Size - off + 1)
		at := off
		for s := range g.Spans(off, n) {
			if s.N < 1 || s.Off+s.N > g.Len(s.Chunk) || g.Offset(s.Chunk)+int64(s.Off) != at || s.Pos != at-off {
				t.Fatalf("%+v: span %+v of %d bytes at %d", g, s, n, off)
			}
			at += int64(s.N)
			touched, filled := g.Cover(s.Chunk, s.Off, s.N)
			for b := range block.BlocksPerChunk {
				from, to := b*g.BlockSize(), min((b+1)*g.BlockSize(), g.Len(s.Chunk))
				have := min(to, s.Off+s.N) - max(from, s.Off)
				if touched.Has(b) != (have > 0) || filled.Has(b) != (have > 0 && have == to-from) {
					t.Fatalf("%+v: span %+v: block %d of %d bytes: touched %v, filled %v", g, s, b, to-from, touched.Has(b), filled.Has(b))
				}
			}
		}
		if at != off+n {
			t.Fatalf("%+v: spans of %d bytes at %d end at %d", g, n, off, at)
		}
	}
}

func TestMaskRun(t *testing.T) {
	for _, test := range []struct {
		mask block.Mask
		from int
		end  int
		set  bool
	}{
		{0, 0, 16, false},
		{block.AllBlocks, 3, 16, true},
		{0x00f0, 0, 4, false},
		{0x00f0, 4, 8, true},
		{0x8000, 15, 16, true},
		{0x7fff, 15, 16, false},
	} {
		if end, set := test.mask.Run(test.from); end != test.end || set != test.set {
			t.Errorf("%#x from %d: run to %d, set %v; expected %d, %v", test.mask, test.from, end, set, test.end, test.set)
		}
	}
}

func TestGeometryLimits(t *testing.T) {
	for _, test := range []struct {
		g  block.Geometry
		ok bool
	}{
		{block.Geometry{Size: 1, ChunkSize: 8192}, true},
		{block.Geometry{Size: 0, ChunkSize: 8192}, false},
		{block.Geometry{Size: 1, ChunkSize: 4096}, false},
		{block.Geometry{Size: 1, ChunkSize: 12288}, false},
		{block.Geometry{Size: 1, ChunkSize: 2 << 20}, false},
		{block.Geometry{Size: block.MaxChunks * 8192, ChunkSize: 8192}, true},
		{block.Geometry{Size: block.MaxChunks*8192 + 1, ChunkSize: 8192}, false},
		{block.Geometry{Size: 1<<63 - 1, ChunkSize: 1 << 20}, false},
	} {
		if err := test.g.Validate(); (err == nil) != test.ok {
			t.Errorf("%+v: %v", test.g, err)
		}
	}
}
