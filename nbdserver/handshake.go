package nbdserver

import (
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"runtime"
	"time"

	"github.com/cowdev/cowdev/internal/nbd"
)

// Limits of the handshake.
const (
	maxOptionData = 64 << 10 // bytes of an option's data that are looked at; more is drained
	maxOptions    = 128      // options that a client may send
)

// maxDrain is how much data, of an option or of a write, is read and thrown
// away so that it can be answered; a client that announces more is cut off.
const maxDrain = 64 << 20

// A session is what the handshake agreed on.
type session struct {
	export     *Export
	structured bool
	extended   bool
	contexts   contexts
}

// replyHeaders says whether replies come in chunks.
func (n *session) chunked() bool { return n.structured || n.extended }

// transmissionFlags returns what the export can do for this client.
func (n *session) transmissionFlags(e *Export) uint16 {
	flags := e.TransmissionFlags()
	if n.chunked() {
		flags |= nbd.FlagSendDF
	}
	if n.extended && n.contexts != 0 {
		flags |= nbd.FlagBlockStatusPayload
	}
	return flags
}

// errGoodbye ends a connection that the client asked to end.
var errGoodbye = errors.New("the client ended the session")

// A handshake is the first phase of a connection: the client sends options,
// each is answered, until one leads to the transmission phase.
type handshake struct {
	c        *conn
	fixed    bool // the client understands replies to options
	noZeroes bool
	secure   bool // TLS is running

	agreed     session
	contextsOf string // the export name that agreed.contexts were set for
}

// handshakeAndServe is the life of a connection.
func (c *conn) handshakeAndServe() error {
	agreed, err := c.handshake()
	if err != nil {
		if err != errGoodbye {
			c.srv.count.handshakesFailed.Add(1)
		}
		return err
	}
	return c.transmission(*agreed)
}

func (c *conn) handshake() (*session, error) {
	if d := c.srv.cfg.HandshakeTimeout; d > 0 {
		c.setDeadline(time.Now().Add(d))
		defer c.setDeadline(time.Time{})
	}
	h := &handshake{c: c}
	if err := h.greet(); err != nil {
		return nil, err
	}
	for range maxOptions {
		runtime.Gosched() // others have their turn, though options come without end
		done, err := h.option()
		if err != nil {
			return nil, err
		}
		if done {
			return &h.agreed, nil
		}
		if err := c.slowDown(optionPrice); err != nil {
			return nil, err
		}
	}
	return nil, fmt.Errorf("handshake: %d options and still no export chosen", maxOptions)
}

func (h *handshake) greet() error {
	var hello [18]byte
	binary.BigEndian.PutUint64(hello[0:], nbd.Magic)
	binary.BigEndian.PutUint64(hello[8:], nbd.OptionMagic)
	binary.BigEndian.PutUint16(hello[16:], nbd.FlagFixedNewstyle|nbd.FlagNoZeroes)
	if _, err := h.c.nc.Write(hello[:]); err != nil {
		return fmt.Errorf("handshake: %w", err)
	}
	var reply [4]byte
	if _, err := io.ReadFull(h.c.nc, reply[:]); err != nil {
		return h.ended(err)
	}
	flags := binary.BigEndian.Uint32(reply[:])
	if flags&^(nbd.FlagFixedNewstyle|nbd.FlagNoZeroes) != 0 {
		return fmt.Errorf("handshake: client flags %#x, expected none but %#x", flags, nbd.FlagFixedNewstyle|nbd.FlagNoZeroes)
	}
	h.fixed = flags&nbd.FlagFixedNewstyle != 0
	h.noZeroes = flags&nbd.FlagNoZeroes != 0
	return nil
}

// ended turns an end of the stream between two options into a goodbye: it is
// what a client that only looked does.
func (h *handshake) ended(err error) error {
	if err == io.EOF {
		return errGoodbye
	}
	return fmt.Errorf("handshake: %w", err)
}

