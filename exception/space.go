package exception

import (
	"cmp"
	"fmt"
	"iter"
	"math/bits"
	"slices"
	"sync"
	"sync/atomic"
)

// A space hands out numbers from 1: slots, or rows counted from 1. Taken ones
// are known by the entries alone. What is dropped goes through three lists, and
// nobody takes it before the end (R19): pending, until a commit that no longer
// names it is durable; draining, until every reader that might still see it
// has gone; free.
type space struct {
	name string // of what is handed out, plural

	mu       sync.Mutex
	next     uint32   // never used before
	limit    uint32   // there is no room from here on
	free     []extent // in order, never neighbours
	rover    uint32   // take looks on from here for what is not among the lowest
	pending  []extent
	draining []drain
}

// An extent is n numbers from first on.
type extent struct{ first, n uint32 }

func (e extent) end() uint32 { return e.first + e.n }

func byFirst(a, b extent) int { return cmp.Compare(a.first, b.first) }

// drain is a batch of extents, waiting for the readers of before an epoch.
type drain struct {
	epoch   uint64
	extents []extent
}

// maxLook is how many free extents are looked at for one that is long enough,
// of the lowest and of those from the rover on.
const maxLook = 16

// take returns n neighbours, or at least as many as least, that nobody has and
// no reader sees, or ErrFull: among the lowest, but rather n at another place
// than fewer. Free ones are taken before those that were never used, as far as
// that is known without a look at all of them.
func (s *space) take(n, least uint32) (extent, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range min(len(s.free), maxLook) {
		if s.free[i].n >= n {
			return s.cut(i, n), nil
		}
	}
	if i, ok := s.rove(n); ok {
		return s.cut(i, n), nil
	}
	left := s.limit - s.next
	switch {
	case left >= n:
	case len(s.free) > 0 && s.free[0].n >= least:
		return s.cut(0, s.free[0].n), nil
	case left < least:
		return extent{}, fmt.Errorf("%w: all %d %s are taken", ErrFull, s.limit-1, s.name)
	}
	x := extent{s.next, min(n, left)}
	s.next = x.end()
	return x, nil
}

// rove looks for a free extent of more than n, so that something is left of it
// and none moves, a few further each time, and stays with one that it found:
// small ones below do not hide a large one for long.
func (s *space) rove(n uint32) (i int, ok bool) {
	if len(s.free) <= maxLook {
		return 0, false
	}
	i, _ = slices.BinarySearchFunc(s.free, extent{first: s.rover}, byFirst)
	for end := min(i+maxLook, len(s.free)); i < end; i++ {
		if s.free[i].n > n {
			s.rover = s.free[i].first + n
			return i, true
		}
	}
	s.rover = 0
	if i < len(s.free) {
		s.rover = s.free[i].first
	}
	return 0, false
}

// cut takes n from the beginning of the free extent i.
func (s *space) cut(i int, n uint32) extent {
	x := &s.free[i]
	got := extent{x.first, n}
	x.first, x.n = x.first+n, x.n-n
	if x.n == 0 { // the few before it move, not the many behind
		copy(s.free[1:], s.free[:i])
		s.free = s.free[1:]
	}
	return got
}

// drop gives up what the live table no longer names.
func (s *space) drop(x extent) {
	s.mu.Lock()
	if n := len(s.pending); n > 0 && s.pending[n-1].end() == x.first {
		s.pending[n-1].n += x.n
	} else {
		s.pending = append(s.pending, x)
	}
	s.mu.Unlock()
}

// takePending returns what was dropped so far. Entries that are loaded after
// it do not name it.
func (s *space) takePending() []extent {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.pending
	s.pending = nil
	return p
}

// drainAfter takes what no durable record names any more.
func (s *space) drainAfter(epoch uint64, x []extent) {
	if len(x) == 0 {
		return
	}
	s.mu.Lock()
	s.draining = append(s.draining, drain{epoch, x})
	s.mu.Unlock()
}

// takeDrained returns, in order and joined, what has no readers any more:
// nobody reads from before epoch.
func (s *space) takeDrained(epoch uint64) []extent {
	s.mu.Lock()
	defer s.mu.Unlock()
	var done []extent
	for len(s.draining) > 0 && s.draining[0].epoch <= epoch {
		done = append(done, s.draining[0].extents...)
		s.draining = s.draining[1:]
	}
	return joined(done)
}

// withPages returns x, which is in order, with what is free beside it in its
// pages, each of per numbers: nobody takes that then either. The last slot of
// a page that is given up takes the page with it.
func (s *space) withPages(x []extent, per uint32) []extent {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := slices.Clone(x)
	for _, e := range x {
		before, after := (e.first-1)%per, (per-(e.end()-1)%per)%per
		i, _ := slices.BinarySearchFunc(s.free, e, byFirst)
		if i > 0 && s.free[i-1].end() == e.first {
			n := min(before, s.free[i-1].n)
			s.free[i-1].n -= n
			all = append(all, extent{e.first - n, n})
		}
		i, ok := slices.BinarySearchFunc(s.free, extent{first: e.end()}, byFirst)
		if ok {
			n := min(after, s.free[i].n)
			s.free[i] = extent{e.end() + n, s.free[i].n - n}
			all = append(all, extent{e.end(), n})
		}
	}
	empty := func(e extent) bool { return e.n == 0 }
	s.free = slices.DeleteFunc(s.free, empty)
	return joined(slices.DeleteFunc(all, empty))
}

// waiting reports whether something waits to become free.
func (s *space) waiting() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.pending)+len(s.draining) > 0
}

