package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"github.com/cowdev/cowdev/attach"
	"github.com/cowdev/cowdev/attach/nbdnl"
)

// Times of an attached device, where the user says none.
const (
	directTimeout     = 10 * time.Second
	supervisedTimeout = 30 * time.Second
	defaultDead       = 60 * time.Second
	parkMargin        = 30 * time.Second // of a request's time over that of a parked write
	foreverPark       = 24 * time.Hour
	usableLimit       = 60 * time.Second // for a device of the kernel to come up, or to go
)

func attachCommand() *cli.Command {
	return &cli.Command{
		Name:      "attach",
		Usage:     "Make a block device of BASE with its changes in COW",
		ArgsUsage: "BASE COW [DEVICE]",
		Description: "The device is a free /dev/nbdN, or DEVICE; without the kernel's nbd driver it is a loop\n" +
			"device over FUSE. A small parent holds an nbd device's connections and starts the server\n" +
			"again when it dies: filesystems on it stay mounted, and lose nothing. SIGUSR2 to the parent\n" +
			"replaces the server by the program of today. SIGTERM ends the device, or leaves it waiting\n" +
			"for --resume where it is in use.",
		Flags: append(append(deviceFlags(), storeFlags()...), baseFlags()...),
		Action: func(c *cli.Context) error {
			ac, err := attachConfigOf(c)
			if err != nil {
				return err
			}
			if c.Bool("detach") {
				device, err := startDetached(c, attachWords(c))
				if err != nil {
					return err
				}
				fmt.Fprintf(c.App.Writer, "ready: %s\n", device)
				return nil
			}
			return runAttach(c, ac)
		},
	}
}

// deviceFlags say what device of the kernel is made, and how.
func deviceFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "driver", Value: "auto", Usage: "nbd, loop, or auto: nbd where the kernel has it"},
		&cli.BoolFlag{Name: "supervise", Value: true, Usage: "start the server again when it dies"},
		&cli.BoolFlag{Name: "resume", Usage: "serve COW's device again whose server is gone; with BASE given, attach it anew where there is none"},
		&cli.BoolFlag{Name: "detach", Usage: "go on in the background once the device is ready"},
		&cli.StringFlag{Name: "log", Usage: "file for the messages of a detached process", DefaultText: "none"},
		&cli.IntFlag{Name: "connections", Value: attach.DefaultConnections, Usage: "connections between the kernel and the server"},
		&cli.IntFlag{Name: "block-size", Value: attach.DefaultBlockSize, Usage: "logical block size of the device, bytes"},
		&cli.DurationFlag{Name: "timeout", Usage: "until the kernel sends a request again", DefaultText: "30s, and longer than a write is parked; 10s without --supervise"},
		&cli.DurationFlag{Name: "dead-timeout", Value: defaultDead, Usage: "how long requests wait for a server before they fail"},
	}
}

// storeFlags are those of serve that say how the store and the overlay behave.
func storeFlags() []cli.Flag {
	shared := []string{"read-only", "existing", "chunk-size", "detect-zeroes", "on-full"}
	var flags []cli.Flag
	for _, f := range serveFlags() {
		if slices.Contains(shared, f.Names()[0]) {
			flags = append(flags, f)
		}
	}
	return flags
}

// attachConfig is what the flags of attach say.
type attachConfig struct {
	serve     serveConfig // the files, and how the overlay behaves
	nbd       attach.NBDConfig
	driver    string
	supervise bool
	resume    *attach.State // nil where a new device is attached
	flags     []string      // for another process that opens the same files
}

