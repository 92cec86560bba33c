package main

// The program as users run it: each file of testdata/script is a story, with
// the real binary. What the scripts add to the usual commands:
//
//	image FILE SIZE [SEED]        make an image; random data in a part of it
//	poke FILE OFF HEX             overwrite bytes
//	refuse STATUS cowdev ARGS...  it must fail with STATUS and one line on
//	                              stderr, and change no file
//	status STATUS PROG ARGS...    it must exit with STATUS
//	ready SOCKET                  wait until a server listens there
//	nbd SOCKET COMMAND...         talk to a server: see nbdCommands
//	same FILE FILE                both hold the same bytes

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/cowdev/cowdev/internal/nbdclient"
)

// patience bounds every wait of a script.
const patience = 60 * time.Second

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"cowdev": main})
}

func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:      "testdata/script",
		Deadline: time.Now().Add(6 * patience),
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"image": scriptImage, "poke": scriptPoke, "refuse": scriptRefuse, "status": scriptStatus,
			"ready": scriptReady, "nbd": scriptNBD, "same": scriptSame,
			"loop": scriptLoop, "mount": scriptMount, "taken": scriptTaken, "certs": scriptCerts,
		},
		Condition: func(cond string) (bool, error) {
			if cond != "root" {
				return false, fmt.Errorf("unknown condition %q", cond)
			}
			return os.Geteuid() == 0, nil
		},
		Setup: func(env *testscript.Env) error {
			env.Values["t"] = env.T()
			return nil
		},
	})
}

// usage fails a script that calls a command wrongly.
func scriptUsage(ts *testscript.TestScript, ok bool, line string) {
	if !ok {
		ts.Fatalf("usage: %s", line)
	}
}

func scriptSize(ts *testscript.TestScript, s string) int64 {
	n, err := parseSize(s)
	ts.Check(err)
	return n
}

func scriptImage(ts *testscript.TestScript, neg bool, args []string) {
	scriptUsage(ts, !neg && len(args) >= 2 && len(args) <= 3, "image FILE SIZE [SEED]")
	seed := byte(1)
	if len(args) == 3 {
		seed = args[2][0]
	}
	total := scriptSize(ts, args[1])
	f, err := os.Create(ts.MkAbs(args[0]))
	ts.Check(err)
	defer f.Close()
	ts.Check(f.Truncate(total))
	// Data at the beginning, in the middle and at the end; holes between.
	rng := rand.NewChaCha8([32]byte{seed})
	for _, at := range []int64{0, total / 2, max(0, total-256<<10)} {
		p := make([]byte, min(256<<10, total-at))
		rng.Read(p)
		_, err := f.WriteAt(p, at)
		ts.Check(err)
	}
}

func scriptPoke(ts *testscript.TestScript, neg bool, args []string) {
	scriptUsage(ts, !neg && len(args) == 3, "poke FILE OFF HEX")
	f, err := os.OpenFile(ts.MkAbs(args[0]), os.O_WRONLY, 0)
	ts.Check(err)
	defer f.Close()
	p, err := hex.DecodeString(args[2])
	ts.Check(err)
	_, err = f.WriteAt(p, scriptSize(ts, args[1]))
	ts.Check(err)
}

func scriptSame(ts *testscript.TestScript, neg bool, args []string) {
	scriptUsage(ts, len(args) == 2, "same FILE FILE")
	a, b := ts.ReadFile(args[0]), ts.ReadFile(args[1])
	if (a == b) == neg {
		ts.Fatalf("%s and %s: same bytes is %v", args[0], args[1], a == b)
	}
}

// runStatus runs a program in the script's directory and returns what it said.
func runStatus(ts *testscript.TestScript, args []string) (status int, stdout, stderr string) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	if path, err := exec.LookPath(args[0]); err == nil {
		cmd.Path = path
	} else {
		for _, dir := range filepath.SplitList(ts.Getenv("PATH")) {
			if p := filepath.Join(dir, args[0]); fileExists(p) {
				cmd.Path, cmd.Err = p, nil
			}
		}
	}
	cmd.Dir = ts.MkAbs(".")
	cmd.Env = append(os.Environ(), "PATH="+ts.Getenv("PATH"))
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = time.Second
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) || ctx.Err() != nil {
		ts.Fatalf("%s: %v (%v)\n%s", strings.Join(args, " "), err, ctx.Err(), &errs)
	}
	io.WriteString(ts.Stdout(), out.String())
	io.WriteString(ts.Stderr(), errs.String())
	return cmd.ProcessState.ExitCode(), out.String(), errs.String()
}

func fileExists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

func scriptStatus(ts *testscript.TestScript, neg bool, args []string) {
	scriptUsage(ts, !neg && len(args) >= 2, "status STATUS PROGRAM ARGS...")
	runWithStatus(ts, args)
}

