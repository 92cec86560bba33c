package nbdserver

import (
	"encoding/binary"

	"github.com/cowdev/cowdev/internal/nbd"
)

// maxReplyHeader is the most that a reply takes without the bytes of a READ
// or a BLOCK_STATUS: an extended error chunk with an offset and its text.
const maxReplyHeader = 256

// appendChunk appends the header of a reply chunk of length bytes.
func (n *session) appendChunk(dst []byte, r *request, flags, kind uint16, length int) []byte {
	if n.extended {
		dst = binary.BigEndian.AppendUint32(dst, nbd.ExtendedReplyMagic)
		dst = binary.BigEndian.AppendUint16(dst, flags)
		dst = binary.BigEndian.AppendUint16(dst, kind)
		dst = binary.BigEndian.AppendUint64(dst, r.cookie)
		dst = binary.BigEndian.AppendUint64(dst, r.rawOff)
		return binary.BigEndian.AppendUint64(dst, uint64(length))
	}
	dst = binary.BigEndian.AppendUint32(dst, nbd.StructuredReplyMagic)
	dst = binary.BigEndian.AppendUint16(dst, flags)
	dst = binary.BigEndian.AppendUint16(dst, kind)
	dst = binary.BigEndian.AppendUint64(dst, r.cookie)
	return binary.BigEndian.AppendUint32(dst, uint32(length))
}

func appendSimple(dst []byte, r *request, code uint32) []byte {
	dst = binary.BigEndian.AppendUint32(dst, nbd.SimpleReplyMagic)
	dst = binary.BigEndian.AppendUint32(dst, code)
	return binary.BigEndian.AppendUint64(dst, r.cookie)
}

// appendSuccess appends the whole reply to a request that went well and is
// answered with nothing more. A simple reply will do for all but READ and
// BLOCK_STATUS where replies are not extended.
func (n *session) appendSuccess(dst []byte, r *request) []byte {
	data := r.kind == nbd.CmdRead || r.kind == nbd.CmdBlockStatus
	if n.extended || n.structured && data {
		return n.appendChunk(dst, r, nbd.ReplyFlagDone, nbd.ReplyNone, 0)
	}
	return appendSimple(dst, r, 0)
}

// appendData appends what comes before size bytes of data of a READ that lie
// at off. In a session without chunks it is the beginning of the whole reply,
// and size is all that was asked for.
func (n *session) appendData(dst []byte, r *request, flags uint16, off int64, size int) []byte {
	if !n.chunked() {
		return appendSimple(dst, r, 0)
	}
	dst = n.appendChunk(dst, r, flags, nbd.ReplyOffsetData, 8+size)
	return binary.BigEndian.AppendUint64(dst, uint64(off))
}

// appendHole appends a whole chunk that says that size bytes at off are zero.
func (n *session) appendHole(dst []byte, r *request, flags uint16, off int64, size int) []byte {
	dst = n.appendChunk(dst, r, flags, nbd.ReplyOffsetHole, 12)
	dst = binary.BigEndian.AppendUint64(dst, uint64(off))
	return binary.BigEndian.AppendUint32(dst, uint32(size))
}

// appendFailure appends the chunk or simple reply that ends a request with f.
func (n *session) appendFailure(dst []byte, r *request, f *failure) []byte {
	if !n.chunked() {
		return appendSimple(dst, r, f.code)
	}
	dst = n.appendChunk(dst, r, nbd.ReplyFlagDone, nbd.ReplyError, 6+len(f.text))
	return appendErrorText(dst, f)
}

// appendFailureAt is appendFailure of a READ of which the bytes before off
// are known to be good. Only for sessions with chunks.
func (n *session) appendFailureAt(dst []byte, r *request, f *failure, off int64) []byte {
	dst = n.appendChunk(dst, r, nbd.ReplyFlagDone, nbd.ReplyErrorOffset, 6+len(f.text)+8)
	dst = appendErrorText(dst, f)
	return binary.BigEndian.AppendUint64(dst, uint64(off))
}

func appendErrorText(dst []byte, f *failure) []byte {
	dst = binary.BigEndian.AppendUint32(dst, f.code)
	dst = binary.BigEndian.AppendUint16(dst, uint16(len(f.text)))
	return append(dst, f.text...)
}