func attachConfigOf(c *cli.Context) (ac attachConfig, err error) {
	ac.driver, ac.supervise = c.String("driver"), c.Bool("supervise")
	if !slices.Contains([]string{"auto", attach.DriverNBD, attach.DriverLoop}, ac.driver) {
		return ac, usagef("--driver: %q: expected auto, nbd or loop", ac.driver)
	}
	if c.Bool("resume") {
		err = ac.readState(c)
		if !errors.Is(err, attach.ErrNotAttached) || c.Args().Len() < 2 {
			return ac, err
		}
	}
	if err = ac.serve.files(c); err == nil {
		err = ac.serve.device(c)
	}
	if err != nil {
		return ac, err
	}
	ac.flags = passedFlags(c)
	ac.nbd, err = nbdConfigOf(c)
	if err != nil {
		return ac, err
	}
	ac.nbd.Timeout, err = requestTimeout(c, ac.serve.view.cow.Park, ac.supervise)
	return ac, err
}

// nbdConfigOf reads the device and its numbers.
func nbdConfigOf(c *cli.Context) (attach.NBDConfig, error) {
	cfg := attach.NBDConfig{
		Index: nbdnl.AnyDevice, Connections: c.Int("connections"),
		BlockSize: c.Int("block-size"), DeadTimeout: c.Duration("dead-timeout"),
	}
	if device := c.Args().Get(2); device != "" {
		var err error
		if cfg.Index, err = attach.NBDIndex(device); err != nil {
			return cfg, usageError{err}
		}
	}
	switch b := cfg.BlockSize; {
	case cfg.Connections < 1 || cfg.Connections > 64:
		return cfg, usagef("--connections: %d: expected 1 to 64", cfg.Connections)
	case b < 512 || b > os.Getpagesize() || b&(b-1) != 0:
		return cfg, usagef("--block-size: %d: expected a power of two from 512 to %d", b, os.Getpagesize())
	case cfg.DeadTimeout < time.Second:
		return cfg, usagef("--dead-timeout: %v: expected at least 1s", cfg.DeadTimeout)
	}
	return cfg, nil
}

// requestTimeout is how long the kernel lets a request take: longer than a
// write that is parked on a full disk.
func requestTimeout(c *cli.Context, park time.Duration, supervised bool) (time.Duration, error) {
	least := park
	if park < 0 {
		least = foreverPark
	}
	if given := c.Duration("timeout"); c.IsSet("timeout") {
		if given < time.Second {
			return 0, usagef("--timeout: %v: expected at least 1s", given)
		}
		if park > 0 && given <= park {
			return 0, usagef("--timeout: %v: expected more than the %v of --on-full=park", given, park)
		}
		return given, nil
	}
	timeout := directTimeout
	if supervised {
		timeout = supervisedTimeout
	}
	if least > 0 {
		timeout = max(timeout, least+parkMargin)
	}
	return timeout, nil
}

// readState takes what --resume needs from what the device's last server
// left.
func (ac *attachConfig) readState(c *cli.Context) error {
	cow := c.Args().First()
	switch c.Args().Len() {
	case 1:
	case 2, 3:
		cow = c.Args().Get(1)
	default:
		return usagef("attach: --resume needs COW; usage: cowdev attach --resume [flags] [BASE] COW")
	}
	s, err := attach.DefaultStates.Find(cow)
	if err != nil {
		return fmt.Errorf("%w; attach it with BASE and COW", err)
	}
	switch {
	case s.Driver != attach.DriverNBD:
		return fmt.Errorf("%s: cannot be resumed, only nbd devices outlive their server", s.Device)
	case s.Alive():
		return fmt.Errorf("%s: served by process %d, which lives: %w", s.Device, s.PID, unix.EBUSY)
	}
	index, err := attach.NBDIndex(s.Device)
	if err != nil {
		return err
	}
	if s.Gone() {
		return fmt.Errorf("%s: not connected any more; attach it anew: %w", s.Device, attach.ErrNotAttached)
	}
	ac.resume, ac.driver, ac.flags = s, s.Driver, laterFlags(s.Flags)
	ac.nbd = attach.NBDConfig{
		Index: index, Size: s.Size, BlockSize: s.BlockSize, Connections: s.Connections,
		Timeout: s.Timeout, DeadTimeout: s.DeadTimeout, Identifier: s.UUID,
	}
	// The store is opened as it was then, and none is made in its place.
	return parseServe(c, ac.flags, s.Base, s.COW, &ac.serve)
}

