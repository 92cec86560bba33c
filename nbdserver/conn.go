package nbdserver

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/cowdev/cowdev/block"
	"github.com/cowdev/cowdev/internal/nbd"
	"golang.org/x/sys/unix"
)

// handshakeGrace is how long a client that is still in the handshake may take
// to be told that the server is shutting down.
const handshakeGrace = 500 * time.Millisecond

// linger is how long replies of workers may take to leave when the connection
// ends because of an error, and a client to end its half after a goodbye.
const linger = 5 * time.Second

// How much unsent data the kernel keeps for connections that send much.
const (
	sendBuffer = 512 << 10 // bytes that it is asked for, and gives where net.core.wmem_max allows; doubled for its own needs
	maxWide    = 64        // connections at a time
)

// A slice is what a connection is served before others have their turn, in
// requests and pieces of their data: 0.1 to 0.2 ms. It is no less than a batch
// of data, so that large requests leave together as they would without it.
const (
	sliceWork  = 64
	slicePiece = batchData / sliceWork // bytes
)

// A conn is one connection. Its goroutine reads requests and serves those that
// cannot take long; the others go to workers.
type conn struct {
	srv  *Server
	sock net.Conn // as it was accepted: for deadlines, and to be cut
	nc   net.Conn // what is read and written: sock, or TLS over it
	peer string   // for messages

	stopping     atomic.Bool
	transmitting atomic.Bool
	cut          atomic.Pointer[error] // why abort was called

	session
	view   block.Session // nil where the device has none
	done   func()        // view.Done
	viewed bool          // view was asked since the last done

	batched  block.BatchWriter // the device, if it is one
	parks    bool              // it may come to keep a change waiting; WriteBatch does not
	gathered *gatherer         // WRITEs that were put off; nil if there are none
	ebb      ebb               // of WRITEs
	cold     *coldGroup        // READs that were put off; nil if there are none
	patience patience
	rhythm   rhythm

	in      input
	out     output
	b       *batch       // replies that have not been sent; nil if there are none
	inside  gate         // of the device, where this goroutine has a place; or nil
	company int          // reads from the disk that are to go to workers, see aloneForNow
	wide    bool         // the socket holds sendBuffer; set under out.mu
	ending  bool         // requests are answered with errShuttingDown
	synced  atomic.Int64 // nanoseconds that the last flush took

	moved int // bytes of data that slice does not count yet
	slice int // work since others had their turn

	count tally
	jobs  inFlight
}

// tally counts what has not been added to the server's counters yet.
type tally struct{ requests, errors, read, written uint64 }

func newConn(s *Server, nc net.Conn) *conn {
	c := &conn{srv: s, sock: nc, nc: nc, peer: peerName(nc)}
	c.jobs.init()
	return c
}

// upgrade makes nc, which lies over the socket, what is read and written.
func (c *conn) upgrade(nc net.Conn) { c.nc = nc }

// run is the life of the connection: serve, and what comes after it.
func (c *conn) run(serve func() error) error {
	defer c.srv.removeConn(c)
	err := serve()
	if err == errGoodbye {
		c.farewell()
	}
	c.nc.Close()
	if why := c.cut.Load(); why != nil {
		err = *why
	}
	if err == errGoodbye {
		return nil
	}
	if c.stopping.Load() {
		return ErrServerClosed
	}
	if err != io.EOF {
		c.srv.log.printf("connection of %s: %v", c.peer, err)
	}
	return err
}

// farewell waits for the end of a TLS session over TCP that the client said
// goodbye to: it may end its half as well, and TCP forgets what a client has not
// taken yet when something comes for a socket that is closed.
func (c *conn) farewell() {
	secured, ok := c.nc.(*tls.Conn)
	sock, ok2 := c.sock.(*net.TCPConn)
	if !ok || !ok2 || secured.CloseWrite() != nil || sock.CloseWrite() != nil {
		return
	}
	c.setDeadline(time.Now().Add(linger))
	_, _ = io.CopyN(io.Discard, sock, 64<<10)
}

