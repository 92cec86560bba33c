// Package nbdclient is a small NBD client for tests: it can be as correct as a
// client should be, or send what none should. It is synchronous and used by
// one goroutine; every wait has a deadline.
package nbdclient

import (
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"syscall"
	"time"

	"github.com/cowdev/cowdev/internal/nbd"
)

// Timeout is how long the client waits for anything.
const Timeout = 2 * time.Minute

// A Client is a connection to an NBD server. Structured and Extended say how
// the transmission phase is spoken; the options set them, and a test may.
type Client struct {
	net.Conn
	Structured, Extended bool

	Size     int64             // of the export, after Go or ExportName
	Flags    uint16            // transmission flags, likewise
	Info     map[uint16][]byte // answers to the information requests of Go or InfoOf
	Contexts map[uint32]string // metadata contexts by their id

	cookie uint64
	reads  map[uint64]int // bytes that a simple reply to a cookie carries
}

// Dial connects to a server and greets it.
func Dial(network, address string) (*Client, error) {
	nc, err := net.DialTimeout(network, address, Timeout)
	if err != nil {
		return nil, err
	}
	c, err := Greet(nc)
	if err != nil {
		nc.Close()
	}
	return c, err
}

// Raw makes a client of nc that has sent nothing: for tests that begin with
// the transmission phase, or with garbage.
func Raw(nc net.Conn) *Client {
	nc.SetDeadline(time.Now().Add(Timeout))
	return &Client{Conn: nc, reads: make(map[uint64]int)}
}

// Greet begins the fixed newstyle handshake on nc.
func Greet(nc net.Conn) (*Client, error) {
	c := Raw(nc)
	hello, err := c.Recv(18)
	if err != nil {
		return nil, err
	}
	if binary.BigEndian.Uint64(hello) != nbd.Magic || binary.BigEndian.Uint64(hello[8:]) != nbd.OptionMagic {
		return nil, fmt.Errorf("server greets with %x", hello)
	}
	return c, c.Send(Uint32(nbd.FlagFixedNewstyle | nbd.FlagNoZeroes))
}

// Send sends the parts, one after the other.
func (c *Client) Send(parts ...[]byte) error {
	c.SetDeadline(time.Now().Add(Timeout))
	_, err := c.Write(bytes.Join(parts, nil))
	return err
}

// Recv receives n bytes.
func (c *Client) Recv(n int) ([]byte, error) {
	c.SetDeadline(time.Now().Add(Timeout))
	p := make([]byte, n)
	_, err := io.ReadFull(c, p)
	return p, err
}

// Ended waits for the server to close the connection, and fails if it sends
// anything before.
func (c *Client) Ended() error {
	p, err := c.Recv(1)
	switch {
	case err == nil:
		return fmt.Errorf("server sent %x, expected the end of the connection", p)
	case err == io.EOF, errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return nil
	}
	return err
}

// Uint16, Uint32, Uint64 and Text are values as they lie on the wire.
func Uint16(v uint16) []byte { return binary.BigEndian.AppendUint16(nil, v) }

// Uint32 is v on the wire.
func Uint32(v uint32) []byte { return binary.BigEndian.AppendUint32(nil, v) }

// Uint64 is v on the wire.
func Uint64(v uint64) []byte { return binary.BigEndian.AppendUint64(nil, v) }

// Text is s behind its 32-bit length.
func Text(s string) []byte { return append(Uint32(uint32(len(s))), s...) }

// An OptionReply is one reply to an option.
type OptionReply struct {
	Type uint32
	Data []byte
}

// SendOption sends an option with the data and waits for nothing.
func (c *Client) SendOption(code uint32, data ...[]byte) error {
	body := bytes.Join(data, nil)
	return c.Send(Uint64(nbd.OptionMagic), Uint32(code), Uint32(uint32(len(body))), body)
}

// OptionReply receives one reply to the option code.
func (c *Client) OptionReply(code uint32) (OptionReply, error) {
	head, err := c.Recv(nbd.OptionReplyHeaderSize)
	if err != nil {
		return OptionReply{}, fmt.Errorf("reply to option %d: %w", code, err)
	}
	if m := binary.BigEndian.Uint64(head); m != nbd.OptionReplyMagic {
		return OptionReply{}, fmt.Errorf("reply to option %d has magic %#x", code, m)
	}
	if o := binary.BigEndian.Uint32(head[8:]); o != code {
		return OptionReply{}, fmt.Errorf("reply to option %d says it is to %d", code, o)
	}
	data, err := c.Recv(int(binary.BigEndian.Uint32(head[16:])))
	return OptionReply{binary.BigEndian.Uint32(head[12:]), data}, err
}

