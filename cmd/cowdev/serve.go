package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"os/signal"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
	"unicode/utf8"

	"github.com/urfave/cli/v2"

	"github.com/cowdev/cowdev/block"
	"github.com/cowdev/cowdev/exception"
	"github.com/cowdev/cowdev/image"
	"github.com/cowdev/cowdev/internal/nbd"
	"github.com/cowdev/cowdev/nbdserver"
)

func serveCommand() *cli.Command {
	return &cli.Command{
		Name:      "serve",
		Usage:     "Serve BASE by NBD, with every change kept in COW",
		ArgsUsage: "BASE COW",
		Description: "BASE is opened read-only and never written. COW is made where it does not exist.\n" +
			"With --temporary there is no COW: changes are forgotten at the end.",
		Flags: append(append(serveFlags(), exposureFlags()...), baseFlags()...),
		Action: func(c *cli.Context) error {
			sc, err := serveConfigOf(c)
			if err != nil {
				return err
			}
			return serve(c, sc)
		},
	}
}

func serveFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringSliceFlag{Name: "socket", Usage: "unix socket to listen on; repeatable", DefaultText: "COW.sock"},
		&cli.StringSliceFlag{Name: "listen", Usage: "TCP address HOST:PORT to listen on; repeatable; port 0 picks one"},
		&cli.StringFlag{Name: "export", Usage: "name of the export", DefaultText: "the empty name"},
		&cli.BoolFlag{Name: "read-only", Aliases: []string{"r"}, Usage: "refuse every change; COW is neither made nor changed"},
		&cli.BoolFlag{Name: "existing", Usage: "COW must exist"},
		&cli.BoolFlag{Name: "temporary", Usage: "no COW: forget every change at the end"},
		chunkSizeFlag,
		&cli.StringFlag{Name: "detect-zeroes", Value: "on", Usage: "record written zeros as zeros, not as data: on or off"},
		&cli.StringFlag{Name: "on-full", Value: "enospc", Usage: "when the filesystem of COW is full: enospc, or park[=DURATION] to let writes wait for room"},
		&cli.StringFlag{Name: "socket-mode", Value: "0600", Usage: "permissions of the unix sockets"},
		&cli.StringFlag{Name: "socket-group", Usage: "group of the unix sockets"},
	}
}

func exposureFlags() []cli.Flag {
	return []cli.Flag{
		&cli.BoolFlag{Name: "insecure", Usage: "listen on an address that is not loopback without requiring TLS"},
		&cli.StringFlag{Name: "tls", Usage: "off, allow or require", DefaultText: "off; require where certificates are given"},
		&cli.StringFlag{Name: "tls-dir", Usage: "directory of ca-cert.pem, server-cert.pem and server-key.pem"},
		&cli.StringFlag{Name: "tls-ca", Usage: "certificate of the authority that signs the clients' certificates"},
		&cli.StringFlag{Name: "tls-cert", Usage: "certificate of the server"},
		&cli.StringFlag{Name: "tls-key", Usage: "key of the server"},
		&cli.StringSliceFlag{Name: "allow-uid", Usage: "user, by name or number, that may connect to unix sockets; repeatable", DefaultText: "all"},
		&cli.StringSliceFlag{Name: "allow-net", Usage: "network CIDR that may connect by TCP; repeatable", DefaultText: "all"},
		&cli.IntFlag{Name: "max-connections", Value: nbdserver.DefaultMaxConnections, Usage: "connections at once"},
		&cli.DurationFlag{Name: "handshake-timeout", Value: nbdserver.DefaultHandshakeTimeout, Usage: "for a client to get through the handshake"},
		&cli.DurationFlag{Name: "idle-timeout", Usage: "for a connection without a request; 0 for ever"},
		&cli.BoolFlag{Name: "sandbox", Usage: "give up every right that serving does not need (Landlock)"},
	}
}

var chunkSizeFlag = &cli.StringFlag{Name: "chunk-size", Usage: "unit of remapping of a new store, a power of two from 8K to 1M", DefaultText: "64K"}