// option reads one option and answers it. It reports whether the transmission
// phase begins.
func (h *handshake) option() (done bool, err error) {
	var head [nbd.OptionHeaderSize]byte
	if _, err := io.ReadFull(h.c.nc, head[:]); err != nil {
		return false, h.ended(err)
	}
	if m := binary.BigEndian.Uint64(head[0:]); m != nbd.OptionMagic {
		return false, fmt.Errorf("handshake: option with magic %#x, expected %#x", m, uint64(nbd.OptionMagic))
	}
	opt := option{
		h:    h,
		code: binary.BigEndian.Uint32(head[8:]),
	}
	n := binary.BigEndian.Uint32(head[12:])
	if opt.code == nbd.OptSetMetaContext { // replaces the former choice also where it fails
		h.agreed.contexts, h.contextsOf = 0, ""
	}
	if refusal := h.refuse(opt.code, n); refusal != nil {
		return false, h.refused(&opt, n, refusal)
	}
	if opt.code == nbd.OptAbort { // whose data, as much as it may be, says nothing
		if err := h.drain(opt.code, n); err != nil {
			return false, err
		}
		return opt.handle()
	}
	// The buffer grows as the data comes, so that a client that only
	// announces it costs nothing.
	var data bytes.Buffer
	if _, err := io.CopyN(&data, h.c.nc, int64(n)); err != nil {
		return false, fmt.Errorf("handshake: data of option %d: %w", opt.code, err)
	}
	opt.data = data.Bytes()
	return opt.handle()
}

// refusal is an error reply to an option.
type refusal struct {
	code uint32
	text string
}

// refuse returns why an option is not even looked at, or nil.
func (h *handshake) refuse(code, n uint32) *refusal {
	forced := h.c.srv.cfg.TLS == TLSRequire && !h.secure
	switch {
	case code == nbd.OptAbort:
		return nil
	case forced && !h.fixed: // for such a client there is no TLS, so it must not be told to use it
		return &refusal{nbd.RepErrPolicy, "this server talks by TLS only, which needs fixed newstyle negotiation"}
	case forced && code != nbd.OptStartTLS:
		return &refusal{nbd.RepErrTLSReqd, "this server talks by TLS only"}
	case h.c.stopping.Load():
		return &refusal{nbd.RepErrShutdown, "the server is shutting down"}
	case n > maxOptionData && !known(code):
		return refusalUnknown
	case n > maxOptionData:
		return &refusal{nbd.RepErrTooBig, "the option has too much data"}
	}
	return nil
}

// refused answers an option with r after throwing away its n bytes of data.
func (h *handshake) refused(opt *option, n uint32, r *refusal) error {
	if opt.code == nbd.OptExportName { // has no error reply
		return fmt.Errorf("handshake: NBD_OPT_EXPORT_NAME: %s", r.text)
	}
	if err := h.drain(opt.code, n); err != nil {
		return err
	}
	return opt.fail(r)
}

func (h *handshake) drain(code, n uint32) error {
	if n > maxDrain {
		return fmt.Errorf("handshake: option %d with %d bytes of data, expected at most %d", code, n, maxDrain)
	}
	if _, err := io.CopyN(io.Discard, h.c.nc, int64(n)); err != nil {
		return fmt.Errorf("handshake: data of option %d: %w", code, err)
	}
	return nil
}

// startTLS answers NBD_OPT_STARTTLS. What was agreed in plain text is forgotten.
func (h *handshake) startTLS(opt *option) error {
	srv := h.c.srv
	switch {
	case srv.cfg.TLS == TLSOff:
		return opt.fail(&refusal{nbd.RepErrPolicy, "this server has no TLS"})
	case h.secure:
		return opt.fail(&refusal{nbd.RepErrInvalid, "TLS is running already"})
	case !h.fixed:
		return opt.fail(&refusal{nbd.RepErrPolicy, "TLS needs fixed newstyle negotiation"})
	case len(opt.data) != 0:
		return opt.fail(&refusal{nbd.RepErrInvalid, "NBD_OPT_STARTTLS has no data"})
	}
	conf, err := srv.cfg.TLSConfig()
	if err != nil {
		srv.log.printf("TLS for %s: %v", h.c.peer, err)
		return opt.fail(&refusal{nbd.RepErrPlatform, "the server's certificates cannot be used"})
	}
	if err := opt.ack(); err != nil {
		return err
	}
	secured := tls.Server(h.c.nc, conf)
	if err := secured.Handshake(); err != nil {
		return fmt.Errorf("handshake: TLS: %w", err)
	}
	h.c.upgrade(secured)
	h.secure = true
	h.agreed, h.contextsOf = session{}, ""
	return nil
}
