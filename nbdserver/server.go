package nbdserver

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/cowdev/cowdev/block"
	"github.com/cowdev/cowdev/internal/nbd"
)

// Limits and defaults of a Config.
const (
	DefaultMaxConnections   = 16384
	DefaultHandshakeTimeout = 10 * time.Second
)

// abortGrace is how long Shutdown waits for connections that it has cut.
const abortGrace = time.Second

// ErrServerClosed is what Serve returns after Shutdown, and ServeConn when it
// is asked to begin after it.
var ErrServerClosed = errors.New("nbd server is closed")

// An Export is a device under a name. The empty name is the default export; a
// lone export is the default one whatever its name.
type Export struct {
	Name        string // UTF-8, at most 4096 bytes
	Description string // for people, at most 4096 bytes
	Device      block.Device
}

// TLSMode says what the server does about NBD_OPT_STARTTLS.
type TLSMode int

// The modes of TLS, with the specification's names for them.
const (
	TLSOff     TLSMode = iota // NOTLS
	TLSAllow                  // SELECTIVETLS: plain text and TLS are both served
	TLSRequire                // FORCEDTLS: nothing but STARTTLS and ABORT before TLS
)

// A Config is what New makes a server of. Only Exports has to be set.
type Config struct {
	Exports []Export // at least one, no name twice

	TLS TLSMode
	// TLSConfig is asked for at each NBD_OPT_STARTTLS, so that certificates
	// can be replaced while the server runs (Certificates.Config). Needed
	// unless TLS is TLSOff.
	TLSConfig func() (*tls.Config, error)

	MaxConnections   int           // at once, over all listeners; 0 is DefaultMaxConnections
	HandshakeTimeout time.Duration // from accept to the transmission phase; 0 is DefaultHandshakeTimeout, negative none
	IdleTimeout      time.Duration // without a request or progress of a reply; 0 is none

	AllowUIDs []int          // of peers that Serve accepts on unix sockets, by SO_PEERCRED; empty allows all
	AllowNets []netip.Prefix // of peers that Serve accepts on TCP; empty allows all

	// ErrorLog is told, in one line each, what ended a connection early or
	// failed in a device, at most 20 times a second. Nil drops it. It is called
	// by many goroutines.
	ErrorLog func(format string, args ...any)
}

// Stats are counts since the server began.
type Stats struct {
	Connections      int64 // now
	Accepted         uint64
	Refused          uint64 // by MaxConnections, AllowUIDs or AllowNets
	HandshakesFailed uint64
	Requests         uint64
	Errors           uint64 // requests answered with an error
	BytesRead        uint64 // from devices to clients
	BytesWritten     uint64
	Faults           uint64 // connections closed because a mapped page could not be read
}

// counters are Stats while they are being counted.
type counters struct {
	connections                                 atomic.Int64
	accepted, refused, handshakesFailed, faults atomic.Uint64
	requests, errors, bytesRead, bytesWritten   atomic.Uint64
}

// A Server serves exports to any number of connections.
type Server struct {
	cfg     Config
	log     limitedLog
	count   counters
	workers workers
	crowd   int64         // connections from which each is served in slices
	wide    gate          // of connections whose sockets hold more than others'
	flushes atomic.Uint64 // FLUSHes and changes with FUA of all exports, but for those that workers did

	mu        sync.Mutex
	closing   bool
	listeners map[net.Listener]struct{}
	conns     map[*conn]struct{}
	left      sync.WaitGroup // one for each of conns
}

// New checks cfg and returns a server that is not yet listening.
func New(cfg Config) (*Server, error) {
	if len(cfg.Exports) == 0 {
		return nil, errors.New("nbd server without an export, expected at least one")
	}
	names := make(map[string]bool)
	for _, e := range cfg.Exports {
		switch {
		case len(e.Name) > nbd.MaxString || len(e.Description) > nbd.MaxString:
			return nil, fmt.Errorf("export %.40q: name or description longer than %d bytes", e.Name, nbd.MaxString)
		case names[e.Name]:
			return nil, fmt.Errorf("export %q is there twice, give each a name of its own", e.Name)
		case e.Device == nil:
			return nil, fmt.Errorf("export %q has no device", e.Name)
		}
		names[e.Name] = true
	}
	if cfg.TLS != TLSOff && cfg.TLSConfig == nil {
		return nil, errors.New("TLS without certificates, set TLSConfig")
	}
	if cfg.MaxConnections == 0 {
		cfg.MaxConnections = DefaultMaxConnections
	}
	if cfg.HandshakeTimeout == 0 {
		cfg.HandshakeTimeout = DefaultHandshakeTimeout
	}
	s := &Server{
		cfg:       cfg,
		listeners: make(map[net.Listener]struct{}),
		conns:     make(map[*conn]struct{}),
		wide:      make(gate, maxWide),
	}
	s.log.to = cfg.ErrorLog
	s.workers.init()
	s.crowd = 2*int64(runtime.GOMAXPROCS(0)) + 1
	return s, nil
}

// Serve accepts connections from l until Shutdown, or until accepting fails
// for good, and then closes l. It may be called for several listeners at
// once. After Shutdown it returns ErrServerClosed.
func (s *Server) Serve(l net.Listener) error {
	defer l.Close()
	if !s.addListener(l) {
		return ErrServerClosed
	}
	defer s.removeListener(l)
	for {
		c, err := l.Accept()
		switch {
		case err == nil:
			s.admit(c)
		case s.isClosing():
			return ErrServerClosed
		case isPassing(err):
			s.log.printf("accept on %v: %v; trying again", l.Addr(), err)
			time.Sleep(50 * time.Millisecond)
		default:
			return fmt.Errorf("accept on %v: %w", l.Addr(), err)
		}
	}
}

