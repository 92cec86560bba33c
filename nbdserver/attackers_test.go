package nbdserver_test

import (
	"bufio"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/cowdev/cowdev/internal/nbd"
	"github.com/cowdev/cowdev/internal/nbdclient"
)

// attackEnv names the attack that the tests' binary makes instead of testing,
// the number of connections, and the socket of the server.
const attackEnv = "NBDSERVER_ATTACK"

// An attack is what each of many connections does to a server.
type attack struct {
	name string
	kib  int // that a connection may cost the server while it lasts
	run  func(a *attacker)
}

// The first attacks let the server wait; from the option flood on they keep it
// busy until they are told to stop.
var attacks = []attack{
	{"silent", 16, func(a *attacker) { a.dial() }},
	{"garbage", 16, func(a *attacker) {
		p := make([]byte, 1<<16)
		for i := range p {
			p[i] = byte(rand.Uint32())
		}
		a.dial().Send(p)
	}},
	{"half a greeting", 16, func(a *attacker) { a.dial().Send([]byte{0, 0}) }},
	{"largest option", 128, func(a *attacker) {
		a.dial().Send(nbdclient.Uint32(3), nbdclient.Uint64(nbd.OptionMagic), nbdclient.Uint32(nbd.OptSetMetaContext), nbdclient.Uint32(1<<16), []byte{1})
	}},
	{"half a header", 32, func(a *attacker) { a.greet().Send(nbdclient.Uint32(nbd.RequestMagic), []byte{0}) }},
	{"payload that never comes", 320, func(a *attacker) {
		c := a.greet()
		c.Send(c.Encode(nbdclient.Request{Type: nbd.CmdWrite, Length: 32 << 20}))
	}},
	{"payload that stops", 640, func(a *attacker) {
		c := a.greet()
		c.Send(c.Encode(nbdclient.Request{Type: nbd.CmdWrite, Offset: lookedAt, Length: 3 << 20}), make([]byte, 1<<20))
	}},
	{"replies never read", 6 << 10, func(a *attacker) {
		c := a.greet()
		c.Write(repeat(c, 1000, nbdclient.Request{Type: nbd.CmdRead, Length: 1 << 20}))
	}},
	{"half-closed", 6 << 10, func(a *attacker) {
		c := a.greet()
		c.Write(repeat(c, 8, nbdclient.Request{Type: nbd.CmdRead, Length: 1 << 20}))
		c.Conn.(*net.UnixConn).CloseWrite()
	}},
	{"a byte at a time", 32, func(a *attacker) {
		c := a.greet()
		header := c.Encode(nbdclient.Request{Type: nbd.CmdRead, Length: 512})
		for i := 0; !a.over(); i++ {
			c.Write(header[i%len(header):][:1])
			time.Sleep(10 * time.Millisecond)
		}
	}},
	{"option flood", 128, func(a *attacker) {
		batch := nbdclient.Uint32(3)
		for range 2000 {
			batch = append(append(batch, nbdclient.Uint64(nbd.OptionMagic)...), 0, 0, 0, nbd.OptList, 0, 0, 0, 0)
		}
		for !a.over() {
			c := a.dial()
			go io.Copy(io.Discard, c)
			c.Write(batch)
			c.Close()
		}
	}},
	{"connection flood", 128, func(a *attacker) {
		for !a.over() {
			c := a.greet()
			c.ReadAt(make([]byte, 4096), 0)
			c.Close()
		}
	}},
	{"cut mid-request", 128, func(a *attacker) {
		for !a.over() {
			c := a.greet()
			c.Write(append(c.Encode(nbdclient.Request{Type: nbd.CmdWrite, Offset: lookedAt, Length: 1 << 20}), make([]byte, 100_000)...))
			c.Close()
		}
	}},
	{"bad requests", 1 << 10, func(a *attacker) {
		c := a.greet()
		var batch []byte
		for i := range 1000 {
			batch = append(batch, c.Encode(nbdclient.Request{Type: uint16(3 + i%9), Flags: uint16(i), Offset: 1<<64 - 1, Length: 1<<32 - 1})...)
		}
		a.flood(c, batch)
	}},
	{"small reads", 1 << 10, func(a *attacker) {
		c := a.greet()
		a.flood(c, repeat(c, 64, nbdclient.Request{Type: nbd.CmdRead, Length: 4096}))
	}},
	{"largest reads", 6 << 10, func(a *attacker) {
		c := a.greet()
		one := c.Encode(nbdclient.Request{Type: nbd.CmdRead, Length: testSize})
		for !a.over() { // not a flood: what a socket holds would be tens of GiB of replies
			c.Write(one)
			if _, err := io.CopyN(io.Discard, c, nbd.SimpleReplySize+testSize); err != nil {
				return
			}
		}
	}},
	{"largest writes", 1 << 10, func(a *attacker) {
		c := a.greet()
		a.flood(c, c.Encode(nbdclient.Request{Type: nbd.CmdWrite, Offset: lookedAt, Payload: make([]byte, testSize-lookedAt)}))
	}},
}

