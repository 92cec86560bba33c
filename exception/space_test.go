package exception

import (
	"errors"
	"math/rand/v2"
	"testing"
)

// A space hands out nothing twice, nothing that was dropped before it was made
// free again, and everything when there is nothing else.
func TestSpace(t *testing.T) {
	const limit = 300
	for seed := range uint64(200) {
		rng := rand.New(rand.NewPCG(seed, 1))
		var s space
		used := newBitmap(limit)
		taken := make(map[uint32]bool)
		for range rng.IntN(40) {
			n, m := uint32(1+rng.IntN(limit-16)), uint64(1+rng.IntN(1<<16-1))
			free := true
			for i := range uint32(16) {
				free = free && (m>>i&1 == 0 || !taken[n+i])
			}
			if got := newBitmapWith(used).set(n, m); got != free {
				t.Fatalf("seed %d: set %d %#x reports %v, expected %v", seed, n, m, got, free)
			}
			if !free {
				continue
			}
			used.set(n, m)
			for i := range uint32(16) {
				if m>>i&1 != 0 {
					taken[n+i] = true
				}
			}
		}
		s.fill(used, limit)
		dropped := make(map[uint32]bool)
		for range 2000 {
			switch rng.IntN(4) {
			case 0, 1:
				n := uint32(1 + rng.IntN(20))
				least := 1 + rng.Uint32N(n)
				x, err := s.take(n, least)
				if err != nil {
					if !errors.Is(err, ErrFull) {
						t.Fatal(err)
					}
					if least == 1 && len(taken)+len(dropped) < limit {
						t.Fatalf("seed %d: full with %d taken and %d dropped of %d", seed, len(taken), len(dropped), limit)
					}
					continue
				}
				if x.n < least || x.n > n || x.first < 1 || x.end() > limit+1 {
					t.Fatalf("seed %d: took %+v, asked for %d to %d", seed, x, least, n)
				}
				for i := x.first; i < x.end(); i++ {
					if taken[i] || dropped[i] {
						t.Fatalf("seed %d: %d of %+v was not free", seed, i, x)
					}
					taken[i] = true
				}
			case 2:
				for i := range taken {
					delete(taken, i)
					dropped[i] = true
					s.drop(extent{i, 1})
					break
				}
			default:
				if rng.IntN(20) > 0 {
					continue
				}
				s.drainAfter(2, s.takePending())
				if x := s.takeDrained(1); x != nil {
					t.Fatalf("seed %d: %v drained while a reader is there", seed, x)
				}
				x := s.takeDrained(2)
				if rng.IntN(2) == 0 {
					x = withPagesWhole(t, &s, x)
				}
				s.add(x)
				clear(dropped)
			}
			for i := 1; i < len(s.free); i++ {
				if s.free[i-1].end() >= s.free[i].first {
					t.Fatalf("seed %d: free extents %v", seed, s.free)
				}
			}
		}
	}
}

// withPagesWhole returns what withPages does of pages of four, and holds it to
// being all that is free in the pages of x and adjoins x, and no more.
func withPagesWhole(t *testing.T, s *space, x []extent) []extent {
	t.Helper()
	isFree, isNew := make(map[uint32]bool), make(map[uint32]bool)
	for _, e := range s.free {
		for i := e.first; i < e.end(); i++ {
			isFree[i] = true
		}
	}
	for _, e := range x {
		for i := e.first; i < e.end(); i++ {
			isNew[i] = true
		}
	}
	want := make(map[uint32]bool)
	for n := range isNew {
		want[n] = true
		for i := n - 1; i > 0 && isFree[i] && (i-1)/4 == (n-1)/4; i-- {
			want[i] = true
		}
		for i := n + 1; isFree[i] && (i-1)/4 == (n-1)/4; i++ {
			want[i] = true
		}
	}
	all := s.withPages(x, 4)
	n := 0
	for _, e := range all {
		for i := e.first; i < e.end(); i++ {
			if n++; !want[i] {
				t.Fatalf("%d is taken with %v", i, x)
			}
		}
	}
	if n != len(want) {
		t.Fatalf("%v is taken with %v, expected %d", all, x, len(want))
	}
	return all
}

// newBitmapWith returns a copy of b.
func newBitmapWith(b *bitmap) *bitmap {
	c := &bitmap{make([]*[bitmapPage]uint64, len(b.pages))}
	for i, p := range b.pages {
		if p != nil {
			words := *p
			c.pages[i] = &words
		}
	}
	return c
}

// A large free extent is found again behind many small ones: what was never
// used is not taken instead for ever, which would make the file ever longer.
func TestSpaceBehindSmallPieces(t *testing.T) {
	const small, large = 1000, 4000
	s := space{next: 2*small + large + 1, limit: 1 << 20}
	for i := range uint32(small) {
		s.free = append(s.free, extent{2*i + 1, 1})
	}
	s.free = append(s.free, extent{2*small + 1, large})
	end := s.next
	for range large/4 - 1 {
		if _, err := s.take(4, 1); err != nil {
			t.Fatal(err)
		}
	}
	if most := uint32(4 * (small/maxLook + 1)); s.next-end > most {
		t.Errorf("%d that were never used are taken beside a free extent of %d, expected at most %d", s.next-end, large, most)
	}
}

// What is taken and given back costs, where a million pieces are free.
func BenchmarkSpace(b *testing.B) {
	const pieces = 1 << 20
	fragmented := func() *space {
		s := &space{name: "slots", next: 4 * pieces, limit: 1 << 30}
		for i := range uint32(pieces) {
			s.free = append(s.free, extent{4*i + 1, 1 + i%2})
		}
		return s
	}
	b.Run("take", func(b *testing.B) {
		s := fragmented()
		for b.Loop() {
			if _, err := s.take(2, 1); err != nil { // the second piece, or from behind all
				b.Fatal(err)
			}
			s.free[1].n = 2
		}
	})
	b.Run("add", func(b *testing.B) {
		s := fragmented()
		rng := rand.New(rand.NewPCG(1, 1))
		for b.Loop() {
			i := rng.IntN(len(s.free) - 1)
			x := extent{s.free[i].end(), 1}
			if x.end() >= s.free[i+1].first {
				continue
			}
			s.add([]extent{x})
		}
	})
}
