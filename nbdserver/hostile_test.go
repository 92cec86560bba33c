package nbdserver_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/cowdev/cowdev/internal/nbd"
	"github.com/cowdev/cowdev/internal/nbdclient"
	"github.com/cowdev/cowdev/nbdserver"
)

// victimEnv names the socket that the tests' binary serves instead of testing.
const victimEnv = "NBDSERVER_VICTIM"

// victim serves a device until its standard input ends. For each line there it
// says what it holds.
func victim() {
	dev := newMemDevice(testSize)
	srv, err := nbdserver.New(nbdserver.Config{Exports: []nbdserver.Export{{Device: dev}}, HandshakeTimeout: patience})
	if err != nil {
		panic(err)
	}
	l, err := net.Listen("unix", os.Getenv(victimEnv))
	if err != nil {
		panic(err)
	}
	go srv.Serve(l)
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		runtime.GC() // twice, for what lies in pools
		runtime.GC()
		debug.FreeOSMemory()
		fds, _ := os.ReadDir("/proc/self/fd")
		fmt.Println(srv.Stats().Connections, len(fds), runtime.NumGoroutine(), anonymousKiB())
	}
}

func anonymousKiB() int {
	status, _ := os.ReadFile("/proc/self/status")
	_, rest, _ := strings.Cut(string(status), "RssAnon:")
	kib := 0
	fmt.Sscan(rest, &kib)
	return kib
}

// holds is what a victim holds: connections, open files, goroutines, and
// anonymous memory in KiB.
type holds struct{ connections, files, goroutines, kib int }

// A prey is a running victim.
type prey struct {
	t      *testing.T
	socket string
	in     io.Writer
	out    *bufio.Reader
	files  *os.File // end of out, for its deadline
}

