package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/cowdev/cowdev/attach"
	"github.com/cowdev/cowdev/internal/keeper"
	"github.com/cowdev/cowdev/nbdserver"
)

// Descriptors of a server that a supervisor has started.
const (
	tellFD      = 3 // for what it serves, told
	firstConnFD = 4 // its connections
)

// told is what a server says when it is ready.
type told struct {
	PID   int    `json:"pid"`
	UUID  string `json:"uuid"` // the store's
	Size  int64  `json:"size"`
	Flags uint16 `json:"flags"` // transmission flags
	File  string `json:"file"`  // the store's, disk.OS.Identity
}

func tell(v *view, export *nbdserver.Export) told {
	file, _ := v.file.Identity()
	return told{PID: os.Getpid(), UUID: v.store.Header().UUID.String(), Size: v.device.Size(), Flags: export.TransmissionFlags(), File: file}
}

// sameStore reports whether t and u tell of one store, as far as they know its
// file: a copy of it, of whatever age, has its UUID.
func (t told) sameStore(u told) bool {
	return t.UUID == u.UUID && t.Size == u.Size && (t.File == u.File || t.File == "" || u.File == "")
}

// attachServerCommand is the server behind a supervisor. It serves the
// connections that it was started with, and ends with them.
func attachServerCommand() *cli.Command {
	return &cli.Command{
		Name:      "attach-server",
		Hidden:    true,
		Usage:     "Serve connections that cowdev attach holds",
		ArgsUsage: "BASE COW",
		Flags:     append(append([]cli.Flag{&cli.IntFlag{Name: "connections", Value: 1}}, storeFlags()...), baseFlags()...),
		Action: func(c *cli.Context) error {
			var sc serveConfig
			if err := sc.files(c); err != nil {
				return err
			}
			if err := sc.device(c); err != nil {
				return err
			}
			return attachServer(c, &sc)
		},
	}
}

func attachServer(c *cli.Context, sc *serveConfig) (err error) {
	attach.Shield(false)
	signal.Ignore(syscall.SIGPIPE) // where the supervisor is gone, the store is still closed in order
	conns, err := inheritedConns(c.Int("connections"))
	if err != nil {
		return err
	}
	view, err := openView(c.Context, c, sc.base, sc.cow, sc.view)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, view.Close()) }()
	server, export, err := sc.transmitter(c, view)
	if err != nil {
		return err
	}
	out := os.NewFile(tellFD, "supervisor")
	if err := json.NewEncoder(out).Encode(tell(view, export)); err != nil {
		return fmt.Errorf("tell the supervisor: %w", err)
	}
	out.Close()
	var all sync.WaitGroup
	for _, conn := range conns {
		all.Go(func() { server.ServeTransmission(conn, export) }) // it logs
	}
	all.Wait()
	return nil
}

// inheritedConns returns the n connections that this process was started with.
func inheritedConns(n int) ([]net.Conn, error) {
	var conns []net.Conn
	for i := range n {
		f := os.NewFile(uintptr(firstConnFD+i), "connection")
		conn, err := net.FileConn(f)
		if err != nil {
			return nil, usagef("attach-server: is started by cowdev attach: descriptor %d: %w", firstConnFD+i, err)
		}
		f.Close()
		conns = append(conns, conn)
	}
	return conns, nil
}

// transmitter returns a server, and the export that ServeTransmission is given.
func (sc *serveConfig) transmitter(c *cli.Context, v *view) (*nbdserver.Server, *nbdserver.Export, error) {
	export := nbdserver.Export{Description: description(sc.base), Device: v.device}
	server, err := nbdserver.New(nbdserver.Config{
		Exports:  []nbdserver.Export{export},
		ErrorLog: func(format string, args ...any) { warn(c, format, args...) },
	})
	return server, &export, err
}

// A launcher starts servers for a keeper.
type launcher struct {
	exe   string // as it is called: an upgrade puts another program there
	words []string
	again []string // words of every server but the first
	conns int
	logs  io.Writer

	mu     sync.Mutex
	device string
	first  told // by the first server
	last   *exec.Cmd
}

