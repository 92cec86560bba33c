package nbdserver_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/cowdev/cowdev/block"
	"github.com/cowdev/cowdev/internal/nbd"
	"github.com/cowdev/cowdev/internal/nbdclient"
	"github.com/cowdev/cowdev/nbdserver"
	"golang.org/x/sys/unix"
)

// slowDevice holds up one operation until it is told to go on.
func slowDevice(op string) (dev *memDevice, begun, release chan struct{}) {
	begun, release = make(chan struct{}, 1000), make(chan struct{})
	dev = newMemDevice(testSize)
	dev.before = func(this string, off, _ int64) error {
		if this == op && off < 1<<20 {
			begun <- struct{}{}
			<-release
		}
		return nil
	}
	return dev, begun, release
}

func await(t *testing.T, what string, c <-chan struct{}) {
	t.Helper()
	select {
	case <-c:
	case <-time.After(patience):
		t.Fatalf("waited %v in vain for %s", patience, what)
	}
}

// A slow request of any kind holds up neither others of its connection nor
// those of another.
func TestSlowRequests(t *testing.T) {
	for op, slow := range map[string]req{
		"read":    {Type: nbd.CmdRead, Length: 512},
		"write":   {Type: nbd.CmdWrite, Payload: make([]byte, 4096)},
		"flush":   {Type: nbd.CmdFlush},
		"trim":    {Type: nbd.CmdTrim, Length: 2 << 20},
		"zero":    {Type: nbd.CmdWriteZeroes, Length: 2 << 20},
		"cache":   {Type: nbd.CmdCache, Length: 4096},
		"extents": {Type: nbd.CmdBlockStatus, Length: 4096},
	} {
		t.Run(op, func(t *testing.T) {
			dev, begun, release := slowDevice(op)
			dev.cold = func(off, _ int64) bool { return off < 1<<20 }
			dev.blocking = op == "write"
			r := serveDevice(t, dev)
			c, other := r.dial(structured, "base:allocation"), r.dial(simple)
			slow.Cookie = 1
			quick := req{Type: nbd.CmdRead, Cookie: 2, Offset: 2 << 20, Length: 512}
			c.Expect(slow)
			c.Expect(quick)
			// In one piece: a flush that nothing follows is done in line.
			check(t, c.Send(c.Encode(slow), c.Encode(quick)))
			await(t, "the slow request to begin", begun)
			m, err := c.Receive()
			check(t, err)
			if m.Cookie != 2 {
				t.Errorf("first reply has cookie %d, expected the quick one's", m.Cookie)
			}
			_, err = other.ReadAt(make([]byte, 512), 3<<20)
			check(t, err)
			close(release)
			m, err = c.Receive()
			check(t, err)
			if m.Cookie != 1 {
				t.Errorf("second reply has cookie %d", m.Cookie)
			}
		})
	}
}

// Once a flush has been slow, even a lone one goes to a worker.
func TestSlowFlushAlone(t *testing.T) {
	dev, begun, release := slowDevice("flush")
	c := serveDevice(t, dev).dial(simple)
	_, err := c.Request(req{Type: nbd.CmdFlush})
	check(t, err)
	await(t, "the flush to begin", begun)
	time.Sleep(20 * time.Millisecond) // makes it slow
	release <- struct{}{}
	_, err = c.Receive()
	check(t, err)
	_, err = c.Request(req{Type: nbd.CmdFlush})
	check(t, err)
	await(t, "the second flush to begin", begun)
	_, err = c.Request(req{Type: nbd.CmdRead, Offset: 2 << 20, Length: 512})
	check(t, err)
	if m, err := c.Receive(); err != nil || len(m.Payload) != 512 {
		t.Errorf("reply %+v, %v; expected the read's", m, err)
	}
	close(release)
	_, err = c.Receive()
	check(t, err)
}

