package nbdserver

import (
	"net"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// iovMax is how many pieces one writev takes (IOV_MAX of Linux).
const iovMax = 1024

// coalesce is the size in bytes of what is written at once to a stream that
// is not a socket.
const coalesce = 64 << 10

// output is the sending side of a connection. A reply, or a batch of them, is
// sent under mu, so that replies of workers do not mix with it.
type output struct {
	nc      net.Conn
	raw     syscall.RawConn // nil: write nc
	timeout time.Duration   // for one send; 0 is none

	mu          sync.Mutex
	err         error                 // what ended the sending for good
	pending     []unix.Iovec          // what writeSocket still has to send
	writeSocket func(fd uintptr) bool // o.write, made once
}

func (o *output) init(nc net.Conn, raw syscall.RawConn, timeout time.Duration) {
	o.nc, o.raw, o.timeout = nc, raw, timeout
	o.writeSocket = o.write
}

// send sends vecs, one after the other. iov is scratch memory. The vectors
// may point into memory that cannot be read: that is EFAULT.
func (o *output) send(vecs [][]byte, iov *[]unix.Iovec) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.sendLocked(vecs, iov)
}

func (o *output) sendLocked(vecs [][]byte, iov *[]unix.Iovec) error {
	if o.err != nil {
		return o.err
	}
	if o.timeout > 0 {
		o.nc.SetWriteDeadline(time.Now().Add(o.timeout))
	}
	if o.raw == nil {
		o.err = o.sendStream(vecs)
		return o.err
	}
	p := (*iov)[:0]
	for _, v := range vecs {
		if len(v) > 0 {
			p = append(p, unix.Iovec{Base: unsafe.SliceData(v), Len: uint64(len(v))})
		}
	}
	*iov, o.pending = p, p
	if err := o.raw.Write(o.writeSocket); err != nil && o.err == nil {
		o.err = err
	}
	o.pending = nil
	return o.err
}

// write writes to a socket that does not block. It reports whether there is
// nothing more to do; false says that the client has to read first.
func (o *output) write(fd uintptr) bool {
	for len(o.pending) > 0 {
		n, _, errno := unix.Syscall(unix.SYS_WRITEV, fd,
			uintptr(unsafe.Pointer(unsafe.SliceData(o.pending))), uintptr(min(len(o.pending), iovMax)))
		switch errno {
		case 0:
			o.sent(uint64(n))
		case unix.EINTR:
		case unix.EAGAIN:
			return false
		default:
			o.err = errno
			return true
		}
	}
	return true
}

// sent takes n bytes off the front of what is pending.
func (o *output) sent(n uint64) {
	for n > 0 {
		v := &o.pending[0]
		if n < v.Len {
			v.Base = (*byte)(unsafe.Add(unsafe.Pointer(v.Base), n))
			v.Len -= n
			return
		}
		n -= v.Len
		o.pending = o.pending[1:]
	}
}

// sendStream writes vecs to a stream that is not a socket, as few large pieces.
func (o *output) sendStream(vecs [][]byte) error {
	buf := getBuffer(coalesce)
	defer putBuffer(buf)
	n := 0
	for _, v := range vecs {
		for len(v) > 0 {
			k := copy(buf.b[n:coalesce], v)
			n, v = n+k, v[k:]
			if n < coalesce {
				continue
			}
			if _, err := o.nc.Write(buf.b[:n]); err != nil {
				return err
			}
			n = 0
		}
	}
	if n == 0 {
		return nil
	}
	_, err := o.nc.Write(buf.b[:n])
	return err
}