// stop asks the connection to end when what has been received is answered.
func (c *conn) stop() {
	c.stopping.Store(true)
	if c.transmitting.Load() {
		c.sock.SetReadDeadline(time.Unix(1, 0))
	} else {
		c.sock.SetDeadline(time.Now().Add(handshakeGrace))
	}
}

// abort ends the connection at once, because of err.
func (c *conn) abort(err error) {
	c.cut.CompareAndSwap(nil, &err)
	c.sock.Close()
}

// setDeadline is for the handshake; a stop that came before it stands.
func (c *conn) setDeadline(t time.Time) {
	c.sock.SetDeadline(t)
	if c.stopping.Load() {
		c.stop()
	}
}

// transmission is the second phase: requests until the client or the server
// ends it.
func (c *conn) transmission(agreed session) error {
	c.session = agreed
	raw := rawOf(c.nc)
	c.in.init(c.nc, raw, c.awaitByte)
	c.out.init(c.nc, raw, c.srv.cfg.IdleTimeout)
	if _, ok := c.nc.(*net.UnixConn); ok {
		c.out.widen = c.widen
	}
	defer c.in.release()
	if dev, ok := agreed.export.Device.(block.Sessioner); ok {
		c.view = dev.Session()
		c.done = c.view.Done
		defer c.view.Close()
	}
	c.batched, _ = agreed.export.Device.(block.BatchWriter)
	if d, ok := c.batched.(interface{ Parks() bool }); ok {
		c.parks = d.Parks()
	}
	c.transmitting.Store(true)
	if c.stopping.Load() {
		c.stop()
	}
	err := c.requests()
	if err != errGoodbye && err != io.EOF && !c.ending {
		c.sock.SetWriteDeadline(time.Now().Add(linger)) // replies of workers
	}
	c.jobs.wait()
	if c.wide {
		c.srv.wide.leave()
	}
	return err
}

// widen has a unix socket hold a batch, if few others do: one holds 208 KiB
// by default, and server and client would take turns with pieces of that. The
// kernel lets sockets of TCP grow by itself.
func (c *conn) widen(fd uintptr) {
	if !c.srv.wide.tryEnter() {
		return
	}
	c.wide = true
	// The kernel tells of twice what it was asked for.
	if n, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUF); err == nil && n < 2*sendBuffer {
		_ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUF, sendBuffer) // else it stays as it is
	}
}

// rawOf returns the file descriptor's way into nc, or nil if nc is no socket.
func rawOf(nc net.Conn) syscall.RawConn {
	switch nc := nc.(type) {
	case *net.UnixConn:
		raw, _ := nc.SyscallConn()
		return raw
	case *net.TCPConn:
		raw, _ := nc.SyscallConn()
		return raw
	}
	return nil
}

// requests reads and serves requests until one ends the connection.
func (c *conn) requests() error {
	defer c.leave()
	for {
		err := c.receive()
		if err == nil {
			err = c.serveReceived()
			err = andThen(err, c.settle())
			err = andThen(err, c.startCold())
		}
		err = andThen(err, c.flush())
		if err != nil {
			return err
		}
		c.flushAhead()
		if c.slice >= sliceWork/2 && c.srv.crowded() { // better here than in the middle of a batch
			c.yield()
		}
	}
}

// andThen returns what ends a connection of which err, if anything, is known
// and then next is: a goodbye counts only if what is owed could be sent.
func andThen(err, next error) error {
	if err == nil || err == errGoodbye && next != nil {
		return next
	}
	return err
}

// yield lets others have their turn.
func (c *conn) yield() {
	c.slice = 0
	runtime.Gosched()
}

