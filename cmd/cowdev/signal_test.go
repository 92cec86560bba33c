package main

// What signals do to a server that serves: the real binary, with clients of
// every kind of patience.

import (
	"bytes"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/cowdev/cowdev/internal/nbd"
	"github.com/cowdev/cowdev/internal/nbdclient"
)

// deviceSize is that of the largest read, and more than any socket holds.
const deviceSize = 32 << 20

// messages are what a process has said on stderr so far.
type messages struct {
	mu   sync.Mutex
	said bytes.Buffer
}

func (m *messages) Write(p []byte) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.said.Write(p)
}

func (m *messages) String() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.said.String()
}

// within waits until done holds.
func within(t *testing.T, what string, done func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !done(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: not within %v", what, patience)
		}
	}
}

// dialServer connects to the server of cow.img in dir.
func dialServer(t *testing.T, dir string) *nbdclient.Client {
	t.Helper()
	c, err := nbdclient.Dial("unix", filepath.Join(dir, "cow.img.sock"))
	must(t, err)
	t.Cleanup(func() { c.Close() })
	return c
}

// goServer is dialServer, and the handshake.
func goServer(t *testing.T, dir string) *nbdclient.Client {
	t.Helper()
	c := dialServer(t, dir)
	must(t, c.Go(""))
	return c
}

// signaled sends a signal to a server, and returns when it has stopped to
// accept connections.
func signaled(t *testing.T, server *exec.Cmd, dir string, sig os.Signal) {
	t.Helper()
	must(t, server.Process.Signal(sig))
	within(t, "the server stops accepting", func() bool {
		conn, err := net.Dial("unix", filepath.Join(dir, "cow.img.sock"))
		if err == nil {
			conn.Close()
		}
		return err != nil
	})
}

// served reports whether `info` tells that a server has the store.
func served(t *testing.T, dir string) bool {
	t.Helper()
	return strings.Contains(mustRun(t, dir, "info", "cow.img"), "served by")
}

// expectContent reads data at off.
func expectContent(t *testing.T, c *nbdclient.Client, off int64, want []byte) {
	t.Helper()
	got := make([]byte, len(want))
	_, err := c.ReadAt(got, off)
	must(t, err)
	if !bytes.Equal(got, want) {
		t.Errorf("the device at %d does not read as what was acknowledged there", off)
	}
}

// TestSecondSignal: a client that does not take its reply holds up the end that
// a signal asks for. A second one ends the server at once, and the next one
// shows every write that was acknowledged, flushed or not.
func TestSecondSignal(t *testing.T) {
	for _, second := range []os.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP} {
		t.Run(second.String(), func(t *testing.T) { testSecondSignal(t, second) })
	}
}

func testSecondSignal(t *testing.T, second os.Signal) {
	dir := t.TempDir()
	must(t, os.WriteFile(filepath.Join(dir, "base.img"), bytes.Repeat([]byte("base"), deviceSize/4), 0o600))
	server := startServer(t, dir)
	said := server.Stderr.(*messages)

	flushed, unflushed := bytes.Repeat([]byte{1}, 200_000), bytes.Repeat([]byte{2}, 300_000)
	writer := goServer(t, dir)
	_, err := writer.WriteAt(flushed, 4096)
	must(t, err)
	must(t, writer.Flush())
	_, err = writer.WriteAt(unflushed, 1<<20)
	must(t, err)

	greedy := goServer(t, dir)
	_, err = greedy.Request(nbdclient.Request{Type: nbd.CmdRead, Length: deviceSize})
	must(t, err)
	_, err = greedy.Recv(1) // the reply has begun
	must(t, err)

	signaled(t, server, dir, syscall.SIGTERM)
	if !served(t, dir) {
		t.Fatal("the server ended before its client had its reply")
	}
	time.Sleep(2 * twinSignal) // it is no twin of the first
	must(t, server.Process.Signal(second))
	server.Wait()
	if got := server.ProcessState.ExitCode(); got != exitFailure {
		t.Errorf("%v, expected the exit status %d", server.ProcessState, exitFailure)
	}
	if want := "cowdev: ended at once by a second signal"; strings.Count(said.String(), want) != 1 {
		t.Errorf("the server did not say %q:\n%s", want, said)
	}

	if info := mustRun(t, dir, "info", "cow.img"); !strings.Contains(info, "active, not closed in order") {
		t.Errorf("info does not tell how the store was left:\n%s", info)
	}
	server = startServer(t, dir)
	c := goServer(t, dir)
	expectContent(t, c, 4096, flushed)
	expectContent(t, c, 1<<20, unflushed)
	must(t, c.Disconnect())
	must(t, server.Process.Signal(syscall.SIGTERM))
	must(t, server.Wait())
	mustRun(t, dir, "check", "cow.img", "base.img")
}

// TestSignalWaitsForReplies: a client that does take its reply gets all of it
// after the signal, and the store is closed in order.
func TestSignalWaitsForReplies(t *testing.T) {
	for _, sig := range []os.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP} {
		t.Run(sig.String(), func(t *testing.T) { testSignalWaitsForReplies(t, sig) })
	}
}