// passedFlags returns the store's and the base's flags that were given, as
// words of a command line.
func passedFlags(c *cli.Context) []string {
	var words []string
	for _, f := range append(storeFlags(), baseFlags()...) {
		name := f.Names()[0]
		if c.IsSet(name) {
			words = append(words, fmt.Sprintf("--%s=%v", name, c.Value(name)))
		}
	}
	return words
}

// laterFlags returns what of flags holds for each opening of the store after the
// first: one that is missing is not made anew, and a base that changed under a
// mounted filesystem is not taken.
func laterFlags(flags []string) []string {
	later := []string{"--existing=true"}
	for _, f := range flags {
		if name, _, _ := strings.Cut(f, "="); name != "--existing" && name != "--accept-base" {
			later = append(later, f)
		}
	}
	return later
}

// parseServe reads flags, as passedFlags gave them, into sc.
func parseServe(c *cli.Context, flags []string, base, cow string, sc *serveConfig) error {
	inner := &cli.Command{
		Name: "open", ArgsUsage: "BASE COW", Flags: append(storeFlags(), baseFlags()...), HideHelp: true,
		Action: func(c *cli.Context) error {
			if err := sc.files(c); err != nil {
				return err
			}
			return sc.device(c)
		},
	}
	// A context of its own: Run puts what it reads into the one it is given.
	own := cli.NewContext(c.App, nil, c)
	own.Command = inner
	return inner.Run(own, append(append([]string{"open"}, flags...), "--", base, cow)...)
}

// runAttach attaches and serves until the device is gone.
func runAttach(c *cli.Context, ac attachConfig) error {
	signal.Ignore(syscall.SIGPIPE)
	driver := ac.driver
	if driver == "auto" {
		driver = attach.DriverNBD
		if err := nbdnl.Available(); errors.Is(err, nbdnl.ErrNoDriver) {
			driver = attach.DriverLoop
			warn(c, "%v; a loop device over FUSE is made instead, which does not outlive this process", err)
		}
	}
	if driver == attach.DriverLoop {
		if ac.nbd.Index != nbdnl.AnyDevice {
			return usagef("DEVICE is for --driver=nbd; %w", nbdnl.ErrNoDriver)
		}
		return attachLoop(c, ac)
	}
	if err := nbdnl.Available(); errors.Is(err, nbdnl.ErrNoDriver) {
		return fmt.Errorf("%w; or --driver=loop, or cowdev mount, which need none", err)
	} else if err != nil {
		return err
	}
	if os.Geteuid() != 0 {
		return fmt.Errorf("the kernel gives nbd devices to root only: %w", unix.EPERM)
	}
	if ac.supervise {
		return attachSupervised(c, ac)
	}
	return attachDirect(c, ac)
}

// state is what other verbs are told of the device.
func (ac *attachConfig) state(device, driver, uuid string) *attach.State {
	exe, _ := os.Executable()
	return &attach.State{
		Device: device, Driver: driver, UUID: uuid, PID: os.Getpid(), Born: attach.Born(os.Getpid()), Executable: exe,
		Base: absolute(ac.serve.base), COW: absolute(ac.serve.cow), Size: ac.nbd.Size,
		Connections: ac.nbd.Connections, BlockSize: ac.nbd.BlockSize,
		Timeout: ac.nbd.Timeout, DeadTimeout: ac.nbd.DeadTimeout,
		Flags: laterFlags(ac.flags), Started: time.Now(),
	}
}

