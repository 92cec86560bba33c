package main

// The real program killed in the middle of a merge, again and again: the pair
// shows the right bytes each time, and the last merge finishes what the first
// began.

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

	"github.com/cowdev/cowdev/internal/nbdclient"
)

// program returns a command of the program that is this test's binary.
func program(t *testing.T, dir string, args ...string) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	cmd := exec.CommandContext(ctx, self)
	cmd.Args = append([]string{"cowdev"}, args...)
	cmd.Dir = dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	return cmd
}

// mustRun runs the program and returns what it printed.
func mustRun(t *testing.T, dir string, args ...string) string {
	t.Helper()
	out, err := program(t, dir, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("cowdev %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// startServer serves base.img with cow.img in dir, and returns its process
// once it is ready; its Stderr is a *messages.
func startServer(t *testing.T, dir string, flags ...string) *exec.Cmd {
	t.Helper()
	cmd := program(t, dir, append([]string{"serve", "base.img", "cow.img"}, flags...)...)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	said := &messages{}
	cmd.Stderr = said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil || !strings.HasPrefix(line, "ready: ") {
		cmd.Process.Kill()
		cmd.Wait()
		t.Fatalf("the server is not ready: %q, %v\n%s", line, err, said)
	}
	return cmd
}

func digestOf(t *testing.T, path string) string {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%x", h.Sum(nil))
}

// fillOverlay makes base.img and cow.img in dir, with n scattered changes.
func fillOverlay(t *testing.T, dir string, rng *rand.Rand, size, n int) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, "base.img"), bytes.Repeat([]byte("base"), size/4), 0o600); err != nil {
		t.Fatal(err)
	}
	server := startServer(t, dir)
	c, err := nbdclient.Dial("unix", filepath.Join(dir, "cow.img.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.Go(""); err != nil {
		t.Fatal(err)
	}
	for i := range n {
		off, length := rng.IntN(size-70_000), 1+rng.IntN(70_000)
		if i%8 == 0 {
			err = c.Trim(int64(off), int64(length), 0)
		} else {
			_, err = c.WriteAt(bytes.Repeat([]byte{byte(i)}, length), int64(off))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := c.Disconnect(); err != nil {
		t.Fatal(err)
	}
	server.Process.Signal(os.Interrupt)
	if err := server.Wait(); err != nil {
		t.Fatalf("the server: %v", err)
	}
}

func TestMergeKilled(t *testing.T) {
	rounds := 5
	if os.Getenv("COWDEV_LONG") != "" {
		rounds = 200
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	dir := t.TempDir()
	fillOverlay(t, dir, rng, 24<<20, 600)
	mustRun(t, dir, "merge", "base.img", "cow.img", "--output", "want.img")
	want := digestOf(t, filepath.Join(dir, "want.img"))

	killed := 0
	for round := range rounds {
		cmd := program(t, dir, "merge", "base.img", "cow.img")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Duration(rng.Int64N(int64(60 * time.Millisecond))))
		cmd.Process.Kill()
		if cmd.Wait() == nil {
			break // it was faster
		}
		killed++
		now := filepath.Join(dir, "now.img")
		mustRun(t, dir, "merge", "base.img", "cow.img", "--output", "now.img")
		if got := digestOf(t, now); got != want {
			t.Fatalf("round %d: the pair shows other bytes than before", round)
		}
		os.Remove(now)
		// Slots that nobody has may be left: that costs space, no data.
		report, err := program(t, dir, "check", "cow.img", "base.img").CombinedOutput()
		if err != nil && !strings.Contains(string(report), "slots that no chunk has") || strings.Contains(string(report), "damage") {
			t.Fatalf("round %d: check: %v\n%s", round, err, report)
		}
	}
	t.Logf("killed %d times", killed)
	mustRun(t, dir, "merge", "base.img", "cow.img", "--delete")
	if got := digestOf(t, filepath.Join(dir, "base.img")); got != want {
		t.Error("the merged base differs")
	}
}