// isPassing says whether a failed accept may succeed later: the process or
// the system is out of descriptors or memory, or the peer has gone already.
func isPassing(err error) bool {
	for _, e := range []error{syscall.EMFILE, syscall.ENFILE, syscall.ENOMEM, syscall.ENOBUFS, syscall.ECONNABORTED} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// admit begins to serve c in a goroutine of its own if its peer may come in.
func (s *Server) admit(nc net.Conn) {
	err := s.mayEnter(nc)
	var c *conn
	if err == nil {
		c, err = s.addConn(nc)
	}
	if err != nil {
		s.count.refused.Add(1)
		s.log.printf("connection from %s refused: %v", peerName(nc), err)
		nc.Close()
		return
	}
	go c.run(c.handshakeAndServe)
}

// ServeConn does the handshake and the transmission phase on c, closes it and
// returns what ended it, nil when the client said goodbye. It asks neither
// AllowUIDs nor AllowNets.
func (s *Server) ServeConn(nc net.Conn) error {
	c, err := s.addConn(nc)
	if err != nil {
		nc.Close()
		return err
	}
	return c.run(c.handshakeAndServe)
}

// ServeTransmission serves e on c, on which the handshake has been done by
// other means: a socket whose other end the kernel was given by netlink. It
// uses simple replies, as the kernel's client does. It closes c and returns
// what ended it, as ServeConn. e need not be one of the Config.
func (s *Server) ServeTransmission(nc net.Conn, e *Export) error {
	c, err := s.addConn(nc)
	if err != nil {
		nc.Close()
		return err
	}
	return c.run(func() error { return c.transmission(session{export: e}) })
}

// TransmissionFlags returns the flags that the client of ServeTransmission
// has to be told (NBD_ATTR_SERVER_FLAGS).
func (e *Export) TransmissionFlags() uint16 {
	flags := uint16(nbd.FlagHasFlags | nbd.FlagSendFlush | nbd.FlagSendFUA | nbd.FlagCanMultiConn | nbd.FlagSendCache)
	if e.Device.ReadOnly() {
		return flags | nbd.FlagReadOnly
	}
	return flags | nbd.FlagSendTrim | nbd.FlagSendWriteZeroes | nbd.FlagSendFastZero
}

// Shutdown stops accepting, lets requests that have been received end, answers
// them and closes every connection. When ctx ends first it closes the rest as
// they are and returns ctx's error; requests may then still be inside a device.
// Devices are neither flushed nor closed.
func (s *Server) Shutdown(ctx context.Context) error {
	s.mu.Lock()
	s.closing = true
	for l := range s.listeners {
		l.Close()
	}
	for c := range s.conns {
		c.stop()
	}
	s.mu.Unlock()

	gone := make(chan struct{})
	go func() {
		s.left.Wait()
		s.workers.close()
		close(gone)
	}()
	select {
	case <-gone:
		return nil
	case <-ctx.Done():
	}
	s.mu.Lock()
	for c := range s.conns {
		c.abort(ErrServerClosed)
	}
	s.mu.Unlock()
	select {
	case <-gone:
	case <-time.After(abortGrace):
	}
	return ctx.Err()
}

// Stats returns the counts so far.
func (s *Server) Stats() Stats {
	n := &s.count
	return Stats{
		Connections:      n.connections.Load(),
		Accepted:         n.accepted.Load(),
		Refused:          n.refused.Load(),
		HandshakesFailed: n.handshakesFailed.Load(),
		Requests:         n.requests.Load(),
		Errors:           n.errors.Load(),
		BytesRead:        n.bytesRead.Load(),
		BytesWritten:     n.bytesWritten.Load(),
		Faults:           n.faults.Load(),
	}
}

// export returns the export that a client calls name, or nil.
func (s *Server) export(name string) *Export {
	for i := range s.cfg.Exports {
		if s.cfg.Exports[i].Name == name {
			return &s.cfg.Exports[i]
		}
	}
	if name == "" && len(s.cfg.Exports) == 1 {
		return &s.cfg.Exports[0]
	}
	return nil
}

func (s *Server) isClosing() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.closing
}

// lone says that there is one connection.
func (s *Server) lone() bool { return s.count.connections.Load() == 1 }

// crowded says that there are so many connections that they may have to wait
// for one another. Few do not: Go runs them at once.
func (s *Server) crowded() bool { return s.count.connections.Load() >= s.crowd }

func (s *Server) addListener(l net.Listener) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing {
		return false
	}
	s.listeners[l] = struct{}{}
	return true
}

func (s *Server) removeListener(l net.Listener) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.listeners, l)
}

// addConn makes nc one of the server's connections, unless there are too many.
func (s *Server) addConn(nc net.Conn) (*conn, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing {
		return nil, ErrServerClosed
	}
	if len(s.conns) >= s.cfg.MaxConnections {
		return nil, fmt.Errorf("%d connections already, no more are allowed", len(s.conns))
	}
	c := newConn(s, nc)
	s.conns[c] = struct{}{}
	s.left.Add(1)
	s.count.accepted.Add(1)
	s.count.connections.Add(1)
	return c, nil
}

func (s *Server) removeConn(c *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, c)
	s.count.connections.Add(-1)
	s.left.Done()
}
