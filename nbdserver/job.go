package nbdserver

import (
	"fmt"
	"io"
	"sync"

	"github.com/cowdev/cowdev/block"
	"github.com/cowdev/cowdev/internal/nbd"
	"golang.org/x/sys/unix"
)

// readPiece is the most of a READ that a worker holds in memory at once.
const readPiece = 1 << 20

// A job is a request that a worker does and answers.
type job struct {
	c         *conn
	req       request
	flushOnly bool       // the change of a request with FUA is done; or a FLUSH
	contexts  contexts   // of a BLOCK_STATUS
	buf       *buffer    // payload of a WRITE
	bytes     int        // that the connection counts for it
	group     *coldGroup // the READs that it shares with other jobs, or nil

	head [maxReplyHeader]byte
	vecs [2][]byte
	iov  []unix.Iovec
}

var jobs = sync.Pool{New: func() any { return &job{iov: make([]unix.Iovec, 0, 2)} }}

func newJob(c *conn, r *request) *job {
	j := jobs.Get().(*job)
	j.c, j.req = c, *r
	return j
}

// free gives back the job and its buffer.
func (j *job) free() {
	if j.buf != nil {
		putBuffer(j.buf)
	}
	clear(j.iov[:cap(j.iov)])
	*j = job{iov: j.iov[:0]}
	jobs.Put(j)
}

// run does the job, answers it, and gives its place back.
func (j *job) run() {
	c, n := j.c, j.bytes
	var err error
	switch {
	case j.flushOnly:
		err = j.change(nil)
	case j.group != nil:
		err = j.readGroup()
	case j.req.kind == nbd.CmdRead:
		err = j.read()
	case j.req.kind == nbd.CmdWrite:
		err = j.change(func(d block.Device) error {
			_, err := d.WriteAt(j.buf.b[:j.req.n], j.req.off)
			return err
		})
	case j.req.kind == nbd.CmdBlockStatus:
		err = j.blockStatus()
	case j.req.kind == nbd.CmdCache:
		err = j.cache()
	default:
		err = j.change(func(d block.Device) error { return zeroDevice(d, &j.req) })
	}
	j.free()
	if err != nil {
		c.abort(replyError(err))
	}
	c.jobs.remove(n)
}

// inDevice calls do past the gate of calls that may block.
func (j *job) inDevice(do func(d block.Device) error) error {
	g := j.c.srv.workers.working
	if j.c.mayBlock() {
		g = j.c.srv.workers.parked
	}
	g.enter()
	defer g.leave()
	return do(j.c.export.Device)
}

// change does a change, if one is left to do, and the flush that its request
// asks for, and answers.
func (j *job) change(do func(d block.Device) error) error {
	var err error
	if do != nil {
		err = j.inDevice(do)
	}
	if err == nil && (j.flushOnly || j.req.flags&nbd.CmdFlagFUA != 0) {
		err = j.inDevice(func(block.Device) error {
			_, err := j.c.flushDevice()
			return err
		})
	}
	if err != nil {
		return j.fail(err)
	}
	if do != nil && j.req.kind == nbd.CmdWrite {
		j.c.srv.count.bytesWritten.Add(uint64(j.req.n))
	}
	return j.succeed()
}

func (j *job) cache() error {
	if j.req.n > 0 {
		err := j.inDevice(func(d block.Device) error { return d.Cache(j.req.off, j.req.n) })
		if err != nil {
			return j.fail(err)
		}
	}
	return j.succeed()
}

func (j *job) succeed() error {
	return j.send(j.c.appendSuccess(j.head[:0], &j.req), nil)
}

// fail answers with err, which the device returned.
func (j *job) fail(err error) error {
	j.c.srv.count.errors.Add(1)
	j.c.logDevice(&j.req, err)
	return j.send(j.c.appendFailure(j.head[:0], &j.req, failureOf(&j.req, err)), nil)
}

// failAt is fail of a READ that went well before off.
func (j *job) failAt(err error, off int64) error {
	if !j.c.chunked() || off >= j.req.off+j.req.n {
		return j.fail(err)
	}
	j.c.srv.count.errors.Add(1)
	j.c.logDevice(&j.req, err)
	return j.send(j.c.appendFailureAt(j.head[:0], &j.req, failureOf(&j.req, err), off), nil)
}

// send sends a reply, or a chunk of one: its head and then data.
func (j *job) send(head, data []byte) error {
	j.vecs = [2][]byte{head, data}
	err := j.c.out.send(j.vecs[:], &j.iov)
	j.vecs = [2][]byte{}
	return err
}

// readBuffer returns how many bytes of buffer a worker needs for a READ.
func readBuffer(r *request) int { return 1 << bufferClass(int(min(r.n, readPiece))) }

