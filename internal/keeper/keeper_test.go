package keeper

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

var seed = flag.Uint64("seed", 0, "seed of the random tests, 0 for one that is printed")

const (
	deviceSize = 1 << 20
	testLimit  = 60 * time.Second
)

// A disk is the memory that servers of a test share: what one has written the
// next one finds.
type disk struct {
	mu    sync.Mutex
	bytes [deviceSize]byte
	done  atomic.Int64 // requests carried out
}

// testServer answers requests from d until its connection ends. A budget of
// bytes, when not zero, ends it in the middle of whatever it then sends or
// receives.
func (d *disk) serve(c net.Conn, budget int) error {
	rw := io.ReadWriter(c)
	if budget > 0 {
		rw = &mortal{c, budget}
	}
	for {
		var head [requestSize]byte
		if _, err := io.ReadFull(rw, head[:]); err != nil {
			return err
		}
		kind, off, n := binary.BigEndian.Uint16(head[6:]), binary.BigEndian.Uint64(head[16:]), binary.BigEndian.Uint32(head[24:])
		reply := make([]byte, replySize, replySize+n)
		binary.BigEndian.PutUint32(reply, replyMagic)
		copy(reply[8:], head[8:16])
		switch kind {
		case cmdDisc:
			return nil
		case cmdWrite:
			data := make([]byte, n)
			if _, err := io.ReadFull(rw, data); err != nil {
				return err
			}
			d.mu.Lock()
			copy(d.bytes[off:], data)
			d.mu.Unlock()
		case cmdRead:
			d.mu.Lock()
			reply = append(reply, d.bytes[off:off+uint64(n)]...)
			d.mu.Unlock()
		}
		d.done.Add(1)
		if _, err := rw.Write(reply); err != nil {
			return err
		}
	}
}

// mortal ends a connection after so many bytes.
type mortal struct {
	net.Conn
	budget int
}

func (m *mortal) spend(b []byte) []byte {
	b = b[:min(len(b), m.budget)]
	m.budget -= len(b)
	return b
}

func (m *mortal) Read(b []byte) (int, error) {
	if b = m.spend(b); len(b) == 0 {
		return 0, io.ErrUnexpectedEOF
	}
	return m.Conn.Read(b)
}

func (m *mortal) Write(b []byte) (int, error) {
	cut := m.spend(b)
	n, err := m.Conn.Write(cut)
	if err == nil && len(cut) < len(b) {
		err = io.ErrShortWrite
	}
	return n, err
}

// launch makes a server of n connections over d that lives for about life
// bytes, 0 for ever.
func (d *disk) launch(n, life int) *Server {
	exited := make(chan struct{})
	var conns, ours []net.Conn
	for range n {
		a, b := net.Pipe()
		conns, ours = append(conns, a), append(ours, b)
	}
	var all sync.WaitGroup
	end := func() {
		for _, c := range ours {
			c.Close()
		}
	}
	for _, c := range ours {
		all.Go(func() {
			d.serve(c, life)
			if life > 0 {
				end() // a process dies as a whole
			}
			c.Close()
		})
	}
	go func() { all.Wait(); close(exited) }()
	return &Server{Conns: conns, Exited: exited, Stop: end, Kill: end}
}

// A kernel is the client of a test. It numbers its requests, and fails on any
// reply that is not to one of them.
type kernel struct {
	t    *testing.T
	c    net.Conn
	rng  *rand.Rand
	want [deviceSize]byte // what acknowledged writes have left
}

