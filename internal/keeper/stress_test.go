package keeper

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cowdev/cowdev/block"
	"github.com/cowdev/cowdev/nbdserver"
)

const (
	lanes     = 24 // requests of a seam's kernel in flight, each in a part of its own
	laneSize  = deviceSize / lanes
	stopLimit = 30 * time.Millisecond // of servers that hang
	overdue   = 20 * time.Second      // a request that waits so long waits for ever
)

// A seam is a kernel and servers, with the keeper between, over sockets as the
// product has them. The kernel has lanes requests in flight over its
// connections, and may give a connection up; servers are killed, hang, are
// handed over, and some do not come up.
type seam struct {
	t      *testing.T
	keeper *Keeper
	disk   *disk
	stop   chan struct{} // ends the lanes

	mu     sync.Mutex // of the kernel's connections and the current server
	place  *sync.Cond // a connection is there again
	conns  []*kernelConn
	server *seamServer
	now    int // servers that are alive, at most one

	rngMu sync.Mutex
	rng   *rand.Rand

	requests, again, gaveUp, kills, hangs, starts, handOvers atomic.Int64
	longest                                                  atomic.Int64 // wait of a request, ns
}

func (s *seam) chance(n int) bool { return s.intN(n) == 0 }
func (s *seam) intN(n int) int {
	s.rngMu.Lock()
	defer s.rngMu.Unlock()
	return s.rng.IntN(n)
}

// unixPair returns a connected pair of unix sockets.
func unixPair() (a, b net.Conn) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		panic(err)
	}
	conn := func(fd int) net.Conn {
		f := os.NewFile(uintptr(fd), "")
		defer f.Close()
		c, err := net.FileConn(f)
		if err != nil {
			panic(err)
		}
		return c
	}
	return conn(fds[0]), conn(fds[1])
}

// write writes b, in pieces now and then.
func (s *seam) write(c net.Conn, b []byte) error {
	for len(b) > 0 {
		n := len(b)
		if s.chance(8) {
			n = 1 + s.intN(n)
		}
		if _, err := c.Write(b[:n]); err != nil {
			return err
		}
		if b = b[n:]; len(b) > 0 && s.chance(2) {
			time.Sleep(time.Duration(s.intN(300)) * time.Microsecond)
		}
	}
	return nil
}

// A kernelConn is one connection, by the kernel's end.
type kernelConn struct {
	s  *seam
	c  net.Conn
	tx sync.Mutex

	mu      sync.Mutex
	dead    bool
	flights map[uint64]*flight
}

// A flight is one request on its way.
type flight struct {
	cookie uint64
	read   []byte     // of a READ
	over   chan error // errAgain when its connection was given up
}

var errAgain = errors.New("sent again")

func (s *seam) newConn() (*kernelConn, net.Conn) {
	front, c := unixPair()
	k := &kernelConn{s: s, c: c, flights: make(map[uint64]*flight)}
	go k.receive()
	return k, front
}

// receive ends flights by their replies.
func (k *kernelConn) receive() {
	in := bufio.NewReader(k.c)
	for {
		var head [replySize]byte
		_, err := io.ReadFull(in, head[:])
		k.mu.Lock()
		dead := k.dead
		f := k.flights[binary.BigEndian.Uint64(head[8:])]
		delete(k.flights, binary.BigEndian.Uint64(head[8:]))
		k.mu.Unlock()
		if dead {
			return
		}
		if err != nil {
			k.s.t.Errorf("kernel's connection: %v", err)
			return
		}
		if f == nil || binary.BigEndian.Uint32(head[:]) != replyMagic || binary.BigEndian.Uint32(head[4:]) != 0 {
			k.s.t.Errorf("reply %x: to nothing in flight, or an error", head)
			return
		}
		if _, err = io.ReadFull(in, f.read); err != nil {
			err = errAgain // given up; other reasons are found above
		}
		f.over <- err
	}
}

// giveUp ends a connection: what is in flight on it is sent again.
func (k *kernelConn) giveUp() {
	k.mu.Lock()
	k.dead = true
	flights := k.flights
	k.flights = nil
	k.mu.Unlock()
	k.c.Close()
	for _, f := range flights {
		f.over <- errAgain
	}
}

