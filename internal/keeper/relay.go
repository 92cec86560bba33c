package keeper

import (
	"bufio"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// The transmission phase, with the names of the specification.
const (
	requestMagic = 0x25609513 // NBD_REQUEST_MAGIC
	replyMagic   = 0x67446698 // NBD_SIMPLE_REPLY_MAGIC
	cmdRead      = 0          // NBD_CMD_READ
	cmdWrite     = 1          // NBD_CMD_WRITE
	cmdDisc      = 2          // NBD_CMD_DISC
	requestSize  = 28
	replySize    = 16
)

const (
	maxPayload = 64 << 20 // bytes of one request's or reply's data
	heldLimit  = 64 << 20 // bytes of WRITE data held before the front is read no further
	pooledSize = 128 << 10
)

// lookEvery is how often a relay that waits for its back looks at its front.
const lookEvery = 250 * time.Millisecond

// errFront says that the kernel's end is gone or nonsense: no server mends it.
var errFront = errors.New("kernel's connection")

// A request is held from its arrival until its reply.
type request struct {
	head   [requestSize]byte
	data   []byte // of a WRITE
	number uint64 // order of arrival
	sent   bool   // to the back of the moment
}

func (q *request) kind() uint16   { return binary.BigEndian.Uint16(q.head[6:]) }
func (q *request) cookie() uint64 { return binary.BigEndian.Uint64(q.head[8:]) }
func (q *request) length() uint32 { return binary.BigEndian.Uint32(q.head[24:]) }

// A Relay is one front with the requests that came by it.
type Relay struct {
	front net.Conn

	sendMu sync.Mutex    // held while requests go to the back: keeps their order
	back   *bufio.Writer // nil while there is none
	paused bool          // give the back nothing more

	mu      sync.Mutex // taken with sendMu held or alone
	changed *sync.Cond // the fields below
	held    map[uint64]*request
	next    uint64
	bytes   int
	sent    int // of held, those the back was given
	goodbye bool
	ended   bool
	closed  bool
}

// NewRelay returns a relay of front, which it owns from now on. Run must be
// called.
func NewRelay(front net.Conn) *Relay {
	r := &Relay{front: front, held: make(map[uint64]*request)}
	r.changed = sync.NewCond(&r.mu)
	return r
}

// Run takes requests from the front until it ends. It returns nil when the
// kernel said goodbye (NBD_CMD_DISC).
func (r *Relay) Run() error {
	err := r.takeRequests()
	r.mu.Lock()
	r.ended = true
	goodbye := r.goodbye
	r.changed.Broadcast()
	r.mu.Unlock()
	if goodbye {
		return nil
	}
	return fmt.Errorf("%w: %w", errFront, err)
}

// Close ends the relay: Run and Serve return.
func (r *Relay) Close() error {
	r.mu.Lock()
	r.closed = true
	r.changed.Broadcast()
	r.mu.Unlock()
	return r.front.Close()
}

func (r *Relay) takeRequests() error {
	in := bufio.NewReaderSize(r.front, 128<<10)
	for {
		// What was passed on leaves before the next wait for the kernel.
		if in.Buffered() < requestSize {
			r.flush()
		}
		q := new(request)
		if _, err := io.ReadFull(in, q.head[:]); err != nil {
			return err
		}
		if m := binary.BigEndian.Uint32(q.head[:]); m != requestMagic {
			return fmt.Errorf("request begins with %#x, expected %#x", m, requestMagic)
		}
		if q.kind() == cmdWrite {
			if err := r.takeData(in, q); err != nil {
				return err
			}
		}
		if err := r.pass(q); err != nil {
			return err
		}
		if q.kind() == cmdDisc {
			r.flush()
			return nil
		}
	}
}

// takeData reads what a WRITE carries, when there is room for it (3).
func (r *Relay) takeData(in *bufio.Reader, q *request) error {
	n := int(q.length())
	if n > maxPayload {
		return fmt.Errorf("write of %d bytes, expected at most %d", n, maxPayload)
	}
	if in.Buffered() < n {
		r.flush()
	}
	r.mu.Lock()
	for r.bytes > heldLimit {
		r.mu.Unlock()
		r.flush()
		r.mu.Lock()
		if r.closed {
			r.mu.Unlock()
			return net.ErrClosed
		}
		if r.bytes > heldLimit {
			r.changed.Wait()
		}
	}
	r.bytes += n
	r.mu.Unlock()
	q.data = getBuffer(n)
	_, err := io.ReadFull(in, q.data)
	return err
}

// pass notes q as held and gives it to the back when there is one.
func (r *Relay) pass(q *request) error {
	r.sendMu.Lock()
	defer r.sendMu.Unlock()
	r.mu.Lock()
	if q.kind() == cmdDisc {
		r.goodbye = true
		r.mu.Unlock()
		r.write(q)
		return nil
	}
	_, twice := r.held[q.cookie()]
	q.number = r.next
	r.next++
	r.held[q.cookie()] = q
	r.mu.Unlock()
	if twice {
		return fmt.Errorf("cookie %#x of a request is that of another in flight", q.cookie())
	}
	r.write(q)
	return nil
}

// write gives q to the back, if any. Its errors are left to the reader of the
// back. What came by a front that the kernel gave up is not given (4). sendMu
// is held.
func (r *Relay) write(q *request) {
	if r.back == nil || r.paused {
		return
	}
	if q.kind() != cmdDisc {
		r.mu.Lock()
		if r.ended && !r.goodbye || r.held[q.cookie()] != q || q.sent {
			r.mu.Unlock()
			return
		}
		q.sent = true
		r.sent++
		r.mu.Unlock()
	}
	r.back.Write(q.head[:])
	r.back.Write(q.data)
}

func (r *Relay) flush() {
	r.sendMu.Lock()
	defer r.sendMu.Unlock()
	if r.back != nil {
		r.back.Flush()
	}
}

// Serve lets back answer: it is sent what is held, then what comes, until it
// fails, or the front does. Serve closes back and returns why it ended; an
// error that wraps errFront is not the server's fault.
func (r *Relay) Serve(back net.Conn) error {
	sender := make(chan struct{})
	go func() {
		defer close(sender)
		r.open(back)
	}()
	err := r.passReplies(back)
	back.Close() // wakes whoever writes to it
	<-sender
	r.sendMu.Lock()
	r.back = nil
	r.mu.Lock()
	for _, q := range r.held {
		q.sent = false
	}
	r.sent = 0
	r.changed.Broadcast()
	r.mu.Unlock()
	r.sendMu.Unlock()
	return err
}

// A watchful writer writes to a back for as long as the front is there: of one
// that the kernel gave up nothing more is read, and its end not seen, while its
// relay waits for a server that reads no more.
type watchful struct {
	back, front net.Conn
}

func (w *watchful) Write(b []byte) (n int, err error) {
	for {
		if err := w.back.SetWriteDeadline(time.Now().Add(lookEvery)); err != nil {
			return n, err
		}
		m, err := w.back.Write(b[n:])
		n += m
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return n, err
		}
		if hungUp(w.front) {
			return n, errFront
		}
	}
}