// runWithStatus runs args, of which the first is the status it must exit with.
func runWithStatus(ts *testscript.TestScript, args []string) (stdout, stderr string) {
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	got, stdout, stderr := runStatus(ts, args[1:])
	if got != want {
		ts.Fatalf("%s: status %d, expected %d\n%s", strings.Join(args[1:], " "), got, want, stderr)
	}
	return stdout, stderr
}

func scriptRefuse(ts *testscript.TestScript, neg bool, args []string) {
	scriptUsage(ts, !neg && len(args) >= 2, "refuse STATUS PROGRAM ARGS...")
	before := fingerprint(ts)
	stdout, stderr := runWithStatus(ts, args)
	if strings.Count(stderr, "\n") != 1 || !strings.HasPrefix(stderr, "cowdev: ") {
		ts.Fatalf("stderr is not one line of cowdev's:\n%s", stderr)
	}
	if stdout != "" {
		ts.Fatalf("stdout is not empty:\n%s", stdout)
	}
	if after := fingerprint(ts); after != before {
		ts.Fatalf("files changed: before\n%s\nafter\n%s", before, after)
	}
}

// fingerprint tells names, times and contents of all files of the script.
func fingerprint(ts *testscript.TestScript) string {
	var b strings.Builder
	root := ts.Getenv("WORK")
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.Type().IsDir() {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		fmt.Fprintf(&b, "%s %v %d %v", path, info.Mode(), info.Size(), info.ModTime())
		if info.Mode().IsRegular() && info.Mode().Perm() != 0 {
			f, err := os.Open(path)
			if err != nil {
				return err
			}
			defer f.Close()
			h := sha256.New()
			if _, err := io.Copy(h, io.LimitReader(f, 64<<20)); err != nil {
				return err
			}
			fmt.Fprintf(&b, " %x", h.Sum(nil)[:8])
		}
		fmt.Fprintln(&b)
		return nil
	})
	ts.Check(err)
	return b.String()
}

func scriptReady(ts *testscript.TestScript, neg bool, args []string) {
	scriptUsage(ts, !neg && len(args) == 1, "ready SOCKET")
	path := ts.MkAbs(args[0])
	for end := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		conn, err := net.Dial("unix", path)
		if err == nil {
			conn.Close()
			return
		}
		if time.Now().After(end) {
			ts.Fatalf("no server at %s after %v: %v", path, patience, err)
		}
	}
}

// nbdCommands are what "nbd SOCKET COMMAND ARGS..." can do.
var nbdCommands = map[string]struct {
	args string
	do   func(*nbdclient.Client, []int64) error
}{
	"size": {"BYTES", func(c *nbdclient.Client, a []int64) error {
		if c.Size != a[0] {
			return fmt.Errorf("size %d, expected %d", c.Size, a[0])
		}
		return nil
	}},
	"write": {"OFF LEN BYTE", func(c *nbdclient.Client, a []int64) error {
		_, err := c.WriteAt(bytes.Repeat([]byte{byte(a[2])}, int(a[1])), a[0])
		return err
	}},
	"read": {"OFF LEN BYTE", func(c *nbdclient.Client, a []int64) error {
		p := make([]byte, a[1])
		if _, err := c.ReadAt(p, a[0]); err != nil {
			return err
		}
		if i := bytes.IndexFunc(p, func(r rune) bool { return byte(r) != byte(a[2]) }); i >= 0 && a[2] < 128 {
			return fmt.Errorf("byte %d is %d, expected %d", a[0]+int64(i), p[i], a[2])
		}
		return nil
	}},
	"trim":  {"OFF LEN", func(c *nbdclient.Client, a []int64) error { return c.Trim(a[0], a[1], 0) }},
	"flush": {"", func(c *nbdclient.Client, a []int64) error { return c.Flush() }},
}

func scriptNBD(ts *testscript.TestScript, neg bool, args []string) {
	scriptUsage(ts, len(args) >= 2, "nbd SOCKET COMMAND ARGS...")
	cmd, ok := nbdCommands[args[1]]
	scriptUsage(ts, ok && len(args)-2 == len(strings.Fields(cmd.args)), "nbd SOCKET "+args[1]+" "+cmd.args)
	var values []int64
	for _, s := range args[2:] {
		values = append(values, scriptSize(ts, s))
	}
	network := "unix"
	if strings.Contains(args[0], ":") {
		network = "tcp"
	} else {
		args[0] = ts.MkAbs(args[0])
	}
	c, err := nbdclient.Dial(network, args[0])
	ts.Check(err)
	defer c.Close()
	ts.Check(c.Go(""))
	err = cmd.do(c, values)
	if neg {
		if err == nil {
			ts.Fatalf("%v succeeded", args)
		}
		fmt.Fprintln(ts.Stderr(), err)
		return
	}
	ts.Check(err)
	ts.Check(c.Disconnect())
}