// send sends a request over any connection that is alive.
func (s *seam) send(f *flight, message []byte) {
	s.mu.Lock()
	for {
		var alive []*kernelConn
		for _, k := range s.conns {
			if k != nil {
				alive = append(alive, k)
			}
		}
		if len(alive) == 0 {
			s.place.Wait()
			continue
		}
		k := alive[s.intN(len(alive))]
		s.mu.Unlock()
		k.tx.Lock()
		defer k.tx.Unlock()
		k.mu.Lock()
		if k.dead {
			k.mu.Unlock()
			f.over <- errAgain
			return
		}
		k.flights[f.cookie] = f
		k.mu.Unlock()
		_ = s.write(k.c, message) // what fails was given up
		return
	}
}

// lane does one request after another in its part of the disk, and looks at
// each answer.
func (s *seam) lane(number int, large bool) {
	most := 4 << 10
	if large {
		most = laneSize
	}
	want := make([]byte, laneSize)
	rng := rand.New(rand.NewPCG(uint64(number), uint64(s.intN(1<<30))))
	var cookie uint64
	for {
		select {
		case <-s.stop:
			s.disk.mu.Lock()
			defer s.disk.mu.Unlock()
			if !bytes.Equal(want, s.disk.bytes[number*laneSize:][:laneSize]) {
				s.t.Errorf("lane %d: the disk is not what was written", number)
			}
			return
		default:
		}
		off, n := 0, 1+rng.IntN(most)
		off = rng.IntN(laneSize - n + 1)
		kind := uint16(rng.IntN(2))
		var data []byte
		if kind == cmdWrite {
			data = make([]byte, n)
			for i := range data {
				data[i] = byte(rng.Uint32())
			}
			copy(want[off:], data)
		}
		start := time.Now()
		for err := errAgain; err != nil; {
			cookie++
			f := &flight{cookie: cookie<<32 | uint64(number), over: make(chan error, 2)}
			if kind == cmdRead {
				f.read = make([]byte, n)
			}
			s.send(f, append(header(kind, f.cookie, uint64(number*laneSize+off), n), data...))
			select {
			case err = <-f.over:
			case <-time.After(overdue):
				s.t.Errorf("lane %d: request %#x (kind %d, %d bytes) got no answer in %v", number, f.cookie, kind, n, overdue)
				return
			}
			if err != nil {
				s.again.Add(1)
			} else if kind == cmdRead && !bytes.Equal(f.read, want[off:off+n]) {
				s.t.Errorf("lane %d: read of %d bytes at %d: not what was written", number, n, off)
			}
		}
		s.requests.Add(1)
		if wait := int64(time.Since(start)); wait > s.longest.Load() {
			s.longest.Store(wait)
		}
	}
}

// A seamServer is one life of a server.
type seamServer struct {
	s    *seam
	ours []net.Conn
	left sync.WaitGroup

	mu     sync.Mutex
	thawed *sync.Cond
	frozen bool
	doomed bool // frozen until it is killed
	dead   bool
}

var errDead = errors.New("dead")

// gate is passed by every operation. It holds those of a server that hangs.
func (v *seamServer) gate() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	for v.frozen && !v.dead {
		v.thawed.Wait()
	}
	if v.dead {
		return errDead
	}
	return nil
}

func (v *seamServer) freeze(doom bool) {
	v.mu.Lock()
	v.frozen = true
	v.doomed = v.doomed || doom
	v.mu.Unlock()
}

func (v *seamServer) thaw() {
	v.mu.Lock()
	v.frozen = v.doomed
	v.thawed.Broadcast()
	v.mu.Unlock()
}

func (v *seamServer) kill() {
	for _, c := range v.ours {
		c.Close()
	}
	v.mu.Lock()
	v.dead = true
	v.thawed.Broadcast()
	v.mu.Unlock()
}

// A seamDevice is the disk as a server of nbdserver has it.
type seamDevice struct {
	block.Device // what is not asked for
	v            *seamServer
}