func startVictim(t *testing.T) *prey {
	dir, err := os.MkdirTemp("", "nbd")
	check(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	p := &prey{t: t, socket: filepath.Join(dir, "s")}
	ctx, cancel := context.WithTimeout(context.Background(), 5*patience)
	t.Cleanup(cancel)
	cmd := exec.CommandContext(ctx, os.Args[0])
	cmd.Env = append(os.Environ(), victimEnv+"="+p.socket)
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	in, err := cmd.StdinPipe()
	check(t, err)
	out, outEnd, err := os.Pipe()
	check(t, err)
	cmd.Stdout = outEnd
	check(t, cmd.Start())
	outEnd.Close()
	t.Cleanup(func() {
		in.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("the server under attack: %v", err)
		}
		out.Close()
	})
	p.in, p.out, p.files = in, bufio.NewReader(out), out
	eventually(t, "the server listens", func() bool {
		c, err := net.Dial("unix", p.socket)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
	return p
}

func (p *prey) holds() (h holds) {
	p.t.Helper()
	fmt.Fprintln(p.in)
	p.files.SetReadDeadline(time.Now().Add(patience))
	line, err := p.out.ReadString('\n')
	check(p.t, err)
	_, err = fmt.Sscan(line, &h.connections, &h.files, &h.goroutines, &h.kib)
	check(p.t, err)
	return h
}

// settled waits until only n connections are left and returns what they hold.
func (p *prey) settled(n int) (h holds) {
	p.t.Helper()
	eventually(p.t, fmt.Sprintf("%d connections are left", n), func() bool {
		h = p.holds()
		return h.connections == n
	})
	return h
}

func (p *prey) dial() *nbdclient.Client {
	p.t.Helper()
	c, err := nbdclient.Dial("unix", p.socket)
	check(p.t, err)
	p.t.Cleanup(func() { c.Close() })
	check(p.t, c.Go(""))
	return c
}

// lookedAt is how much of the device, from its beginning, latencies reads.
const lookedAt = 1 << 20

// latencies does n reads and returns how long each took, sorted.
func latencies(t *testing.T, c *nbdclient.Client, n int) []time.Duration {
	t.Helper()
	model := newMemDevice(testSize).data
	var took []time.Duration
	got := make([]byte, 4096)
	for range n {
		off := rand.Int64N(lookedAt/4096) * 4096
		began := time.Now()
		_, err := c.ReadAt(got, off)
		took = append(took, time.Since(began))
		check(t, err)
		if !slices.Equal(got, model[off:off+4096]) {
			t.Fatalf("a read at %d during an attack is wrong: %x, expected %x", off, got[:8], model[off:off+8])
		}
	}
	slices.Sort(took)
	return took
}

// attacks are what a connection does to the server; each goes on until its
// connection is closed or it has no more to do. raw connections have not been
// greeted, others are in the transmission phase.
var attacks = []struct {
	name   string
	raw    bool
	kib    int // that a connection may cost the server while it lasts
	attack func(c *nbdclient.Client)
}{
	{"silent", true, 16, func(c *nbdclient.Client) {}},
	{"garbage", true, 16, func(c *nbdclient.Client) {
		p := make([]byte, 1<<16)
		for i := range p {
			p[i] = byte(rand.Uint32())
		}
		c.Send(p)
	}},
	{"half a greeting", true, 16, func(c *nbdclient.Client) { c.Send([]byte{0, 0}) }},
	{"option flood", true, 128, func(c *nbdclient.Client) {
		batch := nbdclient.Uint32(3)
		for range 20_000 {
			batch = append(append(batch, nbdclient.Uint64(nbd.OptionMagic)...), 0, 0, 0, nbd.OptList, 0, 0, 0, 0)
		}
		flood(c, batch)
	}},
	{"largest option", true, 128, func(c *nbdclient.Client) {
		c.Send(nbdclient.Uint32(3), nbdclient.Uint64(nbd.OptionMagic), nbdclient.Uint32(nbd.OptSetMetaContext), nbdclient.Uint32(1<<16), []byte{1})
	}},
	{"half a header", false, 32, func(c *nbdclient.Client) { c.Send(nbdclient.Uint32(nbd.RequestMagic), []byte{0}) }},
	{"payload that never comes", false, 320, func(c *nbdclient.Client) {
		c.Send(c.Encode(nbdclient.Request{Type: nbd.CmdWrite, Length: 32 << 20}))
	}},
	{"payload that stops", false, 640, func(c *nbdclient.Client) {
		c.Send(c.Encode(nbdclient.Request{Type: nbd.CmdWrite, Offset: lookedAt, Length: 3 << 20}), make([]byte, 1<<20))
	}},
	{"replies never read", false, 6 << 10, func(c *nbdclient.Client) {
		var batch []byte
		for range 1000 {
			batch = append(batch, c.Encode(nbdclient.Request{Type: nbd.CmdRead, Length: 1 << 20})...)
		}
		flood(c, batch)
	}},
	{"bad requests", false, 1 << 10, func(c *nbdclient.Client) {
		var batch []byte
		for i := range 1000 {
			batch = append(batch, c.Encode(nbdclient.Request{Type: uint16(3 + i%9), Flags: uint16(i), Offset: 1<<64 - 1, Length: 1<<32 - 1})...)
		}
		flood(c, batch)
	}},
}

// flood sends what the server will not take all of.
func flood(c *nbdclient.Client, batch []byte) {
	c.SetDeadline(time.Now().Add(500 * time.Millisecond))
	c.Write(batch)
}

// Under each attack others are served with right data, and what the attack
// costs has a bound and is given back.
func TestHostileClients(t *testing.T) {
	attackers := 50
	if testing.Short() {
		attackers = 10
	}
	p := startVictim(t)
	good := p.dial()
	quiet := latencies(t, good, 500)
	before := p.settled(1)
	for _, a := range attacks {
		t.Run(a.name, func(t *testing.T) {
			p.t = t
			var conns []net.Conn
			var running sync.WaitGroup
			for range attackers {
				nc, err := net.Dial("unix", p.socket)
				check(t, err)
				defer nc.Close()
				conns = append(conns, nc)
				running.Go(func() { runAttack(nc, a.raw, a.attack) })
			}
			during := latencies(t, good, 500)
			t.Logf("p99 of others %v, %v without the attack", during[495], quiet[495])
			running.Wait()
			h := p.holds()
			t.Logf("%d KiB per attacking connection", (h.kib-before.kib)/attackers)
			if limit := before.kib + 8<<10 + attackers*a.kib; h.kib > limit && !raceEnabled {
				t.Errorf("%d KiB of anonymous memory under attack, expected at most %d", h.kib, limit)
			}
			for _, c := range conns {
				c.Close()
			}
			after := p.settled(1)
			if after.files > before.files || after.goroutines > before.goroutines+64 { // workers that wait
				t.Errorf("after the attack the server holds %+v, before %+v", after, before)
			}
		})
	}
}

func runAttack(nc net.Conn, raw bool, attack func(*nbdclient.Client)) {
	c := nbdclient.Raw(nc)
	if !raw {
		greeted, err := nbdclient.Greet(nc)
		if err != nil || greeted.Go("") != nil {
			return
		}
		c = greeted
	}
	attack(c)
}

// A crowd of clients that have done something and wait costs little each, and
// leaves nothing. COWDEV_LONG=1 makes it 10,000.
func TestCrowd(t *testing.T) {
	crowd := 1000
	switch {
	case os.Getenv("COWDEV_LONG") != "":
		crowd = 10_000
	case testing.Short():
		crowd = 100
	}
	var limit syscall.Rlimit
	check(t, syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit))
	if limit.Cur < uint64(crowd)+100 {
		t.Skipf("only %d open files are allowed, %d connections need more", limit.Cur, crowd)
	}
	p := startVictim(t)
	good := p.dial()
	quiet := latencies(t, good, 500)
	before := p.settled(1)
	conns := make([]net.Conn, 0, crowd)
	defer func() {
		for _, c := range conns {
			c.Close()
		}
	}()
	began := time.Now()
	for range crowd {
		c, err := nbdclient.Dial("unix", p.socket)
		check(t, err)
		conns = append(conns, c)
		check(t, c.Go(""))
		_, err = c.ReadAt(make([]byte, 4096), 0)
		check(t, err)
	}
	took := time.Since(began)
	h := p.settled(crowd + 1)
	during := latencies(t, good, 500)
	each := float64(h.kib-before.kib) / float64(crowd)
	t.Logf("%d connections, %.0f sessions a second, %.1f KiB for each that waits, p99 of another %v (alone %v)",
		crowd, float64(crowd)/took.Seconds(), each, during[495], quiet[495])
	if each > 16 && crowd >= 1000 && !raceEnabled {
		t.Errorf("a waiting connection costs %.1f KiB, expected at most 16", each)
	}
	for _, c := range conns {
		c.Close()
	}
	after := p.settled(1)
	if after.files > before.files || after.goroutines > before.goroutines+64 {
		t.Errorf("after the crowd has left the server holds %+v, before it came %+v", after, before)
	}
}

// Clients that negotiate and close at once, in every phase, do no harm.
func TestConnectAndClose(t *testing.T) {
	p := startVictim(t)
	for i := range 300 {
		c, err := nbdclient.Dial("unix", p.socket)
		check(t, err)
		switch i % 4 {
		case 1:
			c.SendOption(nbd.OptGo, nbdclient.InfoQuery(""))
		case 2:
			check(t, c.Go(""))
		case 3:
			check(t, c.Go(""))
			c.Request(nbdclient.Request{Type: nbd.CmdRead, Length: 1 << 20})
		}
		c.Close()
	}
	if h := p.settled(0); h.connections != 0 {
		t.Errorf("%d connections are left", h.connections)
	}
	if _, err := p.dial().ReadAt(make([]byte, 512), 0); err != nil && !errors.Is(err, io.EOF) {
		t.Error(err)
	}
}