// chunkSizeOf reads chunkSizeFlag.
func chunkSizeOf(c *cli.Context) (int, error) {
	s := c.String("chunk-size")
	if s == "" {
		return block.DefaultChunkSize, nil
	}
	n, err := parseSize(s)
	if err != nil {
		return 0, usagef("--chunk-size: %w", err)
	}
	if n < block.MinChunkSize || n > block.MaxChunkSize || n&(n-1) != 0 {
		return 0, usagef("--chunk-size: %s: expected a power of two from %s to %s", size(n), short(block.MinChunkSize), short(block.MaxChunkSize))
	}
	return int(n), nil
}

// serveConfig is what the flags of serve say.
type serveConfig struct {
	base, cow string
	view      viewOptions
	listen    listenConfig
	server    nbdserver.Config
	certs     nbdserver.CertificateFiles // empty without TLS
	sandbox   bool
}

func serveConfigOf(c *cli.Context) (sc serveConfig, err error) {
	if err = sc.files(c); err != nil {
		return sc, err
	}
	if err = sc.device(c); err != nil {
		return sc, err
	}
	if err = sc.tls(c); err != nil {
		return sc, err
	}
	if err = sc.limits(c); err != nil {
		return sc, err
	}
	return sc, sc.listeners(c)
}

// files reads the arguments and how they are opened.
func (sc *serveConfig) files(c *cli.Context) error {
	names := c.Command.ArgsUsage
	if c.Bool("temporary") {
		names = "BASE"
	}
	args, err := arguments(c, names)
	if err != nil {
		return err
	}
	sc.base = args[0]
	if len(args) > 1 {
		sc.cow = args[1]
	}
	if sc.view, err = viewOptionsOf(c); err != nil {
		return err
	}
	sc.view.readOnly, sc.view.existing = c.Bool("read-only"), c.Bool("existing")
	sc.view.temporary = c.Bool("temporary")
	if sc.view.temporary && (sc.view.readOnly || sc.view.existing) {
		return usagef("--temporary makes a store of its own, and goes with neither --read-only nor --existing")
	}
	sc.view.chunkSize, err = chunkSizeOf(c)
	return err
}

// device reads how the overlay behaves.
func (sc *serveConfig) device(c *cli.Context) error {
	sc.view.cow.Log = func(format string, args ...any) { warn(c, format, args...) }
	sc.view.store.Interval = commitInterval
	switch mode := c.String("detect-zeroes"); mode {
	case "on":
	case "off":
		sc.view.cow.KeepZeroes = true
	default:
		return usagef("--detect-zeroes: %q: expected on or off", mode)
	}
	policy, duration, given := strings.Cut(c.String("on-full"), "=")
	switch {
	case policy == "enospc" && !given:
	case policy == "park" && !given:
		sc.view.cow.Park = -1
	case policy == "park":
		d, err := time.ParseDuration(duration)
		if err != nil || d <= 0 {
			return usagef("--on-full: %q: expected a duration such as 30s or 5m", duration)
		}
		sc.view.cow.Park = d
	default:
		return usagef("--on-full: %q: expected enospc, park or park=DURATION", c.String("on-full"))
	}
	return nil
}

// tls reads whether and how connections are encrypted.
func (sc *serveConfig) tls(c *cli.Context) error {
	certs := nbdserver.CertificateFiles{CA: c.String("tls-ca"), Cert: c.String("tls-cert"), Key: c.String("tls-key")}
	if dir := c.String("tls-dir"); dir != "" {
		if certs != (nbdserver.CertificateFiles{}) {
			return usagef("--tls-dir goes with none of --tls-ca, --tls-cert and --tls-key")
		}
		certs = nbdserver.CertificatesIn(dir)
	}
	given := certs != (nbdserver.CertificateFiles{})
	switch mode := c.String("tls"); {
	case mode == "off", mode == "" && !given:
		return nil
	case mode == "allow":
		sc.server.TLS = nbdserver.TLSAllow
	case mode == "require", mode == "":
		sc.server.TLS = nbdserver.TLSRequire
	default:
		return usagef("--tls: %q: expected off, allow or require", mode)
	}
	if certs.Cert == "" || certs.Key == "" {
		return usagef("--tls=%s needs --tls-dir, or --tls-cert and --tls-key", c.String("tls"))
	}
	sc.certs = certs
	return nil
}

