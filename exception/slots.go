package exception

import (
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
)

// slots says which slots are free. Taken ones are known by the entries alone.
// A dropped slot goes through three lists, and nobody takes it before the end
// (R19): pending, until a commit that no longer names it is durable; draining,
// until every reader that might still see it has gone; free, once punched.
type slots struct {
	mu       sync.Mutex
	next     uint32 // never used before
	limit    uint32 // the file has no room for slots from here on
	free     []uint32
	pending  []uint32
	draining []drain
}

// drain is a batch of slots, waiting for the readers of before an epoch.
type drain struct {
	epoch uint64
	slots []uint32
}

// take returns a slot that no chunk has and no reader sees, or ErrFull.
func (s *slots) take() (uint32, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if n := len(s.free); n > 0 {
		slot := s.free[n-1]
		s.free = s.free[:n-1]
		return slot, nil
	}
	if s.next >= s.limit {
		return 0, fmt.Errorf("%w: all %d slots are taken", ErrFull, s.limit-1)
	}
	s.next++
	return s.next - 1, nil
}

// drop gives up a slot that the live table no longer names.
func (s *slots) drop(slot uint32) {
	s.mu.Lock()
	s.pending = append(s.pending, slot)
	s.mu.Unlock()
}

// takePending returns the slots dropped so far. Entries that are loaded after
// it do not name them.
func (s *slots) takePending() []uint32 {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.pending
	s.pending = nil
	return p
}

// drainAfter takes slots that no durable record names any more.
func (s *slots) drainAfter(epoch uint64, slots []uint32) {
	if len(slots) == 0 {
		return
	}
	s.mu.Lock()
	s.draining = append(s.draining, drain{epoch, slots})
	s.mu.Unlock()
}

// takeDrained returns the slots whose readers have gone: nobody reads from
// before epoch any more.
func (s *slots) takeDrained(epoch uint64) []uint32 {
	s.mu.Lock()
	defer s.mu.Unlock()
	var done []uint32
	for len(s.draining) > 0 && s.draining[0].epoch <= epoch {
		done = append(done, s.draining[0].slots...)
		s.draining = s.draining[1:]
	}
	return done
}

// waiting reports whether slots wait to become free.
func (s *slots) waiting() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.pending)+len(s.draining) > 0
}

// add puts slots on the free list, so that the lowest are taken first.
func (s *slots) add(free []uint32) {
	if len(free) == 0 {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.free = append(s.free, free...)
	slices.SortFunc(s.free, func(a, b uint32) int { return int(b) - int(a) })
}

// readers knows who may still look at slots.
type readers struct {
	epoch atomic.Uint64 // raised when slots begin to drain; begins at 1
	mu    sync.Mutex
	all   map[*Pin]struct{}
	spare []*Pin
}

// A Pin keeps slots from being given to another chunk while somebody reads
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