func (d seamDevice) Size() int64    { return deviceSize }
func (d seamDevice) ReadOnly() bool { return false }
func (d seamDevice) ReadAt(p []byte, off int64) (int, error) {
	if err := d.v.gate(); err != nil {
		return 0, err
	}
	d.v.s.disk.mu.Lock()
	defer d.v.s.disk.mu.Unlock()
	return copy(p, d.v.s.disk.bytes[off:]), nil
}
func (d seamDevice) WriteAt(p []byte, off int64) (int, error) {
	if err := d.v.gate(); err != nil {
		return 0, err
	}
	d.v.s.disk.mu.Lock()
	defer d.v.s.disk.mu.Unlock()
	return copy(d.v.s.disk.bytes[off:], p), nil
}

// serve answers one connection: as a simple server that answers out of order
// and stammers.
func (v *seamServer) serve(c net.Conn) {
	var replies sync.Mutex
	var all sync.WaitGroup
	defer all.Wait()
	defer c.Close()
	in := bufio.NewReader(c)
	d := seamDevice{v: v}
	for {
		head := make([]byte, requestSize)
		if _, err := io.ReadFull(in, head); err != nil || binary.BigEndian.Uint16(head[6:]) == cmdDisc || v.gate() != nil {
			return
		}
		off, data := int64(binary.BigEndian.Uint64(head[16:])), make([]byte, binary.BigEndian.Uint32(head[24:]))
		write := binary.BigEndian.Uint16(head[6:]) == cmdWrite
		if write {
			if _, err := io.ReadFull(in, data); err != nil {
				return
			}
		}
		all.Go(func() {
			reply := answerTo(binary.BigEndian.Uint64(head[8:]))
			var err error
			if write {
				_, err = d.WriteAt(data, off)
			} else {
				_, err = d.ReadAt(data, off)
				reply = append(reply, data...)
			}
			if err == nil {
				replies.Lock()
				defer replies.Unlock()
				v.s.write(c, reply)
			}
		})
	}
}