// No more than 64 requests of a connection are in workers, whatever it sends.
func TestJobsAreBounded(t *testing.T) {
	dev, begun, release := slowDevice("read")
	dev.cold = func(int64, int64) bool { return true }
	var inside, most atomic.Int64
	before := dev.before
	dev.before = func(op string, off, n int64) error {
		if op == "read" {
			now := inside.Add(1)
			for old := most.Load(); now > old && !most.CompareAndSwap(old, now); old = most.Load() {
			}
			defer inside.Add(-1)
		}
		return before(op, off, n)
	}
	c := serveDevice(t, dev).dial(simple)
	var batch []byte
	for i := range 500 {
		r := req{Type: nbd.CmdRead, Cookie: uint64(i + 1), Length: 512}
		c.Expect(r)
		batch = append(batch, c.Encode(r)...)
	}
	check(t, c.Send(batch))
	for range 64 {
		await(t, "64 reads to begin", begun)
	}
	close(release)
	for range 500 {
		_, err := c.Receive()
		check(t, err)
	}
	if most.Load() > 64 {
		t.Errorf("%d reads at once, expected at most 64", most.Load())
	}
}

// What was received before Shutdown is answered, what comes with it is told
// so, and the connection closes.
func TestShutdown(t *testing.T) {
	dev, begun, release := slowDevice("read")
	dev.cold = func(off, _ int64) bool { return off < 1<<20 }
	r := serveDevice(t, dev)
	idle, busy := r.dial(simple), r.dial(structured)
	_, err := busy.Request(req{Type: nbd.CmdRead, Length: 512})
	check(t, err)
	await(t, "the read to begin", begun)

	done := make(chan error, 1)
	go func() { done <- r.srv.Shutdown(context.Background()) }()
	expectEnd(t, idle)
	if _, err := net.Dial("unix", r.socket); err == nil {
		t.Error("the server still accepts connections")
	}
	select {
	case err := <-done:
		t.Fatalf("Shutdown returned %v before the read was answered", err)
	default:
	}
	close(release)
	m, err := busy.Receive()
	check(t, err)
	if m.Type != nbd.ReplyOffsetData {
		t.Errorf("reply %+v, expected the data", m)
	}
	expectEnd(t, busy)
	check(t, <-done)
	if err := r.srv.ServeConn(pipe(t)); err != nbdserver.ErrServerClosed {
		t.Errorf("ServeConn after Shutdown: %v", err)
	}
}

func pipe(t testing.TB) net.Conn {
	a, b := net.Pipe()
	t.Cleanup(func() { a.Close(); b.Close() })
	return a
}

// Requests that arrive while the server is ending are answered with ESHUTDOWN.
func TestShutdownAnswersLateRequests(t *testing.T) {
	dev, begun, release := slowDevice("flush")
	r := serveDevice(t, dev)
	c := r.dial(structured)
	_, err := c.Request(req{Type: nbd.CmdFlush}) // in line, so that what follows is not read yet
	check(t, err)
	await(t, "the flush to begin", begun)
	late := req{Type: nbd.CmdRead, Length: 512}
	late.Cookie, err = c.Request(late)
	check(t, err)
	done := make(chan error, 1)
	go func() { done <- r.srv.Shutdown(context.Background()) }()
	eventually(t, "the server stops accepting", func() bool {
		c, err := net.Dial("unix", r.socket)
		if err == nil {
			c.Close()
		}
		return err != nil
	})
	close(release)
	_, err = c.Receive()
	check(t, err)
	res, err := c.Result(late)
	check(t, err)
	if res.Error != nbd.ESHUTDOWN {
		t.Errorf("late request: error %d, expected ESHUTDOWN", res.Error)
	}
	expectEnd(t, c)
	check(t, <-done)
}

// Options that arrive while the server is ending are told so.
func TestShutdownInHandshake(t *testing.T) {
	r := serveDevice(t, newMemDevice(testSize))
	c := r.greet()
	expectFinal(t, c, nbd.RepAck, nbd.OptList)
	done := make(chan error, 1)
	go func() { done <- r.srv.Shutdown(context.Background()) }()
	eventually(t, "an option is answered with NBD_REP_ERR_SHUTDOWN", func() bool {
		replies, err := c.Option(nbd.OptList)
		return err != nil || replies[len(replies)-1].Type == nbd.RepErrShutdown
	})
	check(t, <-done)
}

