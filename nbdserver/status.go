package nbdserver

import (
	"encoding/binary"

	"github.com/cowdev/cowdev/block"
	"github.com/cowdev/cowdev/internal/nbd"
)

// maxExtents is how many extents of the device one BLOCK_STATUS looks at. A
// client that wants more asks again behind the last.
const maxExtents = 2048

// statusBytes is the memory that one BLOCK_STATUS may take: the extents, and
// for each context their runs and the descriptors of the reply.
const statusBytes = maxExtents * (32 + 2*(16+16))

// maxExtentsOne is the same for REQ_ONE: enough to see most runs that differ
// in one context only as the one extent that they are in the other.
const maxExtentsOne = 64

// parseFilter takes apart the payload of a BLOCK_STATUS: the length that is
// meant and ids of contexts, all of them among chosen and none twice.
func parseFilter(payload []byte, chosen contexts) (length uint64, wanted contexts, ok bool) {
	if len(payload) < 12 || len(payload)%4 != 0 {
		return 0, 0, false
	}
	length = binary.BigEndian.Uint64(payload)
	for ids := payload[8:]; len(ids) > 0; ids = ids[4:] {
		one := contextOf(binary.BigEndian.Uint32(ids))
		if one == 0 || one&chosen == 0 || one&wanted != 0 {
			return 0, 0, false
		}
		wanted |= one
	}
	return length, wanted, true
}

// blockStatus answers a BLOCK_STATUS: a chunk for each context.
func (j *job) blockStatus() error {
	limit := maxExtents
	if j.req.flags&nbd.CmdFlagReqOne != 0 {
		limit = maxExtentsOne
	}
	var extents []block.Extent
	err := j.inDevice(func(d block.Device) (err error) {
		extents, err = d.Extents(j.req.off, j.req.n, limit)
		return err
	})
	if err != nil {
		return j.fail(err)
	}
	var reply []byte
	left := j.contexts.count()
	for i := range contextNames {
		if !j.contexts.has(i) {
			continue
		}
		left--
		var flags uint16
		if left == 0 {
			flags = nbd.ReplyFlagDone
		}
		reply = j.appendStatus(reply, flags, i, extents)
	}
	return j.send(reply, nil)
}

// appendStatus appends the chunk of context i.
func (j *job) appendStatus(dst []byte, flags uint16, i int, extents []block.Extent) []byte {
	runs := statusRuns(i, extents)
	if j.req.flags&nbd.CmdFlagReqOne != 0 {
		runs = runs[:1]
	}
	if j.c.extended {
		dst = j.c.appendChunk(dst, &j.req, flags, nbd.ReplyBlockStatusExt, 8+16*len(runs))
		dst = binary.BigEndian.AppendUint32(dst, contextID(i))
		dst = binary.BigEndian.AppendUint32(dst, uint32(len(runs)))
	} else {
		dst = j.c.appendChunk(dst, &j.req, flags, nbd.ReplyBlockStatus, 4+8*len(runs))
		dst = binary.BigEndian.AppendUint32(dst, contextID(i))
	}
	for _, run := range runs {
		if j.c.extended {
			dst = binary.BigEndian.AppendUint64(dst, uint64(run.n))
			dst = binary.BigEndian.AppendUint64(dst, uint64(run.status))
		} else {
			// A request without extended headers, and so n, fits 32 bits.
			dst = binary.BigEndian.AppendUint32(dst, uint32(run.n))
			dst = binary.BigEndian.AppendUint32(dst, run.status)
		}
	}
	return dst
}

// A statusRun is a descriptor of a BLOCK_STATUS reply.
type statusRun struct {
	n      int64
	status uint32
}

// statusRuns returns what context i says of extents, which follow one another:
// neighbours of one status are one run.
func statusRuns(i int, extents []block.Extent) []statusRun {
	var runs []statusRun
	for k := range extents {
		status := contextStatus(i, &extents[k])
		if last := len(runs) - 1; last >= 0 && runs[last].status == status {
			runs[last].n += extents[k].N
			continue
		}
		runs = append(runs, statusRun{extents[k].N, status})
	}
	return runs
}