// add makes extents free, which are in order. Writers wait meanwhile, and there
// may be millions that are free already: they are moved, but only those looked
// at that lie between the new ones.
func (s *space) add(free []extent) {
	if len(free) == 0 {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	from, to := len(s.free), 0 // where the new ones are
	s.free = append(s.free, free...)
	for k := len(free); k > 0; k-- {
		x := free[k-1]
		at, _ := slices.BinarySearchFunc(s.free[:from], x, byFirst)
		copy(s.free[at+k:], s.free[at:from])
		s.free[at+k-1] = x
		from, to = at, max(to, at+k)
	}
	from, to = max(from-1, 0), min(to+1, len(s.free)) // with their neighbours
	left := coalesced(s.free[from:to])
	s.free = slices.Delete(s.free, from+len(left), to)
}

// joined sorts extents and makes neighbours one.
func joined(x []extent) []extent {
	slices.SortFunc(x, byFirst)
	return coalesced(x)
}

// coalesced makes neighbours one in x, which is in order.
func coalesced(x []extent) []extent {
	out := x[:0]
	for _, e := range x {
		if n := len(out); n > 0 && out[n-1].end() == e.first {
			out[n-1].n += e.n
		} else {
			out = append(out, e)
		}
	}
	return out
}

// fill makes the space that of the numbers 1 to limit, of which those in used
// are taken.
func (s *space) fill(used *bitmap, limit int64) {
	s.next, s.limit = 1, uint32(limit)+1
	for x := range used.runs() {
		if s.next < x.first {
			s.free = append(s.free, extent{s.next, x.first - s.next})
		}
		s.next = x.end()
	}
	s.limit = max(s.limit, s.next)
}

// bitmap is a set of the numbers 1 to a limit, which takes memory for those
// parts that have some.
type bitmap struct{ pages []*[bitmapPage]uint64 }

const bitmapPage = 1024 // words

func newBitmap(limit int64) *bitmap {
	return &bitmap{make([]*[bitmapPage]uint64, limit/64/bitmapPage+2)}
}

// set adds n+i for each bit i of m, of which there are at most 16, and reports
// whether none was there.
func (b *bitmap) set(n uint32, m uint64) bool {
	low, high := b.word(n/64), m<<(n%64)
	free := *low&high == 0
	*low |= high
	if rest := m >> 1 >> (63 - n%64); rest != 0 {
		next := b.word(n/64 + 1)
		free = free && *next&rest == 0
		*next |= rest
	}
	return free
}

func (b *bitmap) word(i uint32) *uint64 {
	p := &b.pages[i/bitmapPage]
	if *p == nil {
		*p = new([bitmapPage]uint64)
	}
	return &(*p)[i%bitmapPage]
}

// runs yields the runs of numbers in the set, in order.
func (b *bitmap) runs() iter.Seq[extent] {
	return func(yield func(extent) bool) {
		var x extent
		for i, p := range b.pages {
			if p == nil {
				continue
			}
			for k, w := range p {
				first := uint32(i*bitmapPage+k) * 64
				for w != 0 {
					from := uint32(bits.TrailingZeros64(w))
					n := uint32(bits.TrailingZeros64(^(w >> from)))
					if x.n > 0 && x.end() == first+from {
						x.n += n
					} else if x.n > 0 && !yield(x) {
						return
					} else {
						x = extent{first + from, n}
					}
					if from+n == 64 {
						break
					}
					w &= ^uint64(0) << (from + n)
				}
			}
		}
		if x.n > 0 {
			yield(x)
		}
	}
}

// readers knows who may still look at slots.
type readers struct {
	epoch atomic.Uint64 // raised when slots begin to drain; begins at 1
	mu    sync.Mutex
	all   map[*Pin]struct{}
	spare []*Pin
}

// A Pin keeps slots and rows from being given to another chunk while somebody reads
// them. Between Enter and Leave the bytes of every slot that an entry named
// are those of its chunk. It is used by one goroutine at a time.
type Pin struct {
	at atomic.Uint64 // the epoch it entered in, 0 outside
	r  *readers
	_  [40]byte // apart from others in the cache
}

// Pin returns a new pin.
func (s *Store) Pin() *Pin { return s.readers.get() }

func (r *readers) get() *Pin {
	r.mu.Lock()
	defer r.mu.Unlock()
	if n := len(r.spare); n > 0 {
		p := r.spare[n-1]
		r.spare = r.spare[:n-1]
		return p
	}
	p := &Pin{r: r}
	if r.all == nil {
		r.all = make(map[*Pin]struct{})
	}
	r.all[p] = struct{}{}
	return p
}

// Close gives the pin back. It has been left.
func (p *Pin) Close() {
	p.at.Store(0)
	p.r.mu.Lock()
	p.r.spare = append(p.r.spare, p)
	p.r.mu.Unlock()
}

// Enter begins to hold. An entry is loaded after it.
func (p *Pin) Enter() { p.at.Store(p.r.epoch.Load()) }

// Leave ends to hold.
func (p *Pin) Leave() { p.at.Store(0) }

// advance begins a new epoch and returns it: who enters from now on sees the
// entries as they are now.
func (r *readers) advance() uint64 { return r.epoch.Add(1) }

// oldest returns the earliest epoch that somebody is in, or the present one.
func (r *readers) oldest() uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	old := r.epoch.Load()
	for p := range r.all {
		if at := p.at.Load(); at != 0 && at < old {
			old = at
		}
	}
	return old
}
