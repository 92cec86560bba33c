package crash

import (
	"maps"
	"sync"
	"sync/atomic"
	"syscall"
	"unsafe"

	"github.com/cowdev/cowdev/exception"
)

// A Memory is the memory in which stores keep their live tables, as it
// outlives a process: whoever attaches finds what the one before left.
type Memory struct {
	mu    sync.Mutex
	areas map[exception.UUID]*area
	full  atomic.Bool
}

// NewMemory returns an empty memory, as after a boot.
func NewMemory() *Memory { return &Memory{areas: make(map[exception.UUID]*area)} }

// Attach implements exception.Memory.
func (m *Memory) Attach(u exception.UUID, n int64) (exception.Area, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	a := m.areas[u]
	if a == nil || int64(len(a.words)) != (n+7)/8 {
		a = &area{mem: m, words: make([]atomic.Uint64, (n+7)/8), reserved: make(map[int64]bool)}
		a.forget = func() {
			m.mu.Lock()
			defer m.mu.Unlock()
			if m.areas[u] == a {
				delete(m.areas, u)
			}
		}
		m.areas[u] = a
	}
	return a, nil
}

// SetFull makes the memory one that has no more room, or has it again.
func (m *Memory) SetFull(full bool) { m.full.Store(full) }

// Lasts reports whether every store found room for the word that its live
// table is good for the next process.
func (m *Memory) Lasts() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, a := range m.areas {
		if !a.Reserved(0) {
			return false
		}
	}
	return true
}

// Copy returns the memory as the next process finds it if the present one
// dies now.
func (m *Memory) Copy() *Memory {
	m.mu.Lock()
	defer m.mu.Unlock()
	c := NewMemory()
	for u, a := range m.areas {
		b, _ := c.Attach(u, int64(len(a.words))*8)
		a.copyTo(b.(*area))
	}
	return c
}

// An area is the memory of one store.
type area struct {
	mem    *Memory
	words  []atomic.Uint64
	forget func()

	mu       sync.Mutex
	reserved map[int64]bool // by page
}

func (a *area) copyTo(b *area) {
	a.mu.Lock()
	defer a.mu.Unlock()
	b.reserved = maps.Clone(a.reserved)
	for i := range a.words {
		if a.reserved[int64(i)*8/4096] {
			b.words[i].Store(a.words[i].Load())
		}
	}
}

func (a *area) Bytes() []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(&a.words[0])), len(a.words)*8)
}

func (a *area) Reserve(off, n int64) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	for page := off / 4096; page*4096 < off+n; page++ {
		if !a.reserved[page] && a.mem.full.Load() {
			return syscall.ENOSPC
		}
		a.reserved[page] = true
	}
	return nil
}

func (a *area) Reserved(off int64) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.reserved[off/4096]
}

func (a *area) Lasting() bool { return true }

func (a *area) Release(keep bool) error {
	if !keep {
		a.forget()
	}
	return nil
}
