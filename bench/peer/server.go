package peer

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/cowdev/cowdev/internal/nbdclient"
)

// patience is how long a server may take to start or to end.
const patience = 60 * time.Second

// A Server is a running server.
type Server struct {
	Kind  *Kind
	Files Files
	Ready time.Duration // from its start to the first reply to a client

	pid    int
	cmd    *exec.Cmd
	exited chan struct{}
	output bytes.Buffer
}

// NewFiles makes the directory of a server in dir, and its overlay.
func (k *Kind) NewFiles(dir, base string) (Files, error) {
	own, err := os.MkdirTemp(dir, k.Name+"-")
	if err != nil {
		return Files{}, err
	}
	f := Files{Dir: own, Base: base, Overlay: filepath.Join(own, "overlay"), Socket: filepath.Join(own, "s")}
	if k.configure != nil {
		if err := k.configure(f); err != nil {
			return f, err
		}
	}
	if k.Create != nil {
		err = Run(k.Create(f)...)
	}
	return f, err
}

// Run runs a command to its end.
func Run(args ...string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, bytes.TrimSpace(out))
	}
	return nil
}

// Start starts a server on files that NewFiles made, and waits until it
// greets clients.
func (k *Kind) Start(f Files) (*Server, error) {
	s := &Server{Kind: k, Files: f, exited: make(chan struct{})}
	args := k.Serve(f)
	s.cmd = exec.Command(args[0], args[1:]...)
	s.cmd.Stdout, s.cmd.Stderr = &s.output, &s.output
	s.cmd.Env = append(os.Environ(), "TMPDIR="+f.Dir)
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	began := time.Now()
	if err := s.cmd.Start(); err != nil {
		return nil, err
	}
	s.pid = s.cmd.Process.Pid
	go func() {
		s.cmd.Wait()
		close(s.exited)
	}()
	if err := s.awaitReady(began); err != nil {
		s.Stop()
		return nil, fmt.Errorf("%s: %w: %s", k.Name, err, bytes.TrimSpace(s.output.Bytes()))
	}
	return s, nil
}

func (s *Server) awaitReady(began time.Time) error {
	for pause := time.Millisecond / 2; ; time.Sleep(pause) {
		err := s.greeted()
		if err == nil {
			s.Ready = time.Since(began)
			return s.findDaemon()
		}
		if !s.Kind.daemon && s.ended() {
			return fmt.Errorf("it ended at once")
		}
		if time.Since(began) > patience {
			return fmt.Errorf("not ready after %v: %w", patience, err)
		}
	}
}

// greeted connects to the server and goes through the handshake and a read.
func (s *Server) greeted() error {
	c, err := nbdclient.Dial("unix", s.Files.Socket)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.ExportName(s.Kind.Export()); err != nil {
		return err
	}
	if _, err := c.ReadAt(make([]byte, 512), 0); err != nil {
		return err
	}
	return c.Disconnect()
}

func (s *Server) findDaemon() error {
	if !s.Kind.daemon {
		return nil
	}
	b, err := os.ReadFile(pidFile(s.Files))
	if err != nil {
		return err
	}
	s.pid, err = strconv.Atoi(strings.TrimSpace(string(b)))
	return err
}

func (s *Server) ended() bool {
	select {
	case <-s.exited:
		return true
	default:
		return false
	}
}

// Stop ends the server in order, or after a while otherwise. Its files stay.
func (s *Server) Stop() error {
	if s.Kind.daemon {
		if s.pid != s.cmd.Process.Pid {
			syscall.Kill(s.pid, syscall.SIGTERM)
		}
		return nil
	}
	s.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-s.exited:
		return nil
	case <-time.After(patience):
		syscall.Kill(-s.cmd.Process.Pid, syscall.SIGKILL)
		<-s.exited
		return fmt.Errorf("%s: did not end in %v", s.Kind.Name, patience)
	}
}

// CPU returns how long the server's threads have run.
func (s *Server) CPU() time.Duration {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", s.pid))
	if err != nil {
		return 0
	}
	_, rest, _ := strings.Cut(string(b), ") ")
	f := strings.Fields(rest)
	if len(f) < 13 {
		return 0
	}
	user, _ := strconv.Atoi(f[11])
	system, _ := strconv.Atoi(f[12])
	const tick = time.Second / 100
	return time.Duration(user+system) * tick
}

// Memory returns the bytes of anonymous memory that the server holds.
func (s *Server) Memory() int64 { return s.status("RssAnon:") << 10 }

// status returns a number of /proc/PID/status.
func (s *Server) status(key string) int64 {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.pid))
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, key); ok {
			n, _ := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
			return n
		}
	}
	return 0
}

// Remove deletes the server's files.
func (f Files) Remove() error { return os.RemoveAll(f.Dir) }
