// Package nbdview reads a device through its NBD server: its bytes as a
// block.Reader, and which of them come from the overlay. It is the client of
// the verbs that look into a running server; it writes nothing.
//
// Requests go one after another over one connection. A server that does not
// answer for Timeout ends the view with an error.
package nbdview

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/cowdev/cowdev/block"
	"github.com/cowdev/cowdev/internal/nbd"
)

// Timeout is how long the server may be silent when it has to answer.
const Timeout = 60 * time.Second

// maxRead is the longest READ that every server must take, in bytes.
const maxRead = 32 << 20

// maxReply bounds what is taken of a server's word on lengths but for READ.
const maxReply = 16 << 20

// sourceContext is the metadata context in which our server tells a
// block.State.
const sourceContext = "cowdev:source"

// ErrProtocol says that the server does not keep to the protocol.
var ErrProtocol = errors.New("unexpected answer of the NBD server")

// A View is a connection to a server. It may be used by several goroutines.
type View struct {
	size   int64
	source uint32 // the id of sourceContext; 0 where the server has none

	mu     sync.Mutex
	conn   net.Conn
	cookie uint64
	broken error // after which nothing is sent
}

var _ block.Reader = (*View)(nil)

// IsAddress reports whether a command's argument names a server: an NBD URI,
// or with isSocket saying so of a path, a unix socket.
func IsAddress(arg string, isSocket func(path string) bool) bool {
	return strings.HasPrefix(arg, "nbd://") || strings.HasPrefix(arg, "nbd+unix://") ||
		strings.HasPrefix(arg, "nbds://") || strings.HasPrefix(arg, "nbds+unix://") || isSocket(arg)
}

// Dial connects to the server at an NBD URI or the path of a unix socket.
func Dial(address string) (*View, error) {
	network, at, export, err := parse(address)
	if err != nil {
		return nil, err
	}
	conn, err := net.DialTimeout(network, at, Timeout)
	if err != nil {
		return nil, err
	}
	v := &View{conn: conn}
	if err := v.greet(export); err != nil {
		conn.Close()
		return nil, fmt.Errorf("%s: %w", address, err)
	}
	return v, nil
}

// parse takes an address apart.
func parse(address string) (network, at, export string, err error) {
	if !strings.Contains(address, "://") {
		return "unix", address, "", nil
	}
	u, err := url.Parse(address)
	if err != nil {
		return "", "", "", fmt.Errorf("%s: not an NBD URI: %w", address, err)
	}
	export = strings.TrimPrefix(u.Path, "/")
	switch u.Scheme {
	case "nbd":
		if at = u.Host; u.Port() == "" {
			at = net.JoinHostPort(u.Hostname(), "10809")
		}
		return "tcp", at, export, nil
	case "nbd+unix":
		if at, err = parameter(u.RawQuery, "socket"); err != nil {
			return "", "", "", fmt.Errorf("%s: not an NBD URI: %w", address, err)
		}
		if at == "" {
			return "", "", "", fmt.Errorf("%s: the URI names no socket, expected ?socket=PATH", address)
		}
		return "unix", at, export, nil
	}
	return "", "", "", fmt.Errorf("%s: expected a URI nbd:// or nbd+unix://; TLS is not spoken here", address)
}

// parameter returns the value of the first parameter of that name, or nothing.
// Unlike in a form, a + is itself.
func parameter(query, name string) (string, error) {
	for pair := range strings.SplitSeq(query, "&") {
		if key, value, _ := strings.Cut(pair, "="); key == name {
			return url.PathUnescape(value)
		}
	}
	return "", nil
}

// Size returns the device's bytes.
func (v *View) Size() int64 { return v.size }

// Close ends the connection.
func (v *View) Close() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.broken == nil {
		_ = v.send(v.request(nbd.CmdDisc, 0, 0))
		v.broken = net.ErrClosed
	}
	return v.conn.Close()
}

// greet does the handshake up to the transmission phase.
func (v *View) greet(export string) error {
	head := make([]byte, 18)
	if err := v.recv(head); err != nil {
		return err
	}
	be := binary.BigEndian
	if be.Uint64(head) != nbd.Magic || be.Uint64(head[8:]) != nbd.OptionMagic {
		return fmt.Errorf("%w: no fixed newstyle greeting", ErrProtocol)
	}
	if be.Uint16(head[16:])&nbd.FlagFixedNewstyle == 0 {
		return fmt.Errorf("%w: the server speaks old newstyle only", ErrProtocol)
	}
	if err := v.send(be.AppendUint32(nil, nbd.FlagFixedNewstyle)); err != nil {
		return err
	}
	if _, err := v.option(nbd.OptStructuredReply, nil); err != nil {
		return fmt.Errorf("ask for structured replies: %w", err)
	}
	query := appendText(nil, export)
	query = appendText(be.AppendUint32(query, 1), sourceContext)
	replies, err := v.option(nbd.OptSetMetaContext, query)
	if err != nil && !errors.As(err, new(refused)) {
		return err
	}
	for _, r := range replies {
		if r.typ == nbd.RepMetaContext && len(r.data) > 4 && string(r.data[4:]) == sourceContext {
			v.source = be.Uint32(r.data)
		}
	}
	replies, err = v.option(nbd.OptGo, be.AppendUint16(appendText(nil, export), 0))
	if err != nil {
		return fmt.Errorf("open export %q: %w", export, err)
	}
	for _, r := range replies {
		if r.typ == nbd.RepInfo && len(r.data) >= 12 && be.Uint16(r.data) == nbd.InfoExport {
			v.size = int64(be.Uint64(r.data[2:]))
			return nil
		}
	}
	return fmt.Errorf("%w: the server tells no size", ErrProtocol)
}