// hungUp reports whether the other end of a socket is gone.
func hungUp(c net.Conn) (gone bool) {
	s, ok := c.(syscall.Conn)
	if !ok {
		return false
	}
	raw, err := s.SyscallConn()
	if err != nil {
		return true
	}
	err = raw.Control(func(fd uintptr) {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
		_, _ = unix.Poll(p, 0)
		gone = p[0].Revents != 0
	})
	return gone || err != nil
}

// open sends what is held to back, oldest first, and lets the rest follow.
func (r *Relay) open(back net.Conn) {
	r.sendMu.Lock()
	defer r.sendMu.Unlock()
	r.back = bufio.NewWriterSize(&watchful{back, r.front}, 128<<10)
	r.mu.Lock()
	waiting := make([]*request, 0, len(r.held))
	for _, q := range r.held {
		waiting = append(waiting, q)
	}
	r.mu.Unlock()
	slices.SortFunc(waiting, func(a, b *request) int { return cmp.Compare(a.number, b.number) })
	for _, q := range waiting {
		r.write(q)
	}
	r.back.Flush()
}

// passReplies gives the back's replies to the front, each whole.
func (r *Relay) passReplies(back net.Conn) error {
	in := bufio.NewReaderSize(back, 128<<10)
	out := bufio.NewWriterSize(r.front, 128<<10)
	var data []byte
	head := make([]byte, replySize)
	for {
		if in.Buffered() < replySize {
			if err := out.Flush(); err != nil {
				return fmt.Errorf("%w: %w", errFront, err)
			}
		}
		if _, err := io.ReadFull(in, head); err != nil {
			return err
		}
		q, err := r.lookUp(head)
		if err != nil {
			out.Flush() // what was answered before is not asked again
			return err
		}
		data = data[:0]
		if q.kind() == cmdRead && binary.BigEndian.Uint32(head[4:]) == 0 {
			if data, err = readData(in, out, data, int(q.length())); err != nil {
				return err
			}
		}
		r.drop(q)
		out.Write(head)
		if _, err := out.Write(data); err != nil {
			return fmt.Errorf("%w: %w", errFront, err)
		}
		if cap(data) > 1<<20 { // not kept for the rare large read
			data = nil
		}
	}
}

