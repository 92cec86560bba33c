package nbdserver

import (
	"encoding/binary"
	"fmt"

	"github.com/cowdev/cowdev/internal/nbd"
)

// The size constraints, as NBD_INFO_BLOCK_SIZE tells them.
const (
	minBlock       = 1
	preferredBlock = 4096
	maxPayload     = 32 << 20
)

// A request is a request message without its payload.
type request struct {
	flags  uint16
	kind   uint16 // NBD_CMD_…
	cookie uint64
	off    int64  // after check: inside the device
	n      int64  // after check: inside the device
	rawOff uint64 // as the client sent it: extended replies repeat it
	length uint64 // as the client sent it
}

// headerSize returns the bytes of a request message without its payload.
func (n *session) headerSize() int {
	if n.extended {
		return nbd.ExtendedRequestHeaderSize
	}
	return nbd.RequestHeaderSize
}

// checkMagic returns an error if p is not the beginning of a request, after
// which nothing that follows can be understood.
func (n *session) checkMagic(p []byte) error {
	expected := uint32(nbd.RequestMagic)
	if n.extended {
		expected = nbd.ExtendedRequestMagic
	}
	if len(p) >= 4 && binary.BigEndian.Uint32(p) != expected {
		return fmt.Errorf("request with magic %#x, expected %#x", binary.BigEndian.Uint32(p), expected)
	}
	return nil
}

// decode reads the request message at the beginning of p, which holds at
// least headerSize bytes.
func (n *session) decode(p []byte, r *request) error {
	if err := n.checkMagic(p); err != nil {
		return err
	}
	if n.extended {
		r.length = binary.BigEndian.Uint64(p[24:32])
	} else {
		r.length = uint64(binary.BigEndian.Uint32(p[24:28]))
	}
	r.flags = binary.BigEndian.Uint16(p[4:])
	r.kind = binary.BigEndian.Uint16(p[6:])
	r.cookie = binary.BigEndian.Uint64(p[8:])
	r.rawOff = binary.BigEndian.Uint64(p[16:])
	return nil
}

// payload returns how many bytes follow the request message.
func (n *session) payload(r *request) uint64 {
	if n.extended && r.flags&nbd.CmdFlagPayloadLen != 0 || !n.extended && r.kind == nbd.CmdWrite {
		return r.length
	}
	return 0
}

// validFlags returns the command flags that the specification allows with a
// request. FUA is allowed with all of them.
func (n *session) validFlags(kind uint16) uint16 {
	flags := uint16(nbd.CmdFlagFUA)
	switch kind {
	case nbd.CmdRead:
		if n.chunked() {
			flags |= nbd.CmdFlagDF
		}
	case nbd.CmdWrite:
		if n.extended {
			flags |= nbd.CmdFlagPayloadLen
		}
	case nbd.CmdWriteZeroes:
		flags |= nbd.CmdFlagNoHole | nbd.CmdFlagFastZero
	case nbd.CmdBlockStatus:
		flags |= nbd.CmdFlagReqOne
		if n.extended {
			flags |= nbd.CmdFlagPayloadLen
		}
	}
	return flags
}

// check returns why r cannot be done, or nil. The range that the request
// means is then r.off and r.n, inside the device; that of a block status with
// a payload is known only when the payload is (checkRange).
func (n *session) check(r *request) *failure {
	if r.kind > nbd.CmdBlockStatus || r.kind == nbd.CmdDisc {
		return errUnknownCmd
	}
	if r.flags&^n.validFlags(r.kind) != 0 {
		return errBadFlag
	}
	switch r.kind {
	case nbd.CmdFlush:
		if r.rawOff != 0 || r.length != 0 {
			return errBadFlush
		}
		return nil
	case nbd.CmdWrite:
		if n.extended && r.flags&nbd.CmdFlagPayloadLen == 0 {
			return errNoPayload
		}
		if r.length > maxPayload {
			return errWriteTooLong
		}
		if n.export.Device.ReadOnly() {
			return errReadOnly
		}
	case nbd.CmdTrim, nbd.CmdWriteZeroes:
		if n.export.Device.ReadOnly() {
			return errReadOnly
		}
	case nbd.CmdBlockStatus:
		if n.contexts == 0 {
			return errNoContext
		}
		if r.flags&nbd.CmdFlagPayloadLen != 0 {
			return nil
		}
	}
	return n.checkRange(r, r.length)
}

// checkRange sets the range of r, of length bytes, or returns why it cannot be.
func (n *session) checkRange(r *request, length uint64) *failure {
	size := uint64(n.export.Device.Size())
	if r.rawOff > size || length > size-r.rawOff {
		if r.kind == nbd.CmdWrite || r.kind == nbd.CmdWriteZeroes {
			return errNoSpacePast
		}
		return errPastEnd
	}
	r.off, r.n = int64(r.rawOff), int64(length)
	switch {
	case r.kind == nbd.CmdRead && length > maxPayload:
		return errReadTooLong
	case r.kind == nbd.CmdBlockStatus && length == 0:
		return errEmptyStatus
	}
	return nil
}
