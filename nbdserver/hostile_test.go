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
	"syscall"
	"testing"
	"time"

	"github.com/cowdev/cowdev/internal/nbd"
	"github.com/cowdev/cowdev/internal/nbdclient"
	"github.com/cowdev/cowdev/nbdserver"
	"golang.org/x/sys/unix"
)

// victimEnv names the socket that the tests' binary serves instead of testing.
const victimEnv = "NBDSERVER_VICTIM"

// victim serves a device until its standard input ends. For each line there it
// says what it holds.
func victim() {
	runtime.GOMAXPROCS(runtime.NumCPU() + 4) // as in cowdev serve
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
	pid    int
	in     io.Writer
	out    *bufio.Reader
	files  *os.File // end of out, for its deadline
}

// startSelf starts the tests' binary with one more variable in its
// environment, in a session of its own, so that the kernel is fair to it.
func startSelf(t *testing.T, env string) (cmd *exec.Cmd, in io.WriteCloser, out *os.File) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*patience)
	t.Cleanup(cancel)
	cmd = exec.CommandContext(ctx, os.Args[0])
	cmd.Env = append(os.Environ(), env)
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setsid: true}
	in, err := cmd.StdinPipe()
	check(t, err)
	out, outEnd, err := os.Pipe()
	check(t, err)
	cmd.Stdout = outEnd
	check(t, cmd.Start())
	outEnd.Close()
	return cmd, in, out
}

func startVictim(t *testing.T) *prey {
	dir, err := os.MkdirTemp("", "nbd")
	check(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	p := &prey{t: t, socket: filepath.Join(dir, "s")}
	cmd, in, out := startSelf(t, victimEnv+"="+p.socket)
	t.Cleanup(func() {
		in.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("the server under attack: %v", err)
		}
		out.Close()
	})
	p.pid, p.in, p.out, p.files = cmd.Process.Pid, in, bufio.NewReader(out), out
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

// spent returns the processor time that the victim has used.
func (p *prey) spent() time.Duration {
	p.t.Helper()
	var t unix.Timespec
	check(p.t, unix.ClockGettime(int32(^p.pid<<3|2), &t)) // clock_getcpuclockid(3)
	return time.Duration(t.Nano())
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

// Under each attack others are served with right data, and what the attack
// costs has a bound and is given back. How long others wait is told and not
// judged: beside how long they wait without the attack, and while the same
// attack is made on another server, which is as much work for the machine but
// none that this server could share out. Each is the median of the rounds. How
// many processors the attack kept busy is told too: on a busy machine other work
// keeps the attackers from theirs, and the latencies look good.
func TestHostileClients(t *testing.T) {
	attackers, rounds, reads := 50, 1, 300
	switch {
	case os.Getenv("COWDEV_LONG") != "":
		rounds, reads = 11, 1000
	case testing.Short():
		attackers, reads = 10, 100
	}
	p, elsewhere := startVictim(t), startVictim(t)
	good := p.dial()
	latencies(t, good, reads)
	before := p.settled(1)
	for i, a := range attacks {
		t.Run(a.name, func(t *testing.T) {
			p.t, elsewhere.t = t, t
			var alone, beside, under []time.Duration
			var during, spent time.Duration
			p99 := func() time.Duration { return percentile(latencies(t, good, reads), 99) }
			for range rounds {
				alone = append(alone, p99())

				h := startHorde(t, i, attackers, elsewhere.socket)
				beside = append(beside, p99())
				h.end()
				elsewhere.settled(0)

				h = startHorde(t, i, attackers, p.socket)
				began, had := time.Now(), p.spent()
				under = append(under, p99())
				during += time.Since(began)
				spent += p.spent() - had
				h.stop(t)
				held := p.holds()
				if limit := before.kib + 8<<10 + attackers*a.kib; held.kib > limit && !raceEnabled {
					t.Errorf("%d KiB of anonymous memory under attack, expected at most %d", held.kib, limit)
				}
				h.end()
				after := p.settled(1)
				if after.files > before.files || after.goroutines > before.goroutines+64 { // workers that wait
					t.Errorf("after the attack the server holds %+v, before %+v", after, before)
				}
			}
			t.Logf("p99 of others %v, %.1f processors busy in the server; %v while another server is attacked; %v without attack",
				percentile(under, 50), spent.Seconds()/during.Seconds(), percentile(beside, 50), percentile(alone, 50))
		})
	}
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
		crowd, float64(crowd)/took.Seconds(), each, percentile(during, 99), percentile(quiet, 99))
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