// announce tells of a device that can be used: other verbs by its state, and
// who waits for it by a line.
func announce(c *cli.Context, ac *attachConfig, s *attach.State) error {
	if ac.resume != nil {
		s.Mounts, s.Started = ac.resume.Mounts, ac.resume.Started
	}
	log, err := openLog(c)
	if err != nil {
		return err
	}
	if log != nil {
		defer log.Close()
	}
	if err := attach.DefaultStates.Save(s); err != nil {
		return fmt.Errorf("keep the device's state: %w", err)
	}
	_, err = fmt.Fprintf(c.App.Writer, "ready: %s\n", s.Device)
	if log == nil {
		return nil
	}
	if err == nil {
		err = becomeDaemon(log)
	}
	if err != nil { // who asked for the device is gone, and will not use it
		return errors.Join(fmt.Errorf("tell who waits for %s: %w", s.Device, err), attach.DefaultStates.Remove(s))
	}
	return nil
}

// attachWords are the words of a command line that does without --detach what
// c does.
func attachWords(c *cli.Context) []string {
	words := []string{"attach"}
	for _, f := range deviceFlags() {
		switch name := f.Names()[0]; {
		case name == "detach" || !c.IsSet(name):
		case name == "log":
			words = append(words, "--log="+absolute(c.String(name)))
		default:
			words = append(words, fmt.Sprintf("--%s=%v", name, c.Value(name)))
		}
	}
	words = append(append(words, passedFlags(c)...), "--")
	for _, path := range c.Args().Slice() { // it runs in another directory
		words = append(words, absolute(path))
	}
	return words
}

// detachedEnv tells a process that it was started by startDetached.
const detachedEnv = "COWDEV_DETACHED"

// startDetached starts cowdev with words in a session of its own and returns
// the device that it made. When it fails it has told why on stderr, and the
// error is its exit status alone.
func startDetached(c *cli.Context, words []string) (device string, err error) {
	exe, err := os.Executable()
	if err != nil {
		return "", err
	}
	out, in, err := os.Pipe()
	if err != nil {
		return "", err
	}
	defer out.Close()
	stderr, fromChild, err := os.Pipe()
	if err != nil {
		in.Close()
		return "", err
	}
	defer stderr.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		return "", err
	}
	defer null.Close()
	p, err := os.StartProcess(exe, append([]string{"cowdev"}, words...), &os.ProcAttr{
		Dir:   "/",
		Env:   append(os.Environ(), detachedEnv+"=1"),
		Files: []*os.File{null, in, fromChild},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
	in.Close()
	fromChild.Close()
	if err != nil {
		return "", err
	}
	copied := make(chan struct{})
	go func() { defer close(copied); io.Copy(c.App.ErrWriter, stderr) }()
	line, _ := bufio.NewReader(out).ReadString('\n')
	<-copied // the child's end closes when it is ready, or gone
	if device, ok := strings.CutPrefix(strings.TrimSpace(line), "ready: "); ok {
		return device, p.Release()
	}
	end, err := p.Wait()
	if err != nil {
		return "", err
	}
	return "", quietError(max(end.ExitCode(), exitFailure))
}

// openLog opens where the messages of a detached process go: --log, or nowhere.
// It is nil for a process that was not started by startDetached.
func openLog(c *cli.Context) (*os.File, error) {
	if os.Getenv(detachedEnv) == "" {
		return nil, nil
	}
	name := os.DevNull
	if c.String("log") != "" {
		name = c.String("log")
	}
	return os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
}

// becomeDaemon lets go of the process that waits in startDetached: messages go
// to log from now on.
func becomeDaemon(log *os.File) error {
	for _, fd := range []int{1, 2} {
		if err := unix.Dup3(int(log.Fd()), fd, 0); err != nil {
			return err
		}
	}
	return nil
}

// deviceSignals are the signals of a process that holds a device.
func deviceSignals() (ch chan os.Signal, stop func()) {
	ch = make(chan os.Signal, 4)
	signal.Notify(ch, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGUSR2)
	return ch, func() { signal.Stop(ch) }
}

// limited returns a context for a step that must not take for ever.
func limited() (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), usableLimit)
}
