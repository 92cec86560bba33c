package nbdserver_test

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/cowdev/cowdev/block"
	"github.com/cowdev/cowdev/internal/nbd"
	"github.com/cowdev/cowdev/internal/nbdclient"
	"github.com/cowdev/cowdev/nbdserver"
)

const testSize = 4 << 20

// patience is how long a test waits for what must happen.
const patience = 2 * time.Minute

// A rig is a server on a unix socket.
type rig struct {
	t      testing.TB
	srv    *nbdserver.Server
	socket string

	mu  sync.Mutex
	log []string
}

// serve starts a server and sees to its end.
func serve(t testing.TB, cfg nbdserver.Config) *rig {
	t.Helper()
	r := &rig{t: t}
	if cfg.HandshakeTimeout == 0 {
		cfg.HandshakeTimeout = patience // the default is short for a machine that stalls
	}
	cfg.ErrorLog = func(format string, args ...any) {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.log = append(r.log, fmt.Sprintf(format, args...))
	}
	srv, err := nbdserver.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	r.srv = srv
	dir, err := os.MkdirTemp("", "nbd") // shorter than t.TempDir: a socket's path has at most 108 bytes
	if err != nil {
		t.Fatal(err)
	}
	r.socket = filepath.Join(dir, "s")
	r.listen("unix", r.socket)
	t.Cleanup(func() {
		r.shutdown()
		os.RemoveAll(dir)
	})
	return r
}

// listen serves on one more listener and returns its address.
func (r *rig) listen(network, address string) net.Addr {
	r.t.Helper()
	l, err := net.Listen(network, address)
	if err != nil {
		r.t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- r.srv.Serve(l) }()
	r.t.Cleanup(func() {
		r.shutdown()
		if err := <-served; err != nbdserver.ErrServerClosed {
			r.t.Errorf("Serve on %v returned %v, expected ErrServerClosed", l.Addr(), err)
		}
	})
	return l.Addr()
}

func (r *rig) shutdown() {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := r.srv.Shutdown(ctx); err != nil {
		r.t.Errorf("Shutdown: %v", err)
	}
}

// serveDevice serves dev as the default export.
func serveDevice(t testing.TB, dev block.Device) *rig {
	t.Helper()
	return serve(t, nbdserver.Config{Exports: []nbdserver.Export{{Device: dev}}})
}

// greet returns a client in the handshake.
func (r *rig) greet() *nbdclient.Client {
	r.t.Helper()
	c, err := nbdclient.Dial("unix", r.socket)
	check(r.t, err)
	r.t.Cleanup(func() { c.Close() })
	return c
}

// greetOld returns a client that knows nothing of fixed newstyle.
func (r *rig) greetOld() *nbdclient.Client {
	r.t.Helper()
	nc, err := net.Dial("unix", r.socket)
	check(r.t, err)
	r.t.Cleanup(func() { nc.Close() })
	c := nbdclient.Raw(nc)
	_, err = c.Recv(18)
	check(r.t, err)
	check(r.t, c.Send(nbdclient.Uint32(0)))
	return c
}

// A style is a way to speak the transmission phase.
type style int

const (
	simple style = iota
	structured
	extended
)

var styles = []style{simple, structured, extended}

func (s style) String() string { return [...]string{"simple", "structured", "extended"}[s] }

// dial returns a client in the transmission phase.
func (r *rig) dial(s style, contexts ...string) *nbdclient.Client {
	r.t.Helper()
	c := r.greet()
	switch s {
	case structured:
		check(r.t, c.StructuredReplies())
	case extended:
		check(r.t, c.ExtendedHeaders())
	}
	if len(contexts) > 0 {
		check(r.t, c.SetMetaContexts("", contexts...))
	}
	check(r.t, c.Go(""))
	return c
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// eventually waits until holds does.
func eventually(t testing.TB, what string, holds func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !holds(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited %v in vain: %s", patience, what)
		}
	}
}