// receive waits for more bytes. When the server is shutting down it takes what
// has arrived already, to be answered so, and then returns ErrServerClosed.
func (c *conn) receive() error {
	for {
		err := c.in.fill()
		switch {
		case err == nil:
			if c.in.waited {
				c.slice = 0
			}
			return nil
		case err == io.EOF && len(c.in.have()) > 0:
			return io.ErrUnexpectedEOF
		case !errors.Is(err, os.ErrDeadlineExceeded):
			return err
		case c.ending:
			return ErrServerClosed
		case c.stopping.Load():
			c.ending = true
			c.in.readNow()
			return nil
		case c.jobs.any():
			continue
		default:
			return fmt.Errorf("no request for %v", c.srv.cfg.IdleTimeout)
		}
	}
}

// awaitByte is called before every wait for the client's next byte. It sets
// the deadline for that, where there is one.
func (c *conn) awaitByte() {
	d := c.srv.cfg.IdleTimeout
	if d <= 0 || c.stopping.Load() {
		return
	}
	c.sock.SetReadDeadline(time.Now().Add(d))
	if c.stopping.Load() { // since then: its deadline stands
		c.stop()
	}
}

// serveReceived serves every request that has been received whole.
func (c *conn) serveReceived() error {
	for {
		p := c.in.have()
		if len(p) < c.headerSize() {
			return c.checkMagic(p)
		}
		var r request
		if err := c.decode(p, &r); err != nil {
			return err
		}
		payload := c.payload(&r)
		if payload <= maxInlineWrite && len(p) < c.headerSize()+int(payload) {
			return nil // waits in the buffer until it is whole
		}
		c.in.take(c.headerSize())
		if r.kind == nbd.CmdDisc {
			return errGoodbye
		}
		if err := c.serve(&r, payload); err != nil {
			return err
		}
		if err := c.served(); err != nil {
			return err
		}
	}
}

// serve serves one request, whose payload comes next. An error ends the
// connection; what goes wrong with the request is a reply.
func (c *conn) serve(r *request, payload uint64) error {
	c.count.requests++
	f := c.check(r)
	if c.ending {
		f = errShuttingDown
	}
	if f == nil && c.gathers(r) {
		return c.gather(r)
	}
	if err := c.settle(); err != nil {
		return err
	}
	switch {
	case f != nil:
		return c.refuse(r, payload, f)
	case r.kind == nbd.CmdRead:
		return c.read(r)
	case r.kind == nbd.CmdWrite:
		return c.write(r)
	case r.kind == nbd.CmdFlush:
		return c.sync(r)
	case r.kind == nbd.CmdTrim, r.kind == nbd.CmdWriteZeroes:
		return c.zero(r)
	case r.kind == nbd.CmdBlockStatus:
		return c.blockStatus(r, payload)
	default:
		return c.start(newJob(c, r), 0)
	}
}

// served is called after each request. It sends a batch that is full, and at
// the end of a slice it lets others run, if there are many. A client that sends
// without end would otherwise be served all that is in its receive buffer at
// once, nine thousand requests, and fifty such clients before one that asks for
// little: Go's scheduler is a queue.
func (c *conn) served() error {
	c.slice += 1 + c.moved/slicePiece
	c.moved = 0
	over := c.slice > sliceWork && c.srv.crowded()
	if over || c.b != nil && c.b.full() {
		if err := c.flush(); err != nil {
			return err
		}
	}
	if over {
		c.yield()
	}
	return nil
}

// refuse answers r with f after throwing away its payload.
func (c *conn) refuse(r *request, payload uint64, f *failure) error {
	if payload > maxDrain {
		return fmt.Errorf("request with %d bytes of payload, expected at most %d", payload, maxDrain)
	}
	if payload > uint64(len(c.in.have())) {
		if err := c.beforeWait(); err != nil {
			return err
		}
	}
	if err := c.in.discard(payload); err != nil {
		return err
	}
	c.fail(r, f)
	return c.slowDown(requestPrice)
}

// batch returns the batch that the next reply is added to; it has room for a
// header.
func (c *conn) batch() *batch {
	if c.b == nil {
		c.b = getBatch()
	}
	return c.b
}

