package nbdserver

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// iovMax is how many pieces one writev takes (IOV_MAX of Linux).
const iovMax = 1024

// stallTime is how long a device's memory waits in a reply that the client
// does not take, before the rest is copied and the memory let go.
const stallTime = time.Second

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
	impatient   bool                  // writeSocket returns rather than wait
	writeSocket func(fd uintptr) bool // o.write, made once
	widen       func(fd uintptr)      // makes the socket hold more, once it was full; or nil
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
	o.queue(vecs, iov)
	return o.wait()
}

// sendShown is send of vectors that are a device's, which is told by done,
// once, when they are no longer looked at. That is soon: a client that does
// not take its replies must not keep a device from reusing space.
func (o *output) sendShown(vecs [][]byte, iov *[]unix.Iovec, done func()) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.err != nil || o.raw == nil {
		err := o.sendLocked(vecs, iov)
		done()
		return err
	}
	o.queue(vecs, iov)
	o.impatient = true
	err := o.wait()
	o.impatient = false
	if err == nil && len(o.pending) > 0 {
		err = o.stalled(done)
		return err
	}
	done()
	return err
}

// stalled sends what is pending to a client that was not ready for it.
func (o *output) stalled(done func()) error {
	o.nc.SetWriteDeadline(time.Now().Add(stallTime))
	err := o.raw.Write(o.writeSocket)
	o.nc.SetWriteDeadline(time.Time{})
	if errors.Is(err, os.ErrDeadlineExceeded) && o.err == nil {
		if copied, copyErr := copyOf(o.pending); copyErr == nil {
			o.pending = []unix.Iovec{{Base: unsafe.SliceData(copied), Len: uint64(len(copied))}}
			done()
			done = func() {}
		}
		if o.timeout > 0 {
			o.nc.SetWriteDeadline(time.Now().Add(o.timeout))
		}
		err = o.raw.Write(o.writeSocket)
	}
	done()
	if err != nil && o.err == nil {
		o.err = err
	}
	o.pending = nil
	return o.err
}

// queue makes vecs what is pending.
func (o *output) queue(vecs [][]byte, iov *[]unix.Iovec) {
	p := (*iov)[:0]
	for _, v := range vecs {
		if len(v) > 0 {
			p = append(p, unix.Iovec{Base: unsafe.SliceData(v), Len: uint64(len(v))})
		}
	}
	*iov, o.pending = p, p
}

// wait sends what is pending, or, when impatient, what goes at once.
func (o *output) wait() error {
	if err := o.raw.Write(o.writeSocket); err != nil && o.err == nil {
		o.err = err
	}
	if o.err != nil || !o.impatient {
		o.pending = nil
	}
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
			if o.widen == nil {
				return o.impatient
			}
			o.widen(fd)
			o.widen = nil
		default:
			o.err = errno
			return true
		}
	}
	return true
}

// copyOf copies memory that may be mapped from a file which cannot be read,
// so that nobody but the kernel may touch it: by way of a file in memory.
func copyOf(pieces []unix.Iovec) ([]byte, error) {
	fd, err := unix.MemfdCreate("nbd reply", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	var total int64
	for _, p := range pieces {
		for at := uint64(0); at < p.Len; {
			n, err := unix.Write(fd, unsafe.Slice((*byte)(unsafe.Add(unsafe.Pointer(p.Base), at)), p.Len-at))
			if err != nil {
				return nil, err
			}
			at += uint64(n)
		}
		total += int64(p.Len)
	}
	copied := make([]byte, total)
	for at := 0; at < len(copied); {
		n, err := unix.Pread(fd, copied[at:], int64(at))
		if err == nil && n == 0 {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return nil, err
		}
		at += n
	}
	return copied, nil
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
