package load

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"runtime"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/cowdev/cowdev/bench/rawfd"
	"github.com/cowdev/cowdev/internal/nbd"
	"github.com/cowdev/cowdev/internal/nbdclient"
)

// maxVectors is what one sendmsg takes.
const maxVectors = 1024

// A conn is one connection, and what it has under way. Requests are told apart
// by the number of their slot, which is their cookie.
type conn struct {
	job   *Job
	where offsets
	size  int64
	fd    uintptr // of the socket, blocking
	began time.Time
	stop  *atomic.Bool

	slots   []slot
	free    []uint32
	issued  int64
	quota   int64 // requests to issue; none where negative
	unflush int   // requests since the last flush

	headers []byte
	payload []byte
	iov     []unix.Iovec
	in      []byte // received, and not looked at yet: in[r:w]
	r, w    int

	like    []byte // what reads are compared with
	latency histogram
	flushes histogram
	result  Result
	cpu     time.Duration
}

// A slot is a request under way.
type slot struct {
	sent time.Duration
	off  int64
	kind uint16
}

func dial(j *Job, number int, stop *atomic.Bool) (*conn, error) {
	client, err := nbdclient.Dial("unix", j.Socket)
	if err != nil {
		return nil, err
	}
	defer client.Close()
	if err := client.ExportName(j.Export); err != nil {
		return nil, err
	}
	c := &conn{job: j, stop: stop, size: client.Size, quota: -1}
	if c.where, err = newOffsets(j, number, client.Size); err != nil {
		return nil, err
	}
	if j.Count > 0 {
		c.quota = j.Count / int64(j.Conns)
	}
	fd, err := rawfd.Take(client.Conn.(*net.UnixConn))
	if err != nil {
		return nil, err
	}
	c.fd = uintptr(fd)
	c.allocate()
	return c, nil
}

// allocate makes all memory that the connection will need.
func (c *conn) allocate() {
	depth := c.job.Depth
	c.slots = make([]slot, depth)
	for i := range depth {
		c.free = append(c.free, uint32(i))
	}
	c.headers = make([]byte, depth*nbd.RequestHeaderSize)
	c.iov = make([]unix.Iovec, 0, 2*depth)
	reply := nbd.SimpleReplySize
	if c.job.Op == Read {
		reply += int(c.job.Part)
	}
	c.in = make([]byte, max(reply, min(max(1<<20, reply*depth), 8<<20)))
	for i := range c.in { // its pages exist before the clock runs
		c.in[i] = 1
	}
	if c.job.Op == Write || c.job.Written {
		c.payload = payload(c.job)
	}
}

// payload is the memory that every write takes its bytes from, by its offset:
// none of its blocks is compressible or zero.
func payload(j *Job) []byte {
	p := make([]byte, payloadSpread+j.Part)
	x := mix(j.Seed)
	for i := 0; i+8 <= len(p); i += 8 {
		x = mix(x)
		binary.LittleEndian.PutUint64(p[i:], x)
	}
	return p
}

const payloadSpread = 1 << 20

// written returns what a write at off writes.
func (c *conn) written(off int64) []byte {
	at := off % payloadSpread
	return c.payload[at : at+c.job.Part]
}

// run issues requests until the job ends, and takes their replies.
func (c *conn) run() error {
	runtime.LockOSThread()
	before := threadCPU()
	for {
		c.issue()
		if len(c.free) == len(c.slots) {
			break
		}
		if err := c.send(); err != nil {
			return err
		}
		if err := c.receive(); err != nil {
			return err
		}
	}
	c.cpu = threadCPU() - before
	return nil
}

// issue gives every free slot a request, as long as the job goes on, and makes
// the vectors that send them.
func (c *conn) issue() {
	now := time.Since(c.began)
	at := 0
	for len(c.free) > 0 && !c.stop.Load() && (c.quota < 0 || c.issued < c.quota) {
		n := c.free[len(c.free)-1]
		c.free = c.free[:len(c.free)-1]
		s := &c.slots[n]
		*s = slot{sent: now, kind: kinds[c.job.Op]}
		length := c.job.Part
		if c.job.FlushEvery > 0 && c.unflush >= c.job.FlushEvery {
			s.kind, c.unflush = nbd.CmdFlush, 0
		} else {
			c.unflush++
			c.issued++
		}
		if s.kind == nbd.CmdFlush {
			length = 0
		} else {
			s.off = c.where.take()
		}
		h := c.headers[at : at+nbd.RequestHeaderSize]
		at += nbd.RequestHeaderSize
		binary.BigEndian.PutUint32(h, nbd.RequestMagic)
		binary.BigEndian.PutUint16(h[4:], 0)
		binary.BigEndian.PutUint16(h[6:], s.kind)
		binary.BigEndian.PutUint64(h[8:], uint64(n))
		binary.BigEndian.PutUint64(h[16:], uint64(s.off))
		binary.BigEndian.PutUint32(h[24:], uint32(length))
		c.vector(h)
		if s.kind == nbd.CmdWrite {
			c.vector(c.written(s.off))
		}
	}
}

var kinds = map[Op]uint16{Read: nbd.CmdRead, Write: nbd.CmdWrite, Trim: nbd.CmdTrim, Flush: nbd.CmdFlush}