// run does rounds of requests in flight at once, none touching what another
// of its round touches, and compares what it reads.
func (k *kernel) run(rounds, base, size int) error {
	k.c.SetDeadline(time.Now().Add(testLimit))
	cookie := uint64(0)
	for range rounds {
		type flight struct {
			kind     uint16
			off, len int
		}
		flights := map[uint64]flight{}
		var out []byte
		const lanes = 16
		for lane := range lanes {
			f := flight{kind: uint16(k.rng.IntN(2)), off: base + lane*size/lanes, len: 1 + k.rng.IntN(size/lanes)}
			cookie++
			flights[cookie] = f
			var head [requestSize]byte
			binary.BigEndian.PutUint32(head[:], requestMagic)
			binary.BigEndian.PutUint16(head[6:], f.kind)
			binary.BigEndian.PutUint64(head[8:], cookie)
			binary.BigEndian.PutUint64(head[16:], uint64(f.off))
			binary.BigEndian.PutUint32(head[24:], uint32(f.len))
			out = append(out, head[:]...)
			if f.kind == cmdWrite {
				for i := range f.len {
					k.want[f.off+i] = byte(k.rng.Uint32())
				}
				out = append(out, k.want[f.off:f.off+f.len]...)
			}
		}
		sent := make(chan error, 1)
		go func() { _, err := k.c.Write(out); sent <- err }()
		for range lanes {
			var head [replySize]byte
			if _, err := io.ReadFull(k.c, head[:]); err != nil {
				return fmt.Errorf("read a reply: %w", err)
			}
			c := binary.BigEndian.Uint64(head[8:])
			f, ok := flights[c]
			if !ok || binary.BigEndian.Uint32(head[4:]) != 0 {
				return fmt.Errorf("reply %x: to nothing in flight, or an error", head)
			}
			delete(flights, c)
			if f.kind == cmdRead {
				got := make([]byte, f.len)
				if _, err := io.ReadFull(k.c, got); err != nil {
					return fmt.Errorf("read a reply's data: %w", err)
				}
				if !bytes.Equal(got, k.want[f.off:f.off+f.len]) {
					return fmt.Errorf("read at %d: not what was written", f.off)
				}
			}
		}
		if err := <-sent; err != nil {
			return err
		}
	}
	return nil
}

// bye says goodbye as the kernel does on disconnecting.
func (k *kernel) bye() {
	var head [requestSize]byte
	binary.BigEndian.PutUint32(head[:], requestMagic)
	binary.BigEndian.PutUint16(head[6:], cmdDisc)
	k.c.Write(head[:])
	k.c.Close()
}

// world is a keeper between test kernels and servers over one disk.
type world struct {
	keeper  *Keeper
	kernels []*kernel
	disk    *disk
	ran     chan error
}

func newWorld(t *testing.T, n int, life func() int) *world {
	s := *seed
	if s == 0 {
		s = rand.Uint64()
	}
	t.Logf("-seed %d", s)
	w := &world{disk: new(disk), ran: make(chan error, 1)}
	var fronts []net.Conn
	for i := range n {
		a, b := net.Pipe()
		fronts = append(fronts, a)
		w.kernels = append(w.kernels, &kernel{t: t, c: b, rng: rand.New(rand.NewPCG(s, uint64(i)))})
	}
	w.keeper = New(Config{
		Launch:   func(context.Context) (*Server, error) { return w.disk.launch(n, life()), nil },
		Patience: testLimit,
	}, fronts)
	go func() { w.ran <- w.keeper.Run(context.Background(), w.disk.launch(n, life())) }()
	return w
}

// finish says goodbye and waits for the keeper to end well.
func (w *world) finish(t *testing.T) {
	t.Helper()
	for _, k := range w.kernels {
		k.bye()
	}
	select {
	case err := <-w.ran:
		if err != nil {
			t.Errorf("keeper: %v", err)
		}
	case <-time.After(testLimit):
		t.Fatalf("the keeper still runs %v after the kernel's goodbye", testLimit)
	}
}

// runAll runs every kernel in a part of the disk of its own.
func (w *world) runAll(t *testing.T, rounds int) {
	t.Helper()
	var all sync.WaitGroup
	for i, k := range w.kernels {
		all.Go(func() {
			size := deviceSize / len(w.kernels)
			if err := k.run(rounds, i*size, size); err != nil {
				t.Errorf("kernel %d: %v", i, err)
			}
		})
	}
	all.Wait()
}

func TestRelaysToOneServer(t *testing.T) {
	w := newWorld(t, 2, func() int { return 0 })
	w.runAll(t, 50)
	w.finish(t)
	if s := w.keeper.Stats(); s != (Stats{}) {
		t.Errorf("stats %+v, expected none lost", s)
	}
}

// Servers die after a random number of bytes, within requests and within
// replies: the kernel sees each request answered once, and no byte is wrong.
func TestServersDie(t *testing.T) {
	w := newWorld(t, 2, func() int { return 1 + rand.IntN(4*deviceSize) })
	w.runAll(t, 100)
	w.finish(t)
	if s := w.keeper.Stats(); s.Losses == 0 {
		t.Error("no server died: the test shows nothing")
	} else {
		t.Logf("%d servers lost, longest gap %v", s.Losses, s.MaxGap)
	}
}

