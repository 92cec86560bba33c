package exception

import (
	"math/rand/v2"
	"testing"

	"github.com/cowdev/cowdev/block"
	"github.com/cowdev/cowdev/internal/disktest"
)

// crashedStore returns the bytes of a small store with a table and a log.
func crashedStore(tb testing.TB) []byte {
	f := disktest.New(1)
	geo := block.Geometry{Size: 8192 * 70, ChunkSize: 8192}
	if err := Create(f, Params{Geometry: geo, LogSize: 32 << 10}); err != nil {
		tb.Fatal(err)
	}
	for session := range 2 {
		s, err := Open(f, Options{})
		if err != nil {
			tb.Fatal(err)
		}
		for c := range block.Chunk(3) {
			edit(tb, s, c+block.Chunk(session), byte(c))
			if err := s.Flush(); err != nil {
				tb.Fatal(err)
			}
		}
		if session == 0 {
			if err := s.Close(); err != nil {
				tb.Fatal(err)
			}
			f = disktest.FromBytes(1, f.Bytes())
		}
	}
	return f.Crash(rand.New(rand.NewPCG(1, 1))).Bytes()
}

func edit(tb testing.TB, s *Store, c block.Chunk, v byte) {
	s.Claim(c)
	defer s.Release(c)
	p := make([]byte, 1024)
	p[0] = v
	if err := s.Put(c, 512, p); err != nil && s.Broken() == nil {
		tb.Fatal(err)
	}
	if err := s.Zero(c, 1<<9); err != nil && s.Broken() == nil {
		tb.Fatal(err)
	}
}

// FuzzOpen changes bytes of a store anywhere in superblocks, table and log,
// makes the checksums right again if told so, and uses what opens. Nothing
// panics, and what opened can be written, closed and opened again.
func FuzzOpen(f *testing.F) {
	image := crashedStore(f)
	f.Add(true, []byte{0, 0, 88, 0, 0, 1, 0, 7})
	f.Add(false, []byte{1, 0, 88, 200, 2, 1, 0, 7})
	f.Fuzz(func(t *testing.T, right bool, edits []byte) {
		p := append([]byte(nil), image...)
		areas := []int{superA, superB, tableOff, tableOff + 4096 + 0xf000}
		areas[3] = int((&Header{Geometry: block.Geometry{Size: 8192 * 70, ChunkSize: 8192}, logLen: 32 << 10}).logOff())
		for ; len(edits) >= 4; edits = edits[4:] {
			at := areas[edits[0]%4] + (int(edits[1])<<8|int(edits[2]))%4096
			if at < len(p) {
				p[at] ^= edits[3]
			}
		}
		if right {
			mendSums(p, areas)
		}
		if _, err := Check(disktest.FromBytes(1, p)); err != nil {
			return
		}
		g := disktest.FromBytes(1, p)
		for range 2 {
			s, err := Open(g, Options{})
			if err != nil {
				return
			}
			buf := make([]byte, s.Geometry().BlockSize())
			for c, e := range s.Entries(0) {
				for b := range block.BlocksPerChunk {
					if e.State(b) == block.Stored {
						s.ReadStored(buf, c, e, b*len(buf))
					}
				}
			}
			if s.Geometry().ChunkSize == 8192 && s.Geometry().Chunks() > 5 && s.Header().State != Frozen {
				edit(t, s, 5, 1)
				s.Flush()
			}
			s.Close()
			g = disktest.FromBytes(1, g.Bytes())
		}
	})
}

// mendSums makes the checksums of the superblocks, the first table sector and
// the first log record right.
func mendSums(p []byte, areas []int) {
	var u UUID
	for _, at := range areas[:2] {
		q := p[at : at+pageSize]
		copy(u[:], q[40:])
		le.PutUint32(q[pageSize-4:], checksum(u, uint64(at), q[:pageSize-4]))
	}
	q := p[areas[2] : areas[2]+sectorSize]
	le.PutUint32(q[504:], sectorSum(q, u, 0))
	log := p[areas[3]:]
	if n := int(le.Uint32(log[24:])); n >= pageSize && n <= len(log) {
		le.PutUint32(log[40:], 0)
		le.PutUint32(log[40:], checksum(u, 0, log[:n]))
	}
}