func (s *seam) launch(context.Context) (*Server, error) {
	time.Sleep(time.Duration(s.intN(3000)) * time.Microsecond)
	if s.chance(8) {
		return nil, errors.New("did not come up")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.now++; s.now > 1 {
		s.t.Error("two servers at once")
	}
	v := &seamServer{s: s}
	v.thawed = sync.NewCond(&v.mu)
	s.server = v
	var conns []net.Conn
	export := nbdserver.Export{Device: seamDevice{v: v}}
	real, err := nbdserver.New(nbdserver.Config{Exports: []nbdserver.Export{export}})
	if err != nil {
		return nil, err
	}
	stammers := s.chance(2)
	for range s.conns {
		a, b := unixPair()
		conns, v.ours = append(conns, a), append(v.ours, b)
		v.left.Go(func() {
			if stammers {
				v.serve(b)
			} else {
				_ = real.ServeTransmission(b, &export)
			}
		})
	}
	s.starts.Add(1)
	if s.chance(10) {
		v.kill() // at once
	}
	exited := make(chan struct{})
	go func() {
		v.left.Wait()
		s.mu.Lock()
		s.now--
		s.mu.Unlock()
		close(exited)
	}()
	stop := func() {
		for _, c := range conns {
			c.Close()
		}
	}
	return &Server{Conns: conns, Exited: exited, Stop: stop, Kill: func() { stop(); v.kill() }}, nil
}

// reconnect is the keeper's, for a connection that was given up.
func (s *seam) reconnect(i int) (net.Conn, error) {
	k, front := s.newConn()
	s.mu.Lock()
	s.conns[i] = k
	s.place.Broadcast()
	s.mu.Unlock()
	return front, nil
}

// giveUp lets the kernel give up a connection, as it does when a request was
// not answered for long: nothing is done any more by the server that has it.
func (s *seam) giveUp() {
	s.mu.Lock()
	defer s.mu.Unlock()
	i := s.intN(len(s.conns))
	k := s.conns[i]
	if k == nil {
		return
	}
	s.server.freeze(true)
	s.keeper.mu.Lock()
	r := s.keeper.relays[i]
	s.keeper.mu.Unlock()
	s.conns[i] = nil
	k.giveUp()
	s.gaveUp.Add(1)
	r.mu.Lock() // it takes its time until the next server is there
	defer r.mu.Unlock()
	for !r.ended {
		r.changed.Wait()
	}
}

func (s *seam) current() *seamServer {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.server
}

// disturb does one thing to the servers, or to the kernel's connections.
func (s *seam) disturb() {
	switch s.intN(8) {
	case 0, 1, 2:
		s.current().kill()
		s.kills.Add(1)
	case 3, 4:
		v := s.current()
		v.freeze(false)
		time.Sleep(time.Duration(s.intN(5)) * time.Millisecond)
		v.thaw()
		s.hangs.Add(1)
	case 5, 6:
		ctx, cancel := context.WithTimeout(context.Background(), overdue)
		defer cancel()
		if err := s.keeper.HandOver(ctx); err != nil {
			s.t.Errorf("hand over: %v", err)
		}
		s.handOvers.Add(1)
	case 7:
		s.giveUp()
	}
}

// run has the seam work for so long.
func runSeam(t *testing.T, seed uint64, connections int, large bool, long time.Duration) *seam {
	s := &seam{t: t, disk: new(disk), stop: make(chan struct{}), rng: rand.New(rand.NewPCG(seed, 0))}
	s.place = sync.NewCond(&s.mu)
	var fronts []net.Conn
	for range connections {
		k, front := s.newConn()
		s.conns, fronts = append(s.conns, k), append(fronts, front)
	}
	s.keeper = New(Config{Launch: s.launch, Reconnect: s.reconnect, Patience: testLimit, StopLimit: stopLimit}, fronts)
	first, err := s.launch(context.Background())
	for err != nil {
		first, err = s.launch(context.Background())
	}
	ran := make(chan error, 1)
	go func() { ran <- s.keeper.Run(context.Background(), first) }()
	var all sync.WaitGroup
	for i := range lanes {
		all.Go(func() { s.lane(i, large) })
	}
	for end := time.Now().Add(long); time.Now().Before(end) && !t.Failed(); {
		time.Sleep(time.Duration(s.intN(8)) * time.Millisecond)
		s.disturb()
	}
	close(s.stop)
	all.Wait()
	if t.Failed() { // what is left may hang for ever
		return s
	}
	s.mu.Lock()
	for _, k := range s.conns {
		for k == nil {
			s.place.Wait()
			k = s.conns[0]
			for _, other := range s.conns {
				if other == nil {
					k = nil
				}
			}
		}
	}
	conns := append([]*kernelConn(nil), s.conns...)
	s.mu.Unlock()
	for _, k := range conns {
		k.mu.Lock()
		k.dead = true
		k.mu.Unlock()
		(&kernel{c: k.c}).bye()
	}
	select {
	case err := <-ran:
		if err != nil {
			t.Errorf("keeper: %v", err)
		}
	case <-time.After(overdue):
		t.Errorf("the keeper still runs %v after the goodbye", overdue)
	}
	return s
}

// Every request is answered once, rightly and soon, whatever becomes of servers
// and connections. COWDEV_LONG=1 does so for five minutes.
func TestSeam(t *testing.T) {
	whole := 2 * time.Second
	switch {
	case os.Getenv("COWDEV_LONG") != "":
		whole = 5 * time.Minute
	case testing.Short():
		whole = time.Second
	}
	first := *seed
	if first == 0 {
		first = rand.Uint64()
	}
	for begun, i := time.Now(), uint64(0); time.Since(begun) < whole && !t.Failed(); i++ {
		now, connections, large := first+i, 1+int(i%3), i%2 == 1
		t.Run(fmt.Sprintf("seed=%d", now), func(t *testing.T) {
			s := runSeam(t, now, connections, large, whole/8)
			t.Logf("%d connections, large %v: %d requests, %d sent again, %d connections given up; %d servers, %d kills, %d hangs, %d hand-overs; longest wait %v",
				connections, large, s.requests.Load(), s.again.Load(), s.gaveUp.Load(), s.starts.Load(), s.kills.Load(), s.hangs.Load(), s.handOvers.Load(),
				time.Duration(s.longest.Load()).Round(time.Millisecond))
		})
	}
}