func newLauncher(c *cli.Context, ac *attachConfig) *launcher {
	exe, err := os.Executable()
	if err != nil {
		exe = "/proc/self/exe"
	}
	words := func(flags []string) []string {
		w := append([]string{"attach-server", fmt.Sprintf("--connections=%d", ac.nbd.Connections)}, flags...)
		return append(w, "--", absolute(ac.serve.base), absolute(ac.serve.cow))
	}
	// A wrapper, so that the server is given a pipe and not this process's own
	// descriptor: that may be one which somebody waits to see closed.
	logs := struct{ io.Writer }{c.App.ErrWriter}
	return &launcher{
		exe: exe, conns: ac.nbd.Connections, logs: logs,
		words: words(ac.flags), again: words(laterFlags(ac.flags)),
	}
}

// setDevice says whose state tells of the servers.
func (l *launcher) setDevice(device string) {
	l.mu.Lock()
	l.device = device
	l.mu.Unlock()
}

// begin starts the first server.
func (l *launcher) begin(ctx context.Context) (*keeper.Server, told, error) {
	server, t, err := l.start(ctx, l.exe, l.words)
	l.first = t
	return server, t, err
}

// closed says why the last server did not close its store in order, if so.
func (l *launcher) closed() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.last == nil || l.last.ProcessState.Success() {
		return nil
	}
	return fmt.Errorf("%w: its server ended with %v", errNotClosed, l.last.ProcessState)
}

// succeed starts a server that takes over from another. It must have the store
// that the first one had: a filesystem that is mounted on the device would be
// destroyed by the bytes of another, or by none.
func (l *launcher) succeed(ctx context.Context, exe string) (*keeper.Server, told, error) {
	server, t, err := l.start(ctx, exe, l.again)
	if err != nil {
		return nil, t, err
	}
	if t.sameStore(l.first) {
		return server, t, nil
	}
	server.Kill()
	<-server.Exited
	return nil, t, fmt.Errorf("%s: another store than the one that is served", l.again[len(l.again)-1])
}

// launch is begin for servers after the first. Where the program of today does
// not come up, the one that this process was started from is tried.
func (l *launcher) launch(ctx context.Context) (*keeper.Server, error) {
	half, cancel := ctx, func() {}
	if end, ok := ctx.Deadline(); ok { // one that hangs leaves time for the other
		half, cancel = context.WithTimeout(ctx, time.Until(end)/2)
	}
	server, t, err := l.succeed(half, l.exe)
	cancel()
	if err != nil {
		var again error
		if server, t, again = l.succeed(ctx, selfExe); again != nil {
			return nil, err
		}
	}
	l.mu.Lock()
	device := l.device
	l.mu.Unlock()
	err = attach.DefaultStates.Update(device, func(s *attach.State) { s.ServerPID = t.PID })
	if err != nil {
		fmt.Fprintf(l.logs, "cowdev: %s: note the new server: %v\n", device, err)
	}
	return server, nil
}

// selfExe is the program that this process runs, also when its file is gone.
const selfExe = "/proc/self/exe"

// start starts a server, the program exe with words, and waits until it is
// ready.
func (l *launcher) start(ctx context.Context, exe string, words []string) (*keeper.Server, told, error) {
	var t told
	ours, theirs, err := attach.SocketPairs(l.conns)
	if err != nil {
		return nil, t, err
	}
	out, in, err := os.Pipe()
	if err != nil {
		return nil, t, err
	}
	defer out.Close()
	cmd := exec.Command(exe, words...)
	cmd.Args[0] = "cowdev"
	cmd.Stderr = l.logs
	cmd.ExtraFiles = append([]*os.File{in}, theirs...)
	// A group of its own: what a terminal sends is for the supervisor.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	err = cmd.Start()
	in.Close()
	for _, f := range theirs {
		f.Close()
	}
	end := sync.OnceFunc(func() {
		for _, conn := range ours {
			conn.Close()
		}
	})
	if err != nil {
		end()
		return nil, t, err
	}
	exited := make(chan struct{})
	go func() { defer close(exited); cmd.Wait() }()
	kill := func() { end(); cmd.Process.Kill() }
	defer context.AfterFunc(ctx, kill)()
	if err := json.NewDecoder(out).Decode(&t); err != nil {
		end()
		<-exited
		return nil, t, quietError(max(cmd.ProcessState.ExitCode(), exitFailure)) // it has said why
	}
	l.mu.Lock()
	l.last = cmd
	l.mu.Unlock()
	return &keeper.Server{Conns: ours, Exited: exited, Stop: end, Kill: kill}, t, nil
}