func repeat(c *nbdclient.Client, n int, r nbdclient.Request) (batch []byte) {
	for range n {
		batch = append(batch, c.Encode(r)...)
	}
	return batch
}

// An attacker is one of the connections of an attack.
type attacker struct {
	socket  string
	stopped *atomic.Bool

	mu   sync.Mutex
	conn net.Conn // the latest
}

func (a *attacker) over() bool { return a.stopped.Load() }

// dial returns a connection that has not been greeted.
func (a *attacker) dial() *nbdclient.Client {
	nc, err := net.Dial("unix", a.socket)
	if err != nil {
		nc, _ = net.Pipe() // the flood was too much for the socket's queue
		nc.Close()
	}
	a.mu.Lock()
	a.conn = nc
	a.mu.Unlock()
	return nbdclient.Raw(nc)
}

// greet returns a connection in the transmission phase.
func (a *attacker) greet() *nbdclient.Client {
	c := a.dial()
	if _, err := c.Recv(18); err != nil {
		return c
	}
	c.Send(nbdclient.Uint32(nbd.FlagFixedNewstyle | nbd.FlagNoZeroes))
	c.Go("")
	return c
}

// flood sends batch again and again, and throws the replies away.
func (a *attacker) flood(c *nbdclient.Client, batch []byte) {
	go io.Copy(io.Discard, c)
	for !a.over() {
		if _, err := c.Write(batch); err != nil {
			return
		}
	}
}

// attackServer is the process of the attackers. It says when they have begun.
// They attack until a line comes on standard input, and their connections stay
// open until it ends.
//
// The attackers have the lowest priority, alone and (autogroup) as a session:
// a client on another machine would not burn processors of the server's.
func attackServer() {
	syscall.Setpriority(syscall.PRIO_PGRP, 0, 19)
	os.WriteFile("/proc/self/autogroup", []byte("19"), 0) // where the kernel has it
	var i, n int
	var socket string
	fmt.Sscan(os.Getenv(attackEnv), &i, &n, &socket)
	var stopped atomic.Bool
	all := make([]*attacker, n)
	for k := range all {
		all[k] = &attacker{socket: socket, stopped: &stopped}
		go attacks[i].run(all[k])
	}
	fmt.Println("begun")
	lines := bufio.NewScanner(os.Stdin)
	lines.Scan()
	stopped.Store(true)
	for _, a := range all {
		a.mu.Lock()
		if a.conn != nil {
			a.conn.SetWriteDeadline(time.Unix(1, 0))
		}
		a.mu.Unlock()
	}
	fmt.Println("stopped")
	for lines.Scan() {
	}
}

// A horde is a running process of attackers.
type horde struct {
	in  io.WriteCloser
	out *bufio.Reader
	end func()
}

// startHorde has n connections make attack i on a server.
func startHorde(t *testing.T, i, n int, socket string) *horde {
	t.Helper()
	cmd, in, out := startSelf(t, fmt.Sprintf("%s=%d %d %s", attackEnv, i, n, socket))
	h := &horde{in: in, out: bufio.NewReader(out)}
	h.end = sync.OnceFunc(func() {
		in.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("the attackers: %v", err)
		}
		out.Close()
	})
	t.Cleanup(h.end)
	h.expect(t, "begun\n")
	return h
}

func (h *horde) expect(t *testing.T, line string) {
	t.Helper()
	got, err := h.out.ReadString('\n')
	check(t, err)
	if got != line {
		t.Fatalf("the attackers say %q, expected %q", got, line)
	}
}

// stop ends the attack; the connections stay open.
func (h *horde) stop(t *testing.T) {
	t.Helper()
	fmt.Fprintln(h.in)
	h.expect(t, "stopped\n")
}

// percentile returns the time that p of 100 took at most. It sorts them.
func percentile(took []time.Duration, p int) time.Duration {
	slices.Sort(took)
	return took[len(took)*p/100]
}
