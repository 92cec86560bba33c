package nbdserver

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/netip"
	"time"

	"github.com/cowdev/cowdev/block"
)

// Limits and defaults of a Config.
const (
	DefaultMaxConnections   = 16384
	DefaultHandshakeTimeout = 10 * time.Second
)

// ErrServerClosed is what Serve returns after Shutdown, and ServeConn when it
// is asked to begin after it.
var ErrServerClosed = errors.New("nbd server is closed")

// An Export is a device under a name. The empty name is the default export.
type Export struct {
	Name        string
	Description string
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
	// can be replaced while the server runs. Needed unless TLS is TLSOff.
	TLSConfig func() (*tls.Config, error)

	MaxConnections   int           // at once, over all listeners; 0 is DefaultMaxConnections
	HandshakeTimeout time.Duration // from accept to the transmission phase; 0 is DefaultHandshakeTimeout, negative none
	IdleTimeout      time.Duration // without a request; 0 is none

	AllowUIDs []int          // of peers on unix sockets, by SO_PEERCRED; empty allows all
	AllowNets []netip.Prefix // of peers on TCP; empty allows all

	// ErrorLog is told, in one line each, what ended a connection early or
	// failed in a device. Nil drops it. It is called by many goroutines.
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

// A Server serves exports to any number of connections.
type Server struct {
	cfg Config
}

// New checks cfg and returns a server that is not yet listening.
func New(cfg Config) (*Server, error) {
	return &Server{cfg: cfg}, nil
}

// Serve accepts connections from l until Shutdown, or until accepting fails
// for good, and then closes l. It may be called for several listeners at
// once. After Shutdown it returns ErrServerClosed.
func (s *Server) Serve(l net.Listener) error { panic("not yet") }

// ServeConn does the handshake and the transmission phase on c, closes it and
// returns what ended it, nil when the client said goodbye.
func (s *Server) ServeConn(c net.Conn) error { panic("not yet") }

// ServeTransmission serves e on c, on which the handshake has been done by
// other means: a socket whose other end the kernel was given by netlink. It
// uses simple replies, as the kernel's client does. It closes c.
func (s *Server) ServeTransmission(c net.Conn, e *Export) error { panic("not yet") }

// TransmissionFlags returns the flags that the client of ServeTransmission
// has to be told (NBD_ATTR_SERVER_FLAGS).
func (e *Export) TransmissionFlags() uint16 { panic("not yet") }

// Shutdown stops accepting, lets requests that have been received end, answers
// them and closes every connection; when ctx ends first it closes the rest as
// they are and returns ctx's error. Devices are neither flushed nor closed.
func (s *Server) Shutdown(ctx context.Context) error { panic("not yet") }

// Stats returns the counts so far.
func (s *Server) Stats() Stats { return Stats{} }