// When time is up Shutdown returns, whatever hangs.
func TestShutdownInVain(t *testing.T) {
	dev, begun, release := slowDevice("read")
	dev.cold = func(int64, int64) bool { return true }
	defer close(release)
	r := serveDevice(t, dev)
	c := r.dial(simple)
	_, err := c.Request(req{Type: nbd.CmdRead, Length: 512})
	check(t, err)
	await(t, "the read to begin", begun)
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
	defer cancel()
	if err := r.srv.Shutdown(ctx); err != context.DeadlineExceeded {
		t.Errorf("Shutdown returned %v", err)
	}
	expectEnd(t, c)
}

// faultDevice shows memory that cannot be read.
type faultDevice struct {
	*memDevice
	bad []byte
}

type faultSession struct {
	block.Session
	bad []byte
}

func (d faultDevice) Session() block.Session { return faultSession{d.memDevice.Session(), d.bad} }

func (s faultSession) View(vecs [][]byte, off, n int64) ([][]byte, bool) {
	if off == 0 {
		return append(vecs, s.bad[:n]), true
	}
	return s.Session.View(vecs, off, n)
}

// A page that cannot be read after its reply has begun ends that connection
// and no other.
func TestFault(t *testing.T) {
	bad, err := unix.Mmap(-1, 0, 1<<20, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	check(t, err)
	defer unix.Munmap(bad)
	r := serveDevice(t, faultDevice{newMemDevice(testSize), bad})
	c, other := r.dial(simple), r.dial(simple)
	_, err = c.Request(req{Type: nbd.CmdRead, Length: 4096})
	check(t, err)
	if _, err := c.Receive(); err == nil {
		t.Error("the unreadable page was answered")
	}
	eventually(t, "the fault is counted", func() bool { return r.srv.Stats().Faults == 1 })
	_, err = other.ReadAt(make([]byte, 4096), 4096)
	check(t, err)
}

// A client that does not take its replies keeps the device's memory for a
// second, and gets them all the same when it does.
func TestStalledClient(t *testing.T) {
	dev := newMemDevice(testSize)
	dev.pieces = 4096
	r := serveDevice(t, dev)
	c := r.dial(simple)
	var batch []byte
	for i := range 4 {
		rd := req{Type: nbd.CmdRead, Cookie: uint64(i + 1), Offset: uint64(i) << 20, Length: 1 << 20}
		c.Expect(rd)
		batch = append(batch, c.Encode(rd)...)
	}
	check(t, c.Send(batch))
	eventually(t, "the memory is shown", func() bool { return dev.shown.Load() > 0 })
	eventually(t, "the memory is let go", func() bool { return dev.shown.Load() == 0 })
	for i := range 4 {
		m, err := c.Receive()
		check(t, err)
		if !bytes.Equal(m.Payload, dev.data[i<<20:][:1<<20]) {
			t.Errorf("reply %d is not the data", i)
		}
	}
}

// The kernel holds more than it would by default for those who send much, if
// they are few.
func TestWideConnections(t *testing.T) {
	const maxWide = 64
	const byDefault = 256 << 10 // bytes; net.core.wmem_default and one piece more
	r := serveDevice(t, newMemDevice(testSize))
	// unread is how much a client finds that asked for all and takes nothing.
	unread := func() (*nbdclient.Client, int) {
		c := r.dial(simple)
		check(t, c.Send(repeat(c, 4, nbdclient.Request{Type: nbd.CmdRead, Length: 1 << 20})))
		raw, err := c.Conn.(*net.UnixConn).SyscallConn()
		check(t, err)
		n, before := 0, -1
		eventually(t, "the socket is full", func() bool {
			time.Sleep(20 * time.Millisecond)
			before = n
			raw.Control(func(fd uintptr) { n, err = unix.IoctlGetInt(int(fd), unix.TIOCINQ) })
			check(t, err)
			return n > 0 && n == before
		})
		return c, n
	}
	var some *nbdclient.Client
	for i := range maxWide {
		c, n := unread()
		some = c
		if n <= byDefault {
			t.Fatalf("%d bytes wait for client %d, expected more than %d", n, i, byDefault)
		}
	}
	if _, n := unread(); n > byDefault {
		t.Errorf("%d bytes wait for client %d, expected at most %d", n, maxWide, byDefault)
	}
	some.Close()
	eventually(t, "another takes its place", func() bool {
		c, n := unread()
		defer c.Close()
		return n > byDefault
	})
}

func TestIdleTimeout(t *testing.T) {
	dev, begun, release := slowDevice("read")
	dev.cold = func(off, _ int64) bool { return off < 1<<20 }
	r := serve(t, nbdserver.Config{Exports: []nbdserver.Export{{Device: dev}}, IdleTimeout: time.Second})
	idle := r.dial(simple)
	waiting := dialAndRead(t, r, begun)
	expectEnd(t, idle) // and not the other, which waits for us
	release <- struct{}{}
	_, err := waiting.Receive()
	check(t, err)
	expectEnd(t, waiting)
}

// dialAndRead returns a client whose read has begun, although the server may
// take a slow one for idle.
func dialAndRead(t *testing.T, r *rig, begun <-chan struct{}) *nbdclient.Client {
	t.Helper()
	for range 10 {
		nc, err := net.Dial("unix", r.socket)
		check(t, err)
		t.Cleanup(func() { nc.Close() })
		c, err := nbdclient.Greet(nc)
		if err != nil || c.Go("") != nil {
			continue
		}
		if _, err := c.Request(req{Type: nbd.CmdRead, Length: 512}); err != nil {
			continue
		}
		select {
		case <-begun:
			return c
		case <-time.After(10 * time.Second):
		}
	}
	t.Fatal("no read began in ten connections")
	return nil
}

func TestHandshakeTimeout(t *testing.T) {
	r := serve(t, nbdserver.Config{
		Exports:          []nbdserver.Export{{Device: newMemDevice(testSize)}},
		HandshakeTimeout: 300 * time.Millisecond,
	})
	for _, sent := range []string{"", "\x00\x00\x00\x03", "\x00\x00\x00\x03IHAVE"} {
		nc, err := net.Dial("unix", r.socket)
		check(t, err)
		io.WriteString(nc, sent)
		nc.SetReadDeadline(time.Now().Add(patience))
		if _, err := io.Copy(io.Discard, nc); err != nil && !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("after %q: %v, expected the server to close the connection", sent, err)
		}
		nc.Close()
	}
	eventually(t, "the failed handshakes are counted", func() bool { return r.srv.Stats().HandshakesFailed == 3 })
}