// A random sequence of requests in every style, over devices with and without
// sessions, warm and cold, does to the device what it does to a byte slice.
func TestAgainstModel(t *testing.T) {
	for _, s := range styles {
		for name, prepare := range map[string]func(*memDevice) block.Device{
			"viewed": func(d *memDevice) block.Device { return d },
			"pieces": func(d *memDevice) block.Device { d.pieces = 4096; return d },
			"cold":   func(d *memDevice) block.Device { d.cold = func(int64, int64) bool { return true }; return d },
			"plain":  func(d *memDevice) block.Device { return plainDevice{d} },
			"parked": func(d *memDevice) block.Device { d.blocking = true; return d },
		} {
			t.Run(fmt.Sprintf("%v/%s", s, name), func(t *testing.T) {
				dev := newMemDevice(testSize + 513)
				model := bytes.Clone(dev.data)
				compareWithModel(t, serveDevice(t, prepare(dev)).dial(s), model)
				eventually(t, "every session is told Done", func() bool { return dev.shown.Load() == 0 })
			})
		}
	}
}

func compareWithModel(t *testing.T, c *nbdclient.Client, model []byte) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	size := int64(len(model))
	noise := make([]byte, size+256)
	rand.NewChaCha8([32]byte{byte(seed)}).Read(noise)
	steps := 300
	if testing.Short() {
		steps = 60
	}
	for range steps {
		n := rnd.Int64N(1 << rnd.IntN(22))
		off := rnd.Int64N(size)
		n = min(n, size-off)
		switch rnd.IntN(6) {
		case 0, 1:
			got := make([]byte, n)
			if _, err := c.ReadAt(got, off); err != nil {
				t.Fatalf("read %d at %d: %v", n, off, err)
			}
			if !bytes.Equal(got, model[off:off+n]) {
				t.Fatalf("read %d at %d: not the bytes that were written", n, off)
			}
		case 2, 3:
			p := noise[rnd.IntN(256):][:n]
			if _, err := c.WriteFlags(p, off, uint16(rnd.IntN(2))); err != nil {
				t.Fatalf("write %d at %d: %v", n, off, err)
			}
			copy(model[off:], p)
		case 4:
			check(t, c.WriteZeroes(off, n, uint16(rnd.IntN(2))))
			clear(model[off : off+n])
		case 5:
			check(t, c.Flush())
		}
	}
	got := make([]byte, size)
	if _, err := c.ReadAt(got, 0); err != nil || !bytes.Equal(got, model) {
		t.Fatalf("the device differs at the end (%v)", err)
	}
}

// Many requests in one piece, some of which go to workers, are all answered
// with the right bytes.
func TestBatches(t *testing.T) {
	for _, s := range styles {
		t.Run(s.String(), func(t *testing.T) {
			dev := newMemDevice(testSize)
			dev.cold = func(off, _ int64) bool { return off>>16%3 == 0 }
			dev.pieces = 4096
			model := bytes.Clone(dev.data)
			c := serveDevice(t, dev).dial(s)
			seed := uint64(time.Now().UnixNano())
			t.Logf("seed %d", seed)
			rnd := rand.New(rand.NewPCG(seed, 0))
			for range 20 {
				readBatch(t, c, rnd, model)
			}
		})
	}
}

// readBatch sends many reads at once and compares their replies with model.
func readBatch(t *testing.T, c *nbdclient.Client, rnd *rand.Rand, model []byte) {
	var batch []byte
	asked := make(map[uint64]req)
	for cookie := range uint64(100) {
		r := req{Cookie: cookie + 1, Length: 1 + rnd.Uint64N(1<<rnd.IntN(18))}
		r.Offset = rnd.Uint64N(uint64(len(model)) - r.Length)
		asked[r.Cookie] = r
		c.Expect(r)
		batch = append(batch, c.Encode(r)...)
	}
	check(t, c.Send(batch))
	for len(asked) > 0 {
		m, err := c.Receive()
		check(t, err)
		r, data := asked[m.Cookie], m.Payload
		if !m.Simple && m.Type == nbd.ReplyOffsetData {
			data = data[8:]
		}
		if !m.Done() || !bytes.Equal(data, model[r.Offset:][:r.Length]) {
			t.Fatalf("reply to a read of %d at %d: %d bytes, done %v, not what was there", r.Length, r.Offset, len(data), m.Done())
		}
		delete(asked, m.Cookie)
	}
}