// A hand-over does every request once.
func TestHandOver(t *testing.T) {
	w := newWorld(t, 2, func() int { return 0 })
	stop, over := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(over)
		for {
			select {
			case <-stop:
				return
			default:
			}
			ctx, cancel := context.WithTimeout(context.Background(), testLimit)
			if err := w.keeper.HandOver(ctx); err != nil {
				t.Errorf("hand over: %v", err)
			}
			cancel()
		}
	}()
	w.runAll(t, 100)
	close(stop)
	<-over
	s := w.keeper.Stats()
	w.finish(t)
	if s.HandOvers == 0 || s.Losses != 0 {
		t.Errorf("stats %+v, expected hand-overs and no losses", s)
	}
	if done := w.disk.done.Load(); done != 2*100*16 {
		t.Errorf("%d requests carried out, expected %d", done, 2*100*16)
	}
	t.Logf("%d hand-overs, longest gap %v", s.HandOvers, s.MaxGap)
}

// A keeper without a server gives up when its patience ends, and the kernel
// sees its connection end.
func TestGivesUp(t *testing.T) {
	front, kernelEnd := net.Pipe()
	k := New(Config{
		Launch:   func(context.Context) (*Server, error) { return nil, errors.New("no such thing") },
		Patience: 50 * time.Millisecond,
	}, []net.Conn{front})
	d := new(disk)
	ran := make(chan error, 1)
	first := d.launch(1, 0)
	go func() { ran <- k.Run(context.Background(), first) }()
	first.Kill()
	kernelEnd.SetDeadline(time.Now().Add(testLimit))
	if _, err := kernelEnd.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("kernel's end: %v, expected EOF", err)
	}
	if err := <-ran; !errors.Is(err, ErrGaveUp) {
		t.Errorf("%v, expected ErrGaveUp", err)
	}
}

// A front that the kernel gave up is replaced by what Reconnect brings.
func TestFrontIsReplaced(t *testing.T) {
	front, kernelEnd := net.Pipe()
	second, kernelAgain := net.Pipe()
	d := new(disk)
	k := New(Config{
		Launch:    func(context.Context) (*Server, error) { return d.launch(1, 0), nil },
		Reconnect: func(int) (net.Conn, error) { return second, nil },
		Patience:  testLimit,
	}, []net.Conn{front})
	ran := make(chan error, 1)
	go func() { ran <- k.Run(context.Background(), d.launch(1, 0)) }()
	kernelEnd.Close()
	client := &kernel{t: t, c: kernelAgain, rng: rand.New(rand.NewPCG(1, 1))}
	if err := client.run(5, 0, deviceSize); err != nil {
		t.Error(err)
	}
	client.bye()
	if err := <-ran; err != nil {
		t.Errorf("keeper: %v", err)
	}
}

// Nonsense from a server makes an end of that server, not of the front.
func TestServerTalksNonsense(t *testing.T) {
	front, kernelEnd := net.Pipe()
	d := new(disk)
	k := New(Config{
		Launch:   func(context.Context) (*Server, error) { return d.launch(1, 0), nil },
		Patience: testLimit,
	}, []net.Conn{front})
	a, b := net.Pipe()
	exited := make(chan struct{})
	kill := sync.OnceFunc(func() { b.Close(); close(exited) })
	go b.Write(bytes.Repeat([]byte("nonsense"), 10))
	ran := make(chan error, 1)
	go func() {
		ran <- k.Run(context.Background(), &Server{Conns: []net.Conn{a}, Exited: exited, Stop: kill, Kill: kill})
	}()
	client := &kernel{t: t, c: kernelEnd, rng: rand.New(rand.NewPCG(1, 1))}
	if err := client.run(5, 0, deviceSize); err != nil {
		t.Error(err)
	}
	client.bye()
	if err := <-ran; err != nil {
		t.Errorf("keeper: %v", err)
	}
	if s := k.Stats(); s.Losses != 1 {
		t.Errorf("%d losses, expected 1", s.Losses)
	}
}

// A kernel that says goodbye while no server comes up is not kept waiting until
// the keeper has lost patience.
func TestGoodbyeWithoutServer(t *testing.T) {
	w := newWorld(t, 2, func() int { return 0 })
	tried := make(chan struct{}, 1000)
	w.keeper.cfg.Launch = func(context.Context) (*Server, error) {
		tried <- struct{}{}
		return nil, errors.New("no such thing")
	}
	go w.keeper.HandOver(context.Background())
	<-tried
	start := time.Now()
	w.finish(t)
	if took := time.Since(start); took > testLimit/3 {
		t.Errorf("the keeper ended after %v", took)
	}
}