func appendText(b []byte, s string) []byte {
	return append(binary.BigEndian.AppendUint32(b, uint32(len(s))), s...)
}

// optionReply is a reply to an option.
type optionReply struct {
	typ  uint32
	data []byte
}

// refused is an error reply to an option.
type refused struct{ reply optionReply }

func (r refused) Error() string {
	if len(r.reply.data) > 0 {
		return fmt.Sprintf("refused by the server: %s", r.reply.data)
	}
	return fmt.Sprintf("refused by the server with reply %#x", r.reply.typ)
}

// option sends an option and returns its replies but for the last.
func (v *View) option(code uint32, data []byte) ([]optionReply, error) {
	be := binary.BigEndian
	msg := be.AppendUint32(be.AppendUint64(nil, nbd.OptionMagic), code)
	msg = append(be.AppendUint32(msg, uint32(len(data))), data...)
	if err := v.send(msg); err != nil {
		return nil, err
	}
	var replies []optionReply
	for range 1000 {
		head := make([]byte, nbd.OptionReplyHeaderSize)
		if err := v.recv(head); err != nil {
			return nil, err
		}
		r := optionReply{typ: be.Uint32(head[12:])}
		n := be.Uint32(head[16:])
		if be.Uint64(head) != nbd.OptionReplyMagic || be.Uint32(head[8:]) != code || n > maxReply {
			return nil, fmt.Errorf("%w: a bad reply to option %d", ErrProtocol, code)
		}
		r.data = make([]byte, n)
		if err := v.recv(r.data); err != nil {
			return nil, err
		}
		switch {
		case r.typ == nbd.RepAck:
			return replies, nil
		case r.typ>>31 != 0:
			return nil, refused{r}
		}
		replies = append(replies, r)
	}
	return nil, fmt.Errorf("%w: no end of replies to option %d", ErrProtocol, code)
}