func TestMaxConnections(t *testing.T) {
	r := serve(t, nbdserver.Config{Exports: []nbdserver.Export{{Device: newMemDevice(testSize)}}, MaxConnections: 2})
	a := r.dial(simple)
	r.dial(simple)
	nc, err := net.Dial("unix", r.socket)
	check(t, err)
	expectEnd(t, nbdclient.Raw(nc))
	check(t, a.Disconnect())
	eventually(t, "a place is free again", func() bool { return r.srv.Stats().Connections == 1 })
	stillTalks(t, r.greet())
	if n := r.srv.Stats().Refused; n != 1 {
		t.Errorf("%d connections refused, expected 1", n)
	}
}

// ServeConn serves streams that are no sockets too, and says how they ended.
func TestServeConnPipe(t *testing.T) {
	r := serveDevice(t, newMemDevice(testSize))
	model := bytes.Clone(newMemDevice(testSize).data)
	client, server := net.Pipe()
	ended := make(chan error, 1)
	go func() { ended <- r.srv.ServeConn(server) }()
	c, err := nbdclient.Greet(client)
	check(t, err)
	check(t, c.StructuredReplies())
	check(t, c.Go(""))
	compareWithModel(t, c, model)
	check(t, c.Send(c.Encode(req{Type: nbd.CmdDisc})))
	if err := <-ended; err != nil {
		t.Errorf("ServeConn returned %v after a goodbye", err)
	}
}

