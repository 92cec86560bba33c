package disktest

import (
	"fmt"
	"syscall"
)

// A Kind is the kind of an operation.
type Kind uint8

// The kinds of operation, each a method of disk.File.
const (
	Read Kind = iota
	Write
	WriteSync
	Sync
	Punch
	Truncate
)

func (k Kind) String() string {
	return [...]string{"read", "write", "write-sync", "sync", "punch", "truncate"}[k]
}

// Changes reports whether operations of the kind change the file or make it
// durable.
func (k Kind) Changes() bool { return k != Read }

// An Op is one operation on a file.
type Op struct {
	N        uint64 // counted from 1
	Kind     Kind
	Off, Len int64 // bytes; Off is the new size of a Truncate
	Failed   bool  // a fault was injected
	Sum      uint32
}

func (o Op) String() string {
	s := fmt.Sprintf("%d: %v %d+%d", o.N, o.Kind, o.Off, o.Len)
	if o.Kind == Write || o.Kind == WriteSync {
		s += fmt.Sprintf(" (%08x)", o.Sum)
	}
	if o.Failed {
		s += " failed"
	}
	return s
}

// A Phase is a moment inside an operation.
type Phase uint8

// The phases, in order. Reads have the first only, one-sector writes no Half.
const (
	Begin   Phase = iota // nothing done yet
	Half                 // half of the bytes are in the page cache
	Applied              // the page cache has it all; of a Sync: it is under way
	Done                 // of Sync and WriteSync: durable
)

func (p Phase) String() string {
	return [...]string{"begin", "half", "applied", "done"}[p]
}

// A Fault says how an operation fails.
type Fault struct {
	Err  error // nil: it does not
	Done int64 // bytes read, written or punched before that, at most
}

func (f Fault) errorFor(op Op) error {
	return fmt.Errorf("disktest: %v: %w", op, f.Err)
}

// FailNth returns an Inject that fails the nth operation (from 1) of those
// that match, and no other. The counting is not for several goroutines.
func FailNth(n int, fault Fault, match func(Op) bool) func(Op) Fault {
	return func(op Op) Fault {
		if !match(op) {
			return Fault{}
		}
		n--
		if n != 0 {
			return Fault{}
		}
		return fault
	}
}

// SetSpace makes the disk one on which the file may take up at most n bytes,
// counted in pages of 4 KiB; 0 is no limit. What it has it keeps.
func (f *File) SetSpace(n int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.maxPages = 0
	if n > 0 {
		f.maxPages = max(1, int(n/pageSize))
	}
}

// room returns how many of n bytes at off find space.
func (f *File) room(off int64, n int) int {
	if f.maxPages == 0 || n == 0 {
		return n
	}
	free := f.maxPages - f.view.n
	for i := off / pageSize; i <= (off+int64(n)-1)/pageSize; i++ {
		if f.view.get(i) != nil {
			continue
		}
		if free <= 0 {
			return int(max(0, i*pageSize-off))
		}
		free--
	}
	return n
}

func noSpace(op Op) error { return Fault{Err: syscall.ENOSPC}.errorFor(op) }