// ReadAt implements block.Reader.
func (v *View) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, syscall.EINVAL
	}
	n := int(min(int64(len(p)), max(v.size-off, 0)))
	v.mu.Lock()
	defer v.mu.Unlock()
	for done := 0; done < n; {
		piece := p[done:min(done+maxRead, n)]
		if err := v.read(piece, off+int64(done)); err != nil {
			return done, fmt.Errorf("read %d bytes at %d over NBD: %w", len(piece), off+int64(done), err)
		}
		done += len(piece)
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// read is one READ; mu is held.
func (v *View) read(p []byte, off int64) error {
	left := len(p) // bytes that no chunk brought yet
	err := v.command(nbd.CmdRead, off, uint32(len(p)), func(typ uint16, n uint32) error {
		if typ != nbd.ReplyOffsetData && typ != nbd.ReplyOffsetHole {
			return fmt.Errorf("%w: chunk of type %d in answer to a READ", ErrProtocol, typ)
		}
		head := make([]byte, 8)
		if typ == nbd.ReplyOffsetHole {
			head = make([]byte, 12)
		}
		if int(n) < len(head) {
			return fmt.Errorf("%w: a chunk of %d bytes", ErrProtocol, n)
		}
		if err := v.recv(head); err != nil {
			return err
		}
		at, size := int64(binary.BigEndian.Uint64(head))-off, int64(n)-8
		if typ == nbd.ReplyOffsetHole {
			size = int64(binary.BigEndian.Uint32(head[8:]))
		}
		if at < 0 || size <= 0 || at > int64(len(p)) || size > int64(len(p))-at {
			return fmt.Errorf("%w: data outside the READ", ErrProtocol)
		}
		left -= int(size)
		if typ == nbd.ReplyOffsetHole {
			clear(p[at : at+size])
			return nil
		}
		return v.recv(p[at : at+size])
	})
	if err == nil && left != 0 {
		return v.fail(fmt.Errorf("%w: %d bytes of a READ are missing", ErrProtocol, left))
	}
	return err
}

// Stored returns the extents that come from the overlay, stored or zero,
// ascending. It wants a server of cowdev.
func (v *View) Stored() ([]block.Extent, error) {
	if v.source == 0 {
		return nil, fmt.Errorf("this NBD server does not tell where bytes come from, expected one of cowdev")
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	var out []block.Extent
	for off := int64(0); off < v.size; {
		extents, err := v.status(off)
		if err != nil {
			return nil, fmt.Errorf("ask for the extents at %d over NBD: %w", off, err)
		}
		for _, e := range extents {
			if off = e.End(); e.State == block.FromBase {
				continue
			}
			if last := len(out) - 1; last >= 0 && out[last].End() == e.Off && out[last].State == e.State {
				out[last].N += e.N
				continue
			}
			out = append(out, e)
		}
	}
	return out, nil
}

// status is one BLOCK_STATUS from off on; mu is held.
func (v *View) status(off int64) ([]block.Extent, error) {
	const most = 1<<32 - 1<<20 // a multiple of any block size
	var out []block.Extent
	n := uint32(min(most, v.size-off))
	at := off
	err := v.command(nbd.CmdBlockStatus, off, n, func(typ uint16, n uint32) error {
		if typ != nbd.ReplyBlockStatus || n%8 != 4 || n > maxReply {
			return fmt.Errorf("%w: chunk of type %d and %d bytes in answer to a BLOCK_STATUS", ErrProtocol, typ, n)
		}
		b := make([]byte, n)
		if err := v.recv(b); err != nil {
			return err
		}
		if binary.BigEndian.Uint32(b) != v.source {
			return nil
		}
		for b = b[4:]; len(b) > 0 && at < v.size; b = b[8:] {
			size := min(int64(binary.BigEndian.Uint32(b)), v.size-at)
			out = append(out, block.Extent{Off: at, N: size, State: block.State(binary.BigEndian.Uint32(b[4:]) & 0xff)})
			at += size
		}
		return nil
	})
	if err == nil && at == off {
		err = v.fail(fmt.Errorf("%w: a BLOCK_STATUS without extents", ErrProtocol))
	}
	return out, err
}

// request returns a request message with the next cookie.
func (v *View) request(typ uint16, off int64, n uint32) []byte {
	be := binary.BigEndian
	v.cookie++
	msg := be.AppendUint16(be.AppendUint32(nil, nbd.RequestMagic), 0)
	msg = be.AppendUint64(be.AppendUint16(msg, typ), v.cookie)
	return be.AppendUint32(be.AppendUint64(msg, uint64(off)), n)
}

// command sends a request and hands the chunks of its reply to chunk, which
// receives their payload of n bytes; mu is held. An error that the server
// reports is returned when the reply is over; any other ends the view.
func (v *View) command(typ uint16, off int64, n uint32, chunk func(typ uint16, n uint32) error) error {
	if v.broken != nil {
		return v.broken
	}
	if err := v.send(v.request(typ, off, n)); err != nil {
		return v.fail(err)
	}
	var reported error
	for {
		flags, typ, n, err := v.chunkHead()
		switch {
		case err != nil:
			return v.fail(err)
		case typ>>15 != 0:
			if reported, err = v.errorChunk(n); err != nil {
				return v.fail(err)
			}
		case typ == nbd.ReplyNone && n == 0:
		default:
			if err := chunk(typ, n); err != nil {
				return v.fail(err)
			}
		}
		if flags&nbd.ReplyFlagDone != 0 {
			return reported
		}
	}
}

// chunkHead receives a chunk's header.
func (v *View) chunkHead() (flags, typ uint16, n uint32, err error) {
	be := binary.BigEndian
	b := make([]byte, nbd.StructuredReplyHeaderSize)
	if err := v.recv(b[:nbd.SimpleReplySize]); err != nil {
		return 0, 0, 0, err
	}
	if be.Uint32(b) != nbd.StructuredReplyMagic || be.Uint64(b[8:]) != v.cookie {
		return 0, 0, 0, fmt.Errorf("%w: a reply that is not structured, or to another request", ErrProtocol)
	}
	err = v.recv(b[nbd.SimpleReplySize:])
	return be.Uint16(b[4:]), be.Uint16(b[6:]), be.Uint32(b[16:]), err
}

// errorChunk receives the payload of an error chunk.
func (v *View) errorChunk(n uint32) (reported, err error) {
	if n < 6 || n > maxReply {
		return nil, fmt.Errorf("%w: an error of %d bytes", ErrProtocol, n)
	}
	b := make([]byte, n)
	if err := v.recv(b); err != nil {
		return nil, err
	}
	reported = syscall.Errno(binary.BigEndian.Uint32(b))
	if text := b[6:min(int(n), 6+int(binary.BigEndian.Uint16(b[4:])))]; len(text) > 0 {
		reported = fmt.Errorf("%w: %s", reported, text)
	}
	return reported, nil
}

// fail makes err the end of the view.
func (v *View) fail(err error) error {
	v.broken = err
	return err
}

func (v *View) send(b []byte) error {
	if err := v.conn.SetDeadline(time.Now().Add(Timeout)); err != nil {
		return err
	}
	_, err := v.conn.Write(b)
	return err
}

func (v *View) recv(b []byte) error {
	if err := v.conn.SetDeadline(time.Now().Add(Timeout)); err != nil {
		return err
	}
	_, err := io.ReadFull(v.conn, b)
	return err
}
