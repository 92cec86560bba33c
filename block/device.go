package block

import (
	"errors"
	"fmt"
)

// State says where a run of bytes comes from.
type State uint8

// The states of an extent. Deeper layers will be told by higher bits.
const (
	FromBase State = iota // the origin's bytes
	Stored                // bytes in the exception store
	Zero                  // reads as zeros, recorded so in the store
)

func (s State) String() string {
	switch s {
	case FromBase:
		return "base"
	case Stored:
		return "stored"
	case Zero:
		return "zero"
	}
	return fmt.Sprintf("State(%d)", uint8(s))
}

// An Extent is a run of bytes in one state. Hole says that the bytes are known
// to read as zeros and take no space: in the base a hole of its file, in the
// store a recorded zero.
type Extent struct {
	Off, N int64
	State  State
	Hole   bool
}

// End returns the offset after the extent.
func (e Extent) End() int64 { return e.Off + e.N }

// A Reader is an image that can be read at any offset by several goroutines at
// once. ReadAt follows io.ReaderAt.
type Reader interface {
	ReadAt(p []byte, off int64) (int, error)
	Size() int64
}

// ZeroFlags change what WriteZeroes does.
type ZeroFlags uint8

// Flags of WriteZeroes, as NBD_CMD_FLAG_NO_HOLE and NBD_CMD_FLAG_FAST_ZERO.
const (
	NoHole   ZeroFlags = 1 << iota // afterwards the range has its space allocated and is reported as data
	FastZero                       // fail with ENOTSUP rather than be as slow as a write
)

// A Device is what a server exports. All methods may be called at once by any
// number of goroutines; ranges lie inside the device. Errors wrap a
// syscall.Errno where one says what happened (ENOSPC, EPERM, EIO).
type Device interface {
	Reader

	// WriteAt writes all of p or returns an error, after which each sector of
	// the range is its old or its new self.
	WriteAt(p []byte, off int64) (int, error)

	// WriteZeroes makes [off, off+n) read as zeros.
	WriteZeroes(off, n int64, flags ZeroFlags) error

	// Trim makes [off, off+n) read as zeros and gives the space back.
	Trim(off, n int64) error

	// Flush returns when every change whose call returned before Flush was
	// called would be found again after any crash.
	Flush() error

	// Cache begins to bring [off, off+n) into memory; it need not wait.
	Cache(off, n int64) error

	// Extents returns runs that begin at off and follow one another without
	// gap, covering [off, off+n) or, when there are more than limit runs, as
	// much of it as limit runs do (limit at least 1).
	Extents(off, n int64, limit int) ([]Extent, error)

	// ReadOnly says that every change is refused with EPERM.
	ReadOnly() bool
}

// A Write is one of several that a device does together. Err says how it went,
// as WriteAt would.
type Write struct {
	Data []byte
	Off  int64
	Err  error
}

// ErrAlone says that a write of a batch was left to be done by WriteAt, since it
// may have to wait for long, as for room on a full disk.
var ErrAlone = errors.New("a write to be done by itself")

// A BatchWriter is a Device for which several short writes together cost less
// than one by one.
type BatchWriter interface {
	Device
	// WriteBatch does all of w as WriteAt would, in any order where they do
	// not overlap, but those whose Err is ErrAlone afterwards.
	WriteBatch(w []Write)
}

// A Sessioner is a Device that can hand out the memory its bytes lie in.
type Sessioner interface {
	Device
	// Session returns a session for one goroutine's use.
	Session() Session
}

// A Session is one connection's short way into a device: views of the bytes
// where they lie, so that a reply is sent without copying them first.
// It is used by one goroutine at a time.
type Session interface {
	// View appends to vecs the pieces that hold [off, off+n), at most 2 KiB
	// of pieces in all, and reports whether it could: false says that some
	// bytes are not known to be in memory and readable, or that the pieces
	// would be too many, and vecs comes back as it was; Device.ReadAt is then
	// the way. The pieces are read only, and hold the bytes until Done.
	View(vecs [][]byte, off, n int64) ([][]byte, bool)

	// Done says that every piece handed out since the last Done is no longer
	// looked at. A session that was handed pieces must not rest without it:
	// space of dropped blocks is given back only after it.
	Done()

	// Close ends the session.
	Close()
}