// limits reads who may connect, and how often and how long.
func (sc *serveConfig) limits(c *cli.Context) error {
	s := &sc.server
	s.MaxConnections, s.HandshakeTimeout, s.IdleTimeout = c.Int("max-connections"), c.Duration("handshake-timeout"), c.Duration("idle-timeout")
	if s.MaxConnections < 1 {
		return usagef("--max-connections: %d: expected at least 1", s.MaxConnections)
	}
	if s.HandshakeTimeout <= 0 || s.IdleTimeout < 0 {
		return usagef("--handshake-timeout and --idle-timeout: expected a duration such as 10s")
	}
	for _, name := range c.StringSlice("allow-uid") {
		uid, err := userID(name)
		if err != nil {
			return err
		}
		s.AllowUIDs = append(s.AllowUIDs, uid)
	}
	for _, cidr := range c.StringSlice("allow-net") {
		p, err := netip.ParsePrefix(cidr)
		if err != nil {
			return usagef("--allow-net: %q: expected a network such as 10.0.0.0/8", cidr)
		}
		s.AllowNets = append(s.AllowNets, p)
	}
	sc.sandbox = c.Bool("sandbox")
	return nil
}

// listeners reads where to listen.
func (sc *serveConfig) listeners(c *cli.Context) error {
	lc := &sc.listen
	lc.export, lc.tls = c.String("export"), sc.server.TLS == nbdserver.TLSRequire
	if n := len(lc.export); n > nbd.MaxString {
		return usagef("--export: a name of %d bytes, expected at most %d", n, nbd.MaxString)
	}
	if !utf8.ValidString(lc.export) {
		return usagef("--export: %q: expected UTF-8", lc.export)
	}
	mode, err := strconv.ParseUint(c.String("socket-mode"), 8, 32)
	if err != nil || mode > 0o777 {
		return usagef("--socket-mode: %q: expected octal permissions such as 0660", c.String("socket-mode"))
	}
	lc.mode = fs.FileMode(mode)
	if lc.gid, err = groupID(c.String("socket-group")); err != nil {
		return err
	}
	for _, where := range c.StringSlice("listen") {
		addr, err := tcpAddress(where)
		if err != nil {
			return err
		}
		if !addr.IP.IsLoopback() && !lc.tls && !c.Bool("insecure") {
			return usagef("--listen: %s is not loopback, and anybody there could read and write: add --tls=require or --insecure", where)
		}
		lc.tcp = append(lc.tcp, addr)
	}
	sockets := c.StringSlice("socket")
	if len(sockets) == 0 && len(lc.tcp) == 0 {
		if sc.view.temporary {
			return usagef("--temporary: there is no COW to name the socket after; give --socket or --listen")
		}
		sockets = []string{sc.cow + ".sock"}
	}
	for _, path := range sockets {
		abs, err := socketPath(path)
		if err != nil {
			return err
		}
		lc.sockets = append(lc.sockets, abs)
	}
	return nil
}

// sparePlaces is how many goroutines may run beyond one for each processor. One
// that waits for the disk keeps its place until Go's monitor, which may sleep
// for 10 ms, takes it away; requests that need no disk should not wait for that.
const sparePlaces = 4

// serve serves until a signal, and then ends in order.
func serve(c *cli.Context, sc serveConfig) (err error) {
	if os.Getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(runtime.GOMAXPROCS(0) + sparePlaces)
	}
	signal.Ignore(syscall.SIGPIPE)    // a log that nobody reads must not end the server
	var certs *nbdserver.Certificates // nil without TLS
	if sc.certs.Cert != "" {
		if certs, err = sc.certs.Load(); err != nil {
			return err
		}
	}
	stop := stopSignals(c, certs)
	defer stop.end()

	view, err := openView(stop.ctx, c, sc.base, sc.cow, sc.view)
	if err != nil {
		return err
	}
	listening, made := false, view.made && !sc.view.temporary
	defer func() {
		// Nobody could write to it.
		if made && !listening && isAt(view.file, sc.cow) && os.Remove(sc.cow) == nil {
			warn(c, "%s: removed again", sc.cow)
		}
		err = errors.Join(err, view.Close())
	}()

	server, err := sc.newServer(c, view, certs)
	if err != nil {
		return err
	}
	listeners, err := listenAll(sc.listen)
	if err != nil {
		return err
	}
	if sc.sandbox {
		if err := sandbox(c, sc); err != nil {
			return err
		}
	}
	listening = true
	ended := make(chan error, len(listeners))
	for _, l := range listeners {
		go func() { ended <- server.Serve(l) }()
	}
	tellListeners(c, listeners)
	endBackground := sc.background(stop.ctx, c, view, server)
	defer endBackground()

	select {
	case <-stop.ctx.Done():
		err = nil
	case err = <-ended: // a listener that fails by itself
	}
	// Writes that wait for room would wait for ever.
	view.device.Release()
	return errors.Join(err, server.Shutdown(context.Background()))
}