// A socket that the kernel's client was given begins in the transmission phase.
func TestServeTransmission(t *testing.T) {
	client, server := socketpair(t)
	r := serveDevice(t, newMemDevice(testSize))
	dev := newMemDevice(testSize)
	e := &nbdserver.Export{Name: "elsewhere", Device: dev}
	if got := e.TransmissionFlags(); got != 0xd6d {
		t.Errorf("flags %#x, expected 0xd6d", got)
	}
	model := bytes.Clone(dev.data)
	ended := make(chan error, 1)
	go func() { ended <- r.srv.ServeTransmission(server, e) }()
	c := nbdclient.Raw(client)
	compareWithModel(t, c, model)
	c.Close()
	if err := <-ended; err != io.EOF {
		t.Errorf("ServeTransmission returned %v, expected EOF without a goodbye", err)
	}
}

// Who may connect is decided before a byte is sent.
func TestAllowed(t *testing.T) {
	exports := []nbdserver.Export{{Device: newMemDevice(testSize)}}
	me := os.Getuid()
	stillTalks(t, serve(t, nbdserver.Config{Exports: exports, AllowUIDs: []int{me + 1, me}}).greet())
	r := serve(t, nbdserver.Config{Exports: exports, AllowUIDs: []int{me + 1}})
	nc, err := net.Dial("unix", r.socket)
	check(t, err)
	expectEnd(t, nbdclient.Raw(nc))
	eventually(t, "the refusal is told", func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		return len(r.log) == 1 && strings.Contains(r.log[0], "is not allowed")
	})
}

func TestAllowedNets(t *testing.T) {
	exports := []nbdserver.Export{{Device: newMemDevice(testSize)}}
	for network, allowed := range map[string]bool{"127.0.0.0/8": true, "0.0.0.0/0": true, "10.0.0.0/8": false, "::/0": false} {
		r := serve(t, nbdserver.Config{Exports: exports, AllowNets: []netip.Prefix{netip.MustParsePrefix(network)}})
		nc, err := net.Dial("tcp", r.listen("tcp", "127.0.0.1:0").String())
		check(t, err)
		t.Cleanup(func() { nc.Close() })
		if !allowed {
			expectEnd(t, nbdclient.Raw(nc))
			continue
		}
		c, err := nbdclient.Greet(nc)
		check(t, err)
		stillTalks(t, c)
		stillTalks(t, r.greet()) // unix sockets have no network
	}
}

// A client that is killed in the middle of anything leaves nothing behind.
func TestCutOff(t *testing.T) {
	dev := newMemDevice(testSize)
	r := serveDevice(t, dev)
	encode := nbdclient.Raw(pipe(t)).Encode
	for _, cut := range [][]byte{
		{},
		{0x25},
		nbdclient.Uint32(nbd.RequestMagic),
		encode(req{Type: nbd.CmdWrite, Length: 4096}),
		append(encode(req{Type: nbd.CmdWrite, Length: 4096}), 1, 2, 3),
		append(encode(req{Type: nbd.CmdWrite, Length: 1 << 20}), make([]byte, 300_000)...),
		encode(req{Type: nbd.CmdRead, Length: 4 << 20}),
		bytes.Repeat(encode(req{Type: nbd.CmdRead, Length: 1 << 20}), 100),
	} {
		c := r.dial(simple)
		check(t, c.Send(cut))
		c.Close()
	}
	eventually(t, "every connection has ended", func() bool { return r.srv.Stats().Connections == 0 })
	eventually(t, "the sessions are closed", func() bool { return dev.sessions.Load() == 0 && dev.shown.Load() == 0 })
}
