package nbdserver

import (
	"io"
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// Sizes of the receiving side in bytes.
const (
	receiveSize = 256 << 10 // of the buffer of a connection that has something to say
	stashSize   = 64        // a beginning of a request that waits without a buffer
	peekSize    = 1 << 10   // the first read of a stream that is not a socket
)

// input is the receiving side of a connection. It holds a buffer only while
// there is something in it: a connection that waits for its client keeps at
// most stashSize bytes, in itself. Used by the connection's goroutine alone.
type input struct {
	nc  net.Conn
	raw syscall.RawConn // nil: read nc

	beforeWait func() // is told of every wait

	buf  *buffer // nil while idle
	r, w int     // what has been received and not been taken is buf.b[r:w]

	stash   [stashSize]byte
	stashed int
	peek    []byte // where nc is read while idle

	readSocket func(fd uintptr) bool // in.read, made once
	askSocket  func(fd uintptr)      // in.ask, likewise
	waited     bool                  // fill found nothing and gave others their turn
	waiting    int                   // bytes that ask found
	err        error                 // what it met
}

func (in *input) init(nc net.Conn, raw syscall.RawConn, beforeWait func()) {
	in.nc, in.raw, in.beforeWait = nc, raw, beforeWait
	in.readSocket, in.askSocket = in.read, in.ask
	if raw == nil {
		in.peek = make([]byte, peekSize)
	}
}

// have returns the bytes that have been received and not been taken. They
// stay where they are until the next fill, need or full.
func (in *input) have() []byte {
	if in.buf == nil {
		return in.stash[:in.stashed]
	}
	return in.buf.b[in.r:in.w]
}

// take takes n of the bytes that have returned.
func (in *input) take(n int) []byte {
	p := in.have()[:n]
	in.r += n
	return p
}

// fill waits for at least one more byte. At the end of the stream it returns
// io.EOF.
func (in *input) fill() error {
	in.beforeWait()
	if in.raw == nil {
		return in.fillStream()
	}
	in.err, in.waited = nil, false
	if err := in.raw.Read(in.readSocket); err != nil {
		return err
	}
	return in.err
}

// need waits until there are n bytes, at most receiveSize.
func (in *input) need(n int) error {
	for len(in.have()) < n {
		if err := in.fill(); err != nil {
			return unexpected(err)
		}
	}
	return nil
}

// full fills p with what comes next.
func (in *input) full(p []byte) error {
	for len(p) > 0 {
		if err := in.need(1); err != nil {
			return err
		}
		p = p[copy(p, in.take(min(len(p), len(in.have())))):]
	}
	return nil
}

// discard throws away the next n bytes.
func (in *input) discard(n uint64) error {
	for n > 0 {
		if err := in.need(1); err != nil {
			return err
		}
		n -= uint64(len(in.take(int(min(n, uint64(len(in.have())))))))
	}
	return nil
}

// read reads from a socket that does not block. It reports whether fill is
// over; false says that there is nothing yet, and that the buffer was given
// back if it held next to nothing.
func (in *input) read(fd uintptr) bool {
	in.room()
	for {
		n, err := unix.Read(int(fd), in.buf.b[in.w:])
		switch {
		case n > 0:
			in.w += n
		case err == unix.EINTR:
			continue
		case err == unix.EAGAIN:
			in.rest()
			in.waited = true
			return false
		case err != nil:
			in.err = err
		default:
			in.err = io.EOF
		}
		return true
	}
}

// pending says that more has arrived on the socket, or might have on a stream
// that is none.
func (in *input) pending() bool {
	if in.raw == nil {
		return true
	}
	in.waiting = 0
	_ = in.raw.Control(in.askSocket)
	return in.waiting > 0
}

func (in *input) ask(fd uintptr) { in.waiting, _ = unix.IoctlGetInt(int(fd), unix.TIOCINQ) }

// readNow takes what has already arrived on a socket, also after its deadline.
func (in *input) readNow() {
	if in.raw != nil {
		in.raw.Control(func(fd uintptr) { in.read(fd) })
	}
}

func (in *input) fillStream() error {
	idle := in.buf == nil
	p := in.peek
	if !idle {
		in.room()
		p = in.buf.b[in.w:]
	}
	n, err := in.nc.Read(p)
	if n == 0 {
		return err
	}
	if idle {
		in.room()
		copy(in.buf.b[in.w:], p[:n])
	}
	in.w += n
	return nil
}

// room sees to a buffer with room behind what is in it: for a whole small
// write always, since that is waited for in the buffer.
func (in *input) room() {
	if in.buf == nil {
		in.buf = getBuffer(receiveSize)
		in.r, in.w = 0, copy(in.buf.b, in.stash[:in.stashed])
		in.stashed = 0
		return
	}
	if in.r == in.w {
		in.r, in.w = 0, 0
	} else if in.r > receiveSize/2 || in.w == len(in.buf.b) {
		in.w = copy(in.buf.b, in.buf.b[in.r:in.w])
		in.r = 0
	}
}

// rest gives the buffer back if what is in it fits the stash.
func (in *input) rest() {
	if in.buf == nil || in.w-in.r > stashSize {
		return
	}
	in.stashed = copy(in.stash[:], in.buf.b[in.r:in.w])
	in.release()
}

// release gives the buffer back with what is in it.
func (in *input) release() {
	if in.buf != nil {
		putBuffer(in.buf)
		in.buf = nil
	}
}

// unexpected is err for a stream that ends where more was announced.
func unexpected(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}
