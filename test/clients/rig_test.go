package clients

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// patience is how long any one program may take.
const patience = 2 * time.Minute

// binary is cowdev, built once for all tests.
var binary string

func TestMain(m *testing.M) { os.Exit(runTests(m)) }

func runTests(m *testing.M) int {
	dir, err := os.MkdirTemp("", "clients")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	binary = filepath.Join(dir, "cowdev")
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	build := exec.CommandContext(ctx, "go", "build", "-o", binary, "github.com/cowdev/cowdev/cmd/cowdev")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build cowdev: %v\n%s", err, out)
		return 1
	}
	return m.Run()
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// command is a program that is killed, with all that it started, when the test
// ends or patience does.
func command(t *testing.T, name string, args ...string) *exec.Cmd {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		t.Fatalf("%s is not installed; make packages installs it", name)
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// run runs a program that must succeed and returns its output.
func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := command(t, name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// fails runs a program that must not succeed, by itself, and returns its output.
func fails(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := command(t, name, args...).CombinedOutput()
	if exit, ok := err.(*exec.ExitError); !ok || exit.ExitCode() <= 0 {
		t.Fatalf("%s %s: %v, expected it to fail by itself\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// baseSize is the size of the base image: odd, so that its end is partial in
// every unit.
const baseSize = 16<<20 + 1536

// A served is a running cowdev serve over a new overlay.
type served struct {
	base, cow string
	uri       string // of its last listener
	cmd       *exec.Cmd
}

// serve starts cowdev serve with more flags and waits until it is ready.
func serve(t *testing.T, flags ...string) *served {
	t.Helper()
	base := filepath.Join(shortDir(t), "base.img")
	writeBase(t, base)
	return serveBase(t, base, flags...)
}

// shortDir returns a directory whose name leaves room for that of a socket.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "c")
	check(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// serveBase is serve of a base that is there.
func serveBase(t *testing.T, base string, flags ...string) *served {
	t.Helper()
	s := &served{base: base, cow: filepath.Join(shortDir(t), "cow.img")}
	s.cmd = command(t, binary, append([]string{"serve", s.base, s.cow, "--handshake-timeout", patience.String()}, flags...)...)
	var stderr bytes.Buffer
	s.cmd.Stderr = &stderr
	out, err := s.cmd.StdoutPipe()
	check(t, err)
	check(t, s.cmd.Start())
	t.Cleanup(func() {
		s.cmd.Process.Signal(syscall.SIGTERM)
		io.Copy(io.Discard, out)
		if err := s.cmd.Wait(); err != nil {
			t.Errorf("cowdev serve: %v\n%s", err, &stderr)
		}
	})
	for lines := bufio.NewScanner(out); lines.Scan(); { // the process ends with patience
		if uri, ok := strings.CutPrefix(lines.Text(), "ready: "); ok {
			s.uri = uri
			return s
		}
	}
	t.Fatalf("cowdev serve did not get ready:\n%s", &stderr)
	return nil
}

// writeBase writes an image of which the last quarter is a hole.
func writeBase(t *testing.T, path string) {
	rnd := rand.NewChaCha8([32]byte{1})
	data := make([]byte, baseSize/4*3)
	rnd.Read(data)
	check(t, os.WriteFile(path, data, 0o600))
	check(t, os.Truncate(path, baseSize))
}

func digest(t *testing.T, path string) [32]byte {
	t.Helper()
	data, err := os.ReadFile(path)
	check(t, err)
	return sha256.Sum256(data)
}

// transports are the flags that make a server listen, but for TLS.
var transports = map[string][]string{
	"unix": nil,
	"tcp":  {"--listen", "127.0.0.1:0"},
}

// overTransports runs a test over each.
func overTransports(t *testing.T, test func(t *testing.T, s *served)) {
	for name, flags := range transports {
		t.Run(name, func(t *testing.T) { test(t, serve(t, flags...)) })
	}
}