// vector adds p to what is sent, to the last vector where it follows that.
func (c *conn) vector(p []byte) {
	if n := len(c.iov); n > 0 {
		last := &c.iov[n-1]
		if unsafe.Add(unsafe.Pointer(last.Base), last.Len) == unsafe.Pointer(&p[0]) {
			last.Len += uint64(len(p))
			return
		}
	}
	c.iov = append(c.iov, unix.Iovec{Base: &p[0], Len: uint64(len(p))})
}

// send sends the vectors. A server that waits for its replies to be taken
// before it takes more has them taken.
func (c *conn) send() error {
	for iov := c.iov; len(iov) > 0; {
		msg := unix.Msghdr{Iov: &iov[0], Iovlen: uint64(min(len(iov), maxVectors))}
		sent, _, errno := unix.RawSyscall(unix.SYS_SENDMSG, c.fd, uintptr(unsafe.Pointer(&msg)), unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
		switch errno {
		case 0:
		case unix.EINTR:
			continue
		case unix.EAGAIN:
			if err := c.makeRoom(); err != nil {
				return err
			}
			continue
		default:
			return fmt.Errorf("send: %w", errno)
		}
		for sent > 0 {
			n := min(uint64(sent), iov[0].Len)
			sent -= uintptr(n)
			iov[0].Len -= n
			iov[0].Base = (*byte)(unsafe.Add(unsafe.Pointer(iov[0].Base), n))
			if iov[0].Len == 0 {
				iov = iov[1:]
			}
		}
	}
	c.iov = c.iov[:0]
	return nil
}

// makeRoom waits until the socket takes more, and takes replies meanwhile.
func (c *conn) makeRoom() error {
	fds := [1]unix.PollFd{{Fd: int32(c.fd), Events: unix.POLLIN | unix.POLLOUT}}
	_, _, errno := unix.RawSyscall(unix.SYS_POLL, uintptr(unsafe.Pointer(&fds)), 1, uintptr(nbdclient.Timeout.Milliseconds()))
	if errno != 0 && errno != unix.EINTR {
		return fmt.Errorf("poll: %w", errno)
	}
	if fds[0].Revents&unix.POLLIN != 0 {
		return c.fill()
	}
	return nil
}

// receive waits until at least one reply has come.
func (c *conn) receive() error {
	for {
		got, err := c.take()
		if got > 0 || err != nil {
			return err
		}
		if err := c.fill(); err != nil {
			return err
		}
	}
}

// fill receives more bytes behind those that are there.
func (c *conn) fill() error {
	if c.r == c.w {
		c.r, c.w = 0, 0
	} else if c.r > 0 && len(c.in)-c.w < len(c.in)/2 {
		c.w = copy(c.in, c.in[c.r:c.w])
		c.r = 0
	}
	if c.w == len(c.in) {
		_, err := c.take()
		return err
	}
	for {
		n, _, errno := unix.RawSyscall6(unix.SYS_RECVFROM, c.fd, uintptr(unsafe.Pointer(&c.in[c.w])), uintptr(len(c.in)-c.w), 0, 0, 0)
		switch {
		case errno == unix.EINTR:
			continue
		case errno != 0:
			return fmt.Errorf("receive: %w", errno)
		case n == 0:
			return fmt.Errorf("receive: %w", io.ErrUnexpectedEOF)
		}
		c.w += int(n)
		return nil
	}
}

// take looks at the replies that have come whole, and returns how many.
func (c *conn) take() (got int, err error) {
	var now time.Duration
	for c.w-c.r >= nbd.SimpleReplySize {
		p := c.in[c.r:c.w]
		if binary.BigEndian.Uint32(p) != nbd.SimpleReplyMagic {
			return got, fmt.Errorf("reply begins with %x", p[:4])
		}
		n := binary.BigEndian.Uint64(p[8:])
		if n >= uint64(len(c.slots)) {
			return got, fmt.Errorf("reply to a request that was not sent: %d", n)
		}
		s := &c.slots[n]
		failed := binary.BigEndian.Uint32(p[4:]) != 0
		length := nbd.SimpleReplySize
		if s.kind == nbd.CmdRead && !failed {
			length += int(c.job.Part)
		}
		if len(p) < length {
			break
		}
		if now == 0 {
			now = time.Since(c.began)
		}
		c.count(s, now, failed, p[nbd.SimpleReplySize:length])
		c.free = append(c.free, uint32(n))
		c.r += length
		got++
	}
	return got, nil
}

func (c *conn) count(s *slot, now time.Duration, failed bool, data []byte) {
	if failed {
		c.result.Errors++
	}
	if s.kind == nbd.CmdFlush && c.job.Op != Flush {
		c.result.Flushes++
		c.flushes.add(now - s.sent)
		return
	}
	c.result.Requests++
	c.latency.add(now - s.sent)
	switch {
	case len(data) == 0:
	case c.like != nil:
		if !bytes.Equal(data, c.like[s.off:s.off+int64(len(data))]) {
			c.result.Wrong++
		}
	case c.job.Written:
		if !bytes.Equal(data, c.written(s.off)) {
			c.result.Wrong++
		}
	}
}

// close says goodbye.
func (c *conn) close() {
	var h [nbd.RequestHeaderSize]byte
	binary.BigEndian.PutUint32(h[:], nbd.RequestMagic)
	binary.BigEndian.PutUint16(h[6:], nbd.CmdDisc)
	unix.Write(int(c.fd), h[:])
	unix.Close(int(c.fd))
}

// threadCPU returns how long the calling thread has run.
func threadCPU() time.Duration {
	var t unix.Timespec
	if unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &t) != nil {
		return 0
	}
	return time.Duration(t.Nano())
}