// tellListeners tells where clients connect, and how.
func tellListeners(c *cli.Context, listeners []listener) {
	for _, l := range listeners {
		fmt.Fprintf(c.App.Writer, "ready: %s\n", l.uri)
	}
	for _, l := range listeners {
		fmt.Fprintf(c.App.ErrWriter, "cowdev: attach it: %s\n", l.hint)
	}
}

// background begins what a server does beside serving, and returns what ends
// that and waits for it.
func (sc *serveConfig) background(ctx context.Context, c *cli.Context, v *view, server *nbdserver.Server) (end func()) {
	ctx, cancel := context.WithCancel(ctx)
	var running sync.WaitGroup
	if sc.cow != "" && !sc.view.readOnly && !v.file.IsDevice() {
		running.Go(func() {
			watchRoom(ctx, v.store, sc.cow, func(format string, args ...any) { warn(c, format, args...) })
		})
	}
	if sc.wantsDigest(v) {
		running.Go(func() {
			if err := v.learnDigest(ctx, idleWaiter(server)); err != nil && ctx.Err() == nil {
				warn(c, "full digest of %s: %v", sc.base, err)
			}
		})
	}
	return func() {
		cancel()
		running.Wait()
	}
}

// wantsDigest reports whether the base's full digest is not known, and can be
// kept.
func (sc *serveConfig) wantsDigest(v *view) bool {
	return sc.view.look == image.DigestFull && v.identity.Full == nil && v.identity.Sample != nil &&
		!sc.view.temporary && !v.device.ReadOnly() && v.store.Header().State == exception.Active
}

func (sc *serveConfig) newServer(c *cli.Context, v *view, certs *nbdserver.Certificates) (*nbdserver.Server, error) {
	cfg := sc.server
	cfg.Exports = []nbdserver.Export{{Name: sc.listen.export, Description: description(sc.base), Device: v.device}}
	cfg.ErrorLog = func(format string, args ...any) { warn(c, format, args...) }
	if certs != nil {
		cfg.TLSConfig = certs.Config
	}
	return nbdserver.New(cfg)
}

// maxDescription is how long the protocol has strings be, in bytes.
const maxDescription = 256

// description tells clients of an overlay over base, whose path may be longer
// than a string of the protocol, and need not be text.
func description(base string) string {
	s := strings.ToValidUTF8("copy-on-write overlay of "+base, "\uFFFD")
	if len(s) <= maxDescription {
		return s
	}
	const more = "…"
	return strings.ToValidUTF8(s[:maxDescription-len(more)], "") + more
}

// A stopper ends the server by signals: SIGINT and SIGTERM in order, a second
// one at once, since a client that takes no replies holds the first one up for
// ever. One that comes within twinSignal of the first is the same request: from
// timeout(1) a command has it once for itself and once for its group. SIGHUP
// reads certificates again, and without any ends the server as the others do.
type stopper struct {
	ctx     context.Context
	cancel  context.CancelFunc
	signals chan os.Signal
}

const twinSignal = 100 * time.Millisecond

func stopSignals(c *cli.Context, certs *nbdserver.Certificates) *stopper {
	s := &stopper{signals: make(chan os.Signal, 2)}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	signal.Notify(s.signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	go func() {
		var first time.Time
		for sig := range s.signals {
			switch {
			case sig == syscall.SIGHUP && certs != nil:
				if err := certs.Reload(); err != nil {
					warn(c, "%v; the certificates from before stay in use", err)
				}
			case s.ctx.Err() != nil && time.Since(first) < twinSignal:
			case s.ctx.Err() != nil:
				signal.Reset() // where nobody reads the message, a third one ends it
				warn(c, "ended at once by a second signal, without closing in order")
				os.Exit(exitFailure)
			default:
				first = time.Now()
				s.cancel()
			}
		}
	}()
	return s
}

func (s *stopper) end() {
	signal.Stop(s.signals)
	close(s.signals)
	s.cancel()
}