func testSignalWaitsForReplies(t *testing.T, sig os.Signal) {
	dir := t.TempDir()
	base := bytes.Repeat([]byte("base"), deviceSize/4)
	must(t, os.WriteFile(filepath.Join(dir, "base.img"), base, 0o600))
	server := startServer(t, dir)
	c := goServer(t, dir)
	_, err := c.WriteAt([]byte("cows"), 0)
	must(t, err)
	_, err = c.Request(nbdclient.Request{Type: nbd.CmdRead, Length: deviceSize})
	must(t, err)
	head, err := c.Recv(nbd.SimpleReplySize)
	must(t, err)
	if code := head[4:8]; !bytes.Equal(code, make([]byte, 4)) {
		t.Fatalf("the read was answered with the error %x", code)
	}
	signaled(t, server, dir, sig)
	got, err := c.Recv(deviceSize)
	must(t, err)
	if !bytes.Equal(got, append([]byte("cows"), base[4:]...)) {
		t.Error("the reply that a signal came into holds other bytes")
	}
	if _, err := c.Recv(1); err != io.EOF {
		t.Errorf("after the last reply: %v, expected the end", err)
	}
	must(t, server.Wait())
	if info := mustRun(t, dir, "info", "cow.img"); strings.Contains(info, "not closed in order") {
		t.Errorf("the store was not closed in order:\n%s", info)
	}
	mustRun(t, dir, "check", "cow.img", "base.img")
}

// certificates replaces those of a server in dir by new ones, one file in the
// place of another, and returns the authority that signed them.
func certificates(t *testing.T, dir string) *nbdclient.Authority {
	t.Helper()
	a, err := nbdclient.NewAuthority()
	must(t, err)
	fresh := t.TempDir()
	must(t, a.WriteServer(fresh, "localhost"))
	for _, name := range []string{"ca-cert.pem", "server-cert.pem", "server-key.pem"} {
		must(t, os.Rename(filepath.Join(fresh, name), filepath.Join(dir, name)))
	}
	return a
}

// startTLS connects to the server of cow.img in dir as a client of a.
func startTLS(t *testing.T, dir string, a *nbdclient.Authority) (*nbdclient.Client, error) {
	t.Helper()
	conf, err := a.Client("localhost", time.Now().Add(time.Hour))
	must(t, err)
	c := dialServer(t, dir)
	if err := c.StartTLS(conf); err != nil {
		return nil, err
	}
	return c, c.Go("")
}

// TestSignalReloadsCertificates: after SIGHUP new connections are shown new
// certificates; with broken ones a message says why those from before stay in
// use. Open connections notice nothing.
func TestSignalReloadsCertificates(t *testing.T) {
	t.Run("plain", func(t *testing.T) { testReload(t) })
	t.Run("sandbox", func(t *testing.T) { testReload(t, "--sandbox") })
}

func testReload(t *testing.T, flags ...string) {
	dir := t.TempDir()
	pki := filepath.Join(dir, "pki")
	must(t, os.Mkdir(pki, 0o700))
	must(t, os.WriteFile(filepath.Join(dir, "base.img"), bytes.Repeat([]byte("base"), 1<<18), 0o600))
	old := certificates(t, pki)
	server := startServer(t, dir, append(flags, "--tls-dir", "pki")...)
	said := server.Stderr.(*messages)
	open, err := startTLS(t, dir, old)
	must(t, err)

	fresh := certificates(t, pki)
	must(t, server.Process.Signal(syscall.SIGHUP))
	within(t, "the new certificates are used", func() bool {
		if strings.Contains(said.String(), "stay in use") {
			t.Fatalf("good certificates are refused:\n%s", said)
		}
		_, err := startTLS(t, dir, fresh)
		return err == nil
	})
	if _, err := startTLS(t, dir, old); err == nil {
		t.Error("a client of the old authority is let in")
	}
	expectContent(t, open, 0, []byte("base"))

	for _, broken := range []string{"server-key.pem", "ca-cert.pem"} {
		kept, err := os.ReadFile(filepath.Join(pki, broken))
		must(t, err)
		must(t, os.WriteFile(filepath.Join(pki, broken), []byte("garbage"), 0o600))
		must(t, server.Process.Signal(syscall.SIGHUP))
		refused := regexp.MustCompile(".*/" + broken + ".*; the certificates from before stay in use\n")
		within(t, "word of a broken "+broken, func() bool { return refused.MatchString(said.String()) })
		c, err := startTLS(t, dir, fresh)
		must(t, err)
		expectContent(t, c, 0, []byte("base"))
		must(t, os.WriteFile(filepath.Join(pki, broken), kept, 0o600))
	}
	expectContent(t, open, 0, []byte("base"))
	must(t, server.Process.Signal(syscall.SIGTERM))
	must(t, server.Wait())
}