// Option sends an option and returns its replies, of which the last is the
// final one, NBD_REP_ACK or an error.
func (c *Client) Option(code uint32, data ...[]byte) ([]OptionReply, error) {
	if err := c.SendOption(code, data...); err != nil {
		return nil, err
	}
	var replies []OptionReply
	for {
		r, err := c.OptionReply(code)
		if err != nil {
			return replies, err
		}
		replies = append(replies, r)
		if r.Type == nbd.RepAck || r.Type >= 1<<31 {
			return replies, nil
		}
	}
}

// An OptionError is a final error reply to an option.
type OptionError struct {
	Option, Type uint32
	Text         string
}

func (e *OptionError) Error() string {
	return fmt.Sprintf("option %d: error 2^31+%d: %s", e.Option, e.Type-1<<31, e.Text)
}

// accepted is Option for an option that must be acknowledged.
func (c *Client) accepted(code uint32, data ...[]byte) ([]OptionReply, error) {
	replies, err := c.Option(code, data...)
	if err != nil {
		return nil, err
	}
	last := replies[len(replies)-1]
	if last.Type != nbd.RepAck {
		return nil, &OptionError{code, last.Type, string(last.Data)}
	}
	return replies[:len(replies)-1], nil
}

// StructuredReplies negotiates structured replies.
func (c *Client) StructuredReplies() error {
	_, err := c.accepted(nbd.OptStructuredReply)
	c.Structured = c.Structured || err == nil
	return err
}

// ExtendedHeaders negotiates extended headers.
func (c *Client) ExtendedHeaders() error {
	_, err := c.accepted(nbd.OptExtendedHeaders)
	c.Extended = c.Extended || err == nil
	return err
}

// StartTLS negotiates TLS and does its handshake.
func (c *Client) StartTLS(conf *tls.Config) error {
	if _, err := c.accepted(nbd.OptStartTLS); err != nil {
		return err
	}
	secured := tls.Client(c.Conn, conf)
	if err := secured.Handshake(); err != nil {
		return err
	}
	c.Conn, c.Structured, c.Extended = secured, false, false
	return nil
}

// MetaQuery is the data of the options about metadata contexts.
func MetaQuery(export string, queries ...string) []byte {
	data := append(Text(export), Uint32(uint32(len(queries)))...)
	for _, q := range queries {
		data = append(data, Text(q)...)
	}
	return data
}

// SetMetaContexts selects metadata contexts and fills Contexts.
func (c *Client) SetMetaContexts(export string, queries ...string) error {
	replies, err := c.accepted(nbd.OptSetMetaContext, MetaQuery(export, queries...))
	c.Contexts = make(map[uint32]string)
	for _, r := range replies {
		c.Contexts[binary.BigEndian.Uint32(r.Data)] = string(r.Data[4:])
	}
	return err
}

// InfoQuery is the data of NBD_OPT_INFO and NBD_OPT_GO.
func InfoQuery(export string, infos ...uint16) []byte {
	data := append(Text(export), Uint16(uint16(len(infos)))...)
	for _, i := range infos {
		data = append(data, Uint16(i)...)
	}
	return data
}

// InfoOf asks for information with NBD_OPT_INFO.
func (c *Client) InfoOf(export string, infos ...uint16) error {
	return c.info(nbd.OptInfo, export, infos...)
}

// Go enters the transmission phase.
func (c *Client) Go(export string, infos ...uint16) error {
	return c.info(nbd.OptGo, export, infos...)
}

func (c *Client) info(code uint32, export string, infos ...uint16) error {
	replies, err := c.accepted(code, InfoQuery(export, infos...))
	if err != nil {
		return err
	}
	c.Info = make(map[uint16][]byte)
	for _, r := range replies {
		if r.Type != nbd.RepInfo || len(r.Data) < 2 {
			return fmt.Errorf("option %d: reply of type %d and %d bytes", code, r.Type, len(r.Data))
		}
		c.Info[binary.BigEndian.Uint16(r.Data)] = r.Data[2:]
	}
	about := c.Info[nbd.InfoExport]
	if len(about) != 10 {
		return fmt.Errorf("option %d: NBD_INFO_EXPORT has %d bytes", code, len(about))
	}
	c.Size = int64(binary.BigEndian.Uint64(about))
	c.Flags = binary.BigEndian.Uint16(about[8:])
	return nil
}

// ExportName enters the transmission phase the old way.
func (c *Client) ExportName(export string) error {
	if err := c.SendOption(nbd.OptExportName, []byte(export)); err != nil {
		return err
	}
	about, err := c.Recv(10)
	if err != nil {
		return err
	}
	c.Size = int64(binary.BigEndian.Uint64(about))
	c.Flags = binary.BigEndian.Uint16(about[8:])
	return nil
}