func (c *conn) succeed(r *request) {
	b := c.batch()
	b.wrote(c.appendSuccess(b.head, r))
}

func (c *conn) fail(r *request, f *failure) {
	c.count.errors++
	b := c.batch()
	b.wrote(c.appendFailure(b.head, r, f))
}

// failDevice answers r with err, which the device returned.
func (c *conn) failDevice(r *request, err error) {
	c.logDevice(r, err)
	c.fail(r, failureOf(r, err))
}

func (c *conn) logDevice(r *request, err error) {
	if failureOf(r, err) != errNotFast {
		c.srv.log.printf("export %q: %s of %d bytes at %d: %v", c.export.Name, commandName(r.kind), r.n, r.off, err)
	}
}

// flush sends the replies of the batch, and lets go of the views in it.
func (c *conn) flush() error {
	c.leave()
	c.count.addTo(&c.srv.count)
	viewed := c.viewed
	c.viewed = false
	if c.b == nil {
		if viewed {
			c.done()
		}
		return nil
	}
	b := c.b
	c.b = nil
	var err error
	if viewed {
		err = c.out.sendShown(b.vecs, &b.iov, c.done)
	} else {
		err = c.out.send(b.vecs, &b.iov)
	}
	putBatch(b)
	return c.sendError(err)
}

// beforeWait sends the replies of the batch and has the READs that were put off
// begun: what comes next may take as long as the client, or another, likes.
func (c *conn) beforeWait() error {
	if err := c.startCold(); err != nil {
		return err
	}
	return c.flush()
}

// sendError returns what an error of sending a batch means.
func (c *conn) sendError(err error) error {
	if errors.Is(err, syscall.EFAULT) {
		c.srv.count.faults.Add(1)
		return errors.New("a page of the base or the store could not be read after its reply had begun")
	}
	return replyError(err)
}

func replyError(err error) error {
	if err != nil {
		return fmt.Errorf("reply: %w", err)
	}
	return nil
}

// enter passes the gate of calls of the device that may block; leave, which
// flush does, gives the place back.
func (c *conn) enter() error {
	if c.inside != nil {
		return nil
	}
	g := c.srv.workers.inline
	if c.mayBlock() {
		g = c.srv.workers.parked
	}
	if !g.tryEnter() {
		if err := c.beforeWait(); err != nil { // replies do not wait for others' devices
			return err
		}
		g.enter()
	}
	c.inside = g
	return nil
}

func (c *conn) leave() {
	if c.inside != nil {
		c.inside.leave()
		c.inside = nil
	}
}

// mayBlock says that the device may keep a change waiting for long, as for
// room on a full disk.
func (c *conn) mayBlock() bool {
	d, ok := c.export.Device.(interface{ MayBlock() bool })
	return ok && d.MayBlock()
}

// start gives j, which holds n bytes of buffers, to a worker, when the
// connection has few enough there.
func (c *conn) start(j *job, n int) error {
	if !c.jobs.tryAdd(n) {
		if err := c.beforeWait(); err != nil {
			j.free()
			return err
		}
		c.jobs.add(n)
	}
	j.bytes = n
	c.srv.workers.start(j)
	return nil
}

// addTo adds the counts to the server's and begins anew.
func (t *tally) addTo(s *counters) {
	for _, one := range [...]struct {
		n  *uint64
		to *atomic.Uint64
	}{
		{&t.requests, &s.requests},
		{&t.errors, &s.errors},
		{&t.read, &s.bytesRead},
		{&t.written, &s.bytesWritten},
	} {
		if *one.n > 0 {
			one.to.Add(*one.n)
			*one.n = 0
		}
	}
}

func commandName(kind uint16) string {
	names := [...]string{"read", "write", "disconnect", "flush", "trim", "cache", "write zeroes", "block status"}
	if int(kind) < len(names) {
		return names[kind]
	}
	return fmt.Sprintf("command %d", kind)
}
