package exception

import "github.com/cowdev/cowdev/block"

// maxNew is how many bytes new slots get at once: longer writes make larger
// folios in the page cache, all of whose blocks ext4 looks at in each later
// write to one of them.
const maxNew = 16 << 10

// A Batch gathers short writes of chunks that lie anywhere, whose new blocks
// then take neighbouring slots and one system call. It is used by one
// goroutine at a time, which holds no claim and waits for nothing while the
// batch holds a write.
type Batch struct {
	s      *Store
	writes []gathered
	vecs   [][]byte
	blocks int // of writes
	most   int // of blocks
}

type gathered struct {
	chunk  block.Chunk
	block  int
	blocks int
}

// NewBatch returns an empty batch.
func (s *Store) NewBatch() *Batch {
	return &Batch{s: s, most: min(max(1, maxNew/s.geo.BlockSize()), block.BlocksPerChunk)}
}

// Add takes the write of p at off of chunk c, and reports whether it could. It
// cannot when p is not whole blocks, or somebody else or the batch itself holds
// the claim, or some of the blocks are stored and some are not, or the batch is
// full. Blocks that are stored are written at once; else it says that the write
// was put off: p is kept, and the claim of its chunk held, until Write.
func (b *Batch) Add(c block.Chunk, off int, p []byte) (added, putOff bool) {
	s, bs := b.s, b.s.geo.BlockSize()
	n := len(p) / bs
	if n == 0 || off%bs != 0 || len(p)%bs != 0 || b.blocks+n > b.most || s.writable() != nil || !s.live.tryClaim(c) {
		return false, false
	}
	switch m := block.Bits(off/bs, n); s.live.load(c).Stored() & m {
	case 0:
		b.writes = append(b.writes, gathered{c, off / bs, n})
		b.vecs = append(b.vecs, p)
		b.blocks += n
		return true, true
	case m:
		err := s.Put(c, off, p)
		s.Release(c)
		return err == nil, false
	}
	s.Release(c)
	return false, false
}

// Write does what Add put off, and returns how many writes it has done: after
// an error the rest, which is as though it had never been added.
func (b *Batch) Write() (done int, err error) {
	if len(b.writes) == 0 {
		return 0, nil
	}
	done, err = b.write()
	for _, w := range b.writes {
		b.s.Release(w.chunk)
	}
	clear(b.vecs)
	b.writes, b.vecs, b.blocks = b.writes[:0], b.vecs[:0], 0
	return done, err
}

func (b *Batch) write() (done int, err error) {
	s := b.s
	for _, w := range b.writes {
		if err := s.prepare(w.chunk); err != nil {
			return 0, err
		}
	}
	x, err := s.slots.take(uint32(b.blocks), uint32(b.blocks))
	if err != nil {
		return 0, err
	}
	s.grow(x)
	at := s.slotOff(x.first)
	if err := s.file.WriteVecAt(b.vecs, at); err != nil {
		s.slots.drop(x) // punched before anybody takes it again
		return 0, s.writeError(b.writes[0].chunk, at, err)
	}
	for i, w := range b.writes {
		n := uint32(w.blocks)
		if err := s.publish(w.chunk, w.block, extent{x.first, n}); err != nil {
			s.slots.drop(x)
			return i, err
		}
		x = extent{x.first + n, x.n - n}
	}
	return len(b.writes), nil
}