// readFull reads all of p at off, which lies inside d.
func readFull(d block.Device, p []byte, off int64) error {
	_, err := readUpTo(d, p, off)
	return err
}

// readUpTo is readFull that says how many bytes were read before an error.
func readUpTo(d block.Device, p []byte, off int64) (int, error) {
	n, err := d.ReadAt(p, off)
	switch {
	case n == len(p):
		return n, nil
	case err == nil, err == io.EOF:
		return n, io.ErrUnexpectedEOF
	}
	return n, err
}

// read answers a READ whose bytes are not known to be in memory. A large one
// takes no more memory than a piece: with chunks each piece is one; without,
// all of it is read once to see that it can be read, and brought to memory,
// before the reply begins.
func (j *job) read() error {
	buf := getBuffer(int(min(j.req.n, readPiece)))
	defer putBuffer(buf)
	switch {
	case j.req.n <= readPiece:
		return j.readWhole(buf.b[:j.req.n])
	case j.c.chunked() && j.req.flags&nbd.CmdFlagDF == 0:
		return j.readChunks(buf.b)
	}
	return j.readTwice(buf.b)
}

func (j *job) readWhole(p []byte) error {
	if got, err := j.readInto(p, j.req.off); err != nil {
		return j.failAt(err, j.req.off+int64(got))
	}
	j.c.srv.count.bytesRead.Add(uint64(len(p)))
	return j.send(j.c.appendData(j.head[:0], &j.req, nbd.ReplyFlagDone, j.req.off, len(p)), p)
}

func (j *job) readInto(p []byte, off int64) (got int, err error) {
	err = j.inDevice(func(d block.Device) (err error) {
		got, err = readUpTo(d, p, off)
		return err
	})
	return got, err
}

// readChunks answers piece by piece, with chunks of data and of holes, and
// with an error in place of what cannot be read.
func (j *job) readChunks(buf []byte) error {
	end := j.req.off + j.req.n
	for off := j.req.off; off < end; {
		// Chunks end at multiples of 512 bytes, as the specification wants.
		run := j.runAt(off, min(readPiece-off%preferredBlock, end-off))
		var flags uint16
		if run.End() == end {
			flags = nbd.ReplyFlagDone
		}
		var head, data []byte
		if run.Hole {
			head = j.c.appendHole(j.head[:0], &j.req, flags, off, int(run.N))
		} else {
			data = buf[:run.N]
			if got, err := j.readInto(data, off); err != nil {
				return j.failAt(err, off+int64(got))
			}
			head = j.c.appendData(j.head[:0], &j.req, flags, off, len(data))
		}
		if err := j.send(head, data); err != nil {
			return err
		}
		j.c.srv.count.bytesRead.Add(uint64(run.N))
		off = run.End()
	}
	return nil
}

// minHole is the least hole in bytes that is worth a chunk of its own.
const minHole = 64 << 10

// runAt returns the run at off, of at most n bytes, that is one chunk of a
// reply: all of it a hole, or to be sent as data.
func (j *job) runAt(off, n int64) block.Extent {
	var extents []block.Extent
	err := j.inDevice(func(d block.Device) (err error) {
		extents, err = d.Extents(off, n, maxExtentsOne)
		return err
	})
	run := block.Extent{Off: off, N: n}
	if err != nil {
		return run // what cannot be read will be found when it is read
	}
	for i, e := range extents {
		hole := e.Hole && e.N >= minHole
		switch {
		case i == 0 && hole:
			return e
		case hole:
			run.N = e.Off - off
			return run
		}
	}
	return run
}

// readTwice proves that all can be read and then answers with one reply.
func (j *job) readTwice(buf []byte) error {
	end := j.req.off + j.req.n
	for off := j.req.off; off < end; off += readPiece {
		if got, err := j.readInto(buf[:min(readPiece, end-off)], off); err != nil {
			return j.failAt(err, off+int64(got))
		}
	}
	out := &j.c.out
	out.mu.Lock() // to the end of the reply
	defer out.mu.Unlock()
	head := j.c.appendData(j.head[:0], &j.req, nbd.ReplyFlagDone, j.req.off, int(j.req.n))
	for off := j.req.off; off < end; off += readPiece {
		p := buf[:min(readPiece, end-off)]
		if _, err := j.readInto(p, off); err != nil {
			return fmt.Errorf("%s that could be read before its reply began: %w", commandName(j.req.kind), err)
		}
		j.vecs = [2][]byte{head, p}
		if err := out.sendLocked(j.vecs[:], &j.iov); err != nil {
			return err
		}
		head = nil
	}
	j.c.srv.count.bytesRead.Add(uint64(j.req.n))
	return nil
}