// lookUp returns the request that a reply answers.
func (r *Relay) lookUp(head []byte) (*request, error) {
	if m := binary.BigEndian.Uint32(head); m != replyMagic {
		return nil, fmt.Errorf("reply begins with %#x, expected %#x", m, replyMagic)
	}
	cookie := binary.BigEndian.Uint64(head[8:])
	r.mu.Lock()
	defer r.mu.Unlock()
	q := r.held[cookie]
	if q == nil || !q.sent {
		return nil, fmt.Errorf("reply to %#x, which was not asked", cookie)
	}
	return q, nil
}

// readData reads n bytes into data, after passing on what waits in out when
// they are not there yet.
func readData(in *bufio.Reader, out *bufio.Writer, data []byte, n int) ([]byte, error) {
	if n > maxPayload {
		return nil, fmt.Errorf("read of %d bytes, expected at most %d", n, maxPayload)
	}
	if in.Buffered() < n {
		if err := out.Flush(); err != nil {
			return nil, fmt.Errorf("%w: %w", errFront, err)
		}
	}
	data = slices.Grow(data, n)[:n]
	_, err := io.ReadFull(in, data)
	return data, err
}

// drop forgets an answered request; its cookie may come again from now on.
func (r *Relay) drop(q *request) {
	r.mu.Lock()
	delete(r.held, q.cookie())
	r.sent--
	r.bytes -= len(q.data)
	r.changed.Broadcast()
	r.mu.Unlock()
	putBuffer(q.data)
}

// Pause gives the back no more requests, now or once it is opened; they are
// held. Resume ends the pause for the next back.
func (r *Relay) Pause() {
	r.sendMu.Lock()
	defer r.sendMu.Unlock()
	if r.back != nil {
		r.back.Flush()
	}
	r.paused = true
}

// Resume is called before Serve of another back.
func (r *Relay) Resume() {
	r.sendMu.Lock()
	defer r.sendMu.Unlock()
	r.paused = false
}

// Drain waits until every request that the back was given is answered, or the
// back is gone.
func (r *Relay) Drain() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for r.sent > 0 && !r.ended {
		r.changed.Wait()
	}
}

// saidGoodbye reports whether the kernel is done with this front.
func (r *Relay) saidGoodbye() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.goodbye
}

// buffers holds WRITE data of up to pooledSize, which is the most that the
// kernel sends unless it was told otherwise.
var buffers = sync.Pool{New: func() any { return new([pooledSize]byte) }}

func getBuffer(n int) []byte {
	if n == 0 || n > pooledSize {
		return make([]byte, n)
	}
	return buffers.Get().(*[pooledSize]byte)[:n]
}

func putBuffer(b []byte) {
	if cap(b) == pooledSize {
		buffers.Put((*[pooledSize]byte)(b[:pooledSize]))
	}
}
