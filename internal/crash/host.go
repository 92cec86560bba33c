package crash

import (
	"fmt"
	"io"
	"time"

	"github.com/cowdev/cowdev/block"
	"github.com/cowdev/cowdev/cow"
	"github.com/cowdev/cowdev/exception"
	"github.com/cowdev/cowdev/internal/disktest"
)

// A Host runs the device of a walk: in this process, or in the real program.
type Host interface {
	// Params completes what the store is made with.
	Params(p *exception.Params) error

	// Start opens the store in f for a session. m is what the memory of live
	// tables holds.
	Start(f *disktest.File, m exception.Memory) (Session, error)

	// NewMemory returns the memory as a boot makes it: what was there is lost.
	NewMemory() exception.Memory
}

// A Session is a device that runs.
type Session interface {
	// Device returns the device for the use of one client.
	Device(client int) (block.Device, error)

	// Adopted reports whether the store was taken over from a dead process.
	Adopted() bool

	// Broken reports whether the store says that it is broken.
	Broken() bool

	// Memory returns the memory as the next process finds it, if this one
	// dies now; nil if that can be told of the dead only.
	Memory() exception.Memory

	// Die is called at the moment of the process's death, while no operation
	// on the file takes effect, and returns the memory that is left.
	Die() exception.Memory

	// Close ends the session in order.
	Close() error

	// Bury returns when nothing of the session runs any more. It is called
	// last, also after Close.
	Bury()
}

// memoryHost runs the device in this process.
type memoryHost struct {
	base     []byte
	commits  bool // some sessions commit by themselves
	sessions int
}

func (h *memoryHost) Params(*exception.Params) error { return nil }

func (h *memoryHost) NewMemory() exception.Memory { return NewMemory() }

func (h *memoryHost) Start(f *disktest.File, m exception.Memory) (Session, error) {
	h.sessions++
	o := exception.Options{Memory: m}
	if h.commits && h.sessions%5 == 0 {
		o.Interval = time.Millisecond
	}
	s, dev, err := open(h.base, f, o)
	if err != nil {
		return nil, err
	}
	return &memorySession{mem: m.(*Memory), store: s, dev: dev}, nil
}

type memorySession struct {
	mem   *Memory
	store *exception.Store
	dev   *cow.Device
	ended bool
}

func (s *memorySession) Device(int) (block.Device, error) { return s.dev, nil }
func (s *memorySession) Adopted() bool                    { return s.store.Adopted() }
func (s *memorySession) Broken() bool                     { return s.store.Broken() != nil }
func (s *memorySession) Memory() exception.Memory         { return s.mem.Copy() }
func (s *memorySession) Die() exception.Memory            { return s.mem.Copy() }

func (s *memorySession) Close() error {
	s.ended = true
	if err := s.dev.Close(); err != nil {
		return err
	}
	return s.store.Close()
}

// Bury lets what still runs see that the file is gone.
func (s *memorySession) Bury() {
	if !s.ended {
		s.ended = true
		s.store.Abandon()
	}
}

// open opens the store in f over a base that reads as base.
func open(base []byte, f *disktest.File, o exception.Options) (*exception.Store, *cow.Device, error) {
	s, err := exception.Open(f, o)
	if err != nil {
		return nil, nil, fmt.Errorf("open: %w", err)
	}
	return s, cow.New(memoryBase(base), s, cow.Options{ReadOnly: o.ReadOnly}), nil
}

// memoryBase is a base image in memory.
type memoryBase []byte

func (b memoryBase) Size() int64 { return int64(len(b)) }

func (b memoryBase) ReadAt(p []byte, off int64) (int, error) {
	n := copy(p, b[min(off, int64(len(b))):])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}
