package nbdserver

import (
	"time"

	"github.com/cowdev/cowdev/block"
	"github.com/cowdev/cowdev/internal/nbd"
)

// What is done on the connection's own goroutine.
const (
	maxInlineWrite = 64 << 10             // bytes of a payload that is waited for whole in the receive buffer
	maxInlineRead  = 1 << 20              // bytes of a READ
	maxInlineCold  = 64 << 10             // bytes of a lone READ from the disk
	maxInlineZero  = 1 << 20              // bytes of a TRIM or WRITE_ZEROES
	maxBuffered    = 1 << 20              // bytes of a WRITE that may wait in a worker
	quickSync      = 2 * time.Millisecond // a flush that is followed by nothing, when the last took less
)

// companyStays is for how many reads from the disk a connection that sent a
// request during one of them counts as having others under way.
const companyStays = 64

// writePiece is what a larger WRITE is cut into: what the receive buffer
// holds, cut where chunks end.
const writePiece = 128 << 10

// read answers a READ whose bytes are in memory; others, and those so large
// that pinning or copying them would break the bound of memory, go to a worker.
func (c *conn) read(r *request) error {
	if r.n == 0 {
		c.succeed(r)
		return nil
	}
	if c.view == nil || r.n > maxInlineRead {
		return c.start(newJob(c, r), readBuffer(r))
	}
	b := c.batch()
	m := b.mark()
	b.wrote(c.appendData(b.head, r, nbd.ReplyFlagDone, r.off, int(r.n)))
	c.viewed = true
	vecs, ok := c.view.View(b.vecs, r.off, r.n)
	if ok && c.in.raw != nil {
		b.show(vecs, int(r.n))
		c.count.read += uint64(r.n)
		c.moved += int(r.n)
		return nil
	}
	b.cut(m)
	if ok {
		return c.readCopied(r)
	}
	return c.readCold(r)
}

// readCold answers a READ whose bytes are not known to be in memory. A lone
// one is done here: its client should not pay for a change of goroutines. For
// others the disk is set to work first, so that it has as many requests at
// once as the client sent, however few workers run.
func (c *conn) readCold(r *request) error {
	if r.n <= maxInlineCold && c.aloneForNow() {
		return c.readHere(r)
	}
	_ = c.export.Device.Cache(r.off, r.n) // an error will be met by the read
	if r.n <= maxInlineCold && c.prefetches() {
		return c.readTogether(r)
	}
	return c.start(newJob(c, r), readBuffer(r))
}

// aloneForNow says that nothing else of the connection has to wait while the
// disk is read here: no request is under way, and none came lately while
// another was read here.
func (c *conn) aloneForNow() bool {
	if len(c.in.have()) > 0 || c.cold != nil || c.jobs.any() {
		return false
	}
	if c.company > 0 {
		c.company--
		return false
	}
	return true
}

// readHere answers a READ by reading from the device.
func (c *conn) readHere(r *request) error {
	if err := c.flush(); err != nil {
		return err
	}
	if err := c.enter(); err != nil { // before there is a batch, which it may send
		return err
	}
	p := c.batch().space(int(r.n))
	err := readFull(c.export.Device, p, r.off)
	if c.in.pending() {
		c.company = companyStays
	}
	if err != nil { // a worker knows how to tell which byte cannot be read
		return c.start(newJob(c, r), readBuffer(r))
	}
	c.b.wrote(c.appendData(c.b.head, r, nbd.ReplyFlagDone, r.off, len(p)))
	c.b.copiedTo(p)
	c.count.read += uint64(r.n)
	c.moved += int(r.n)
	return nil
}

// readCopied answers a READ, whose bytes a view has shown to be in memory, on
// a connection that needs a copy of them: code must not touch mapped bytes.
func (c *conn) readCopied(r *request) error {
	c.done()
	c.viewed = false
	p := c.b.space(int(r.n))
	if p == nil {
		return c.start(newJob(c, r), readBuffer(r))
	}
	if err := readFull(c.export.Device, p, r.off); err != nil {
		c.failDevice(r, err)
		return nil
	}
	c.b.wrote(c.appendData(c.b.head, r, nbd.ReplyFlagDone, r.off, len(p)))
	c.b.copiedTo(p)
	c.count.read += uint64(r.n)
	c.moved += int(r.n)
	return nil
}

// write does a WRITE, whose payload comes next.
func (c *conn) write(r *request) error {
	long := r.n > maxInlineWrite
	switch {
	case (c.mayBlock() || c.parks && long) && r.n > 0 && r.n <= maxBuffered:
		return c.writeLater(r)
	case long:
		return c.writePieces(r)
	}
	if c.parks {
		return c.writeTogether([]request{*r}, []block.Write{{Data: c.in.take(int(r.n)), Off: r.off}})
	}
	if err := c.enter(); err != nil {
		return err
	}
	_, err := c.export.Device.WriteAt(c.in.take(int(r.n)), r.off)
	return c.changed(r, err)
}

// writeLater gives a WRITE with a copy of its payload to a worker.
func (c *conn) writeLater(r *request) error {
	j := newJob(c, r)
	j.buf = getBuffer(int(r.n))
	if int(r.n) > len(c.in.have()) {
		if err := c.beforeWait(); err != nil {
			j.free()
			return err
		}
	}
	if err := c.in.full(j.buf.b[:r.n]); err != nil {
		j.free()
		return err
	}
	return c.start(j, len(j.buf.b))
}

// writePieces does a WRITE piece by piece from the receive buffer as it comes
// in. After an error the rest is thrown away.
func (c *conn) writePieces(r *request) error {
	if err := c.beforeWait(); err != nil {
		return err
	}
	for at, end := r.off, r.off+r.n; at < end; {
		n := int(min(writePiece-at%writePiece, end-at))
		c.leave()
		if err := c.in.need(n); err != nil {
			return err
		}
		if err := c.enter(); err != nil {
			return err
		}
		_, err := c.export.Device.WriteAt(c.in.take(n), at)
		at += int64(n)
		if err != nil {
			c.leave()
			if err := c.in.discard(uint64(end - at)); err != nil {
				return err
			}
			return c.changed(r, err)
		}
	}
	return c.changed(r, nil)
}

// zero does a TRIM or WRITE_ZEROES.
func (c *conn) zero(r *request) error {
	if r.n > maxInlineZero || r.flags&nbd.CmdFlagNoHole != 0 || c.parks || c.mayBlock() {
		return c.start(newJob(c, r), 0)
	}
	if err := c.enter(); err != nil {
		return err
	}
	return c.changed(r, zeroDevice(c.export.Device, r))
}

func zeroDevice(d block.Device, r *request) error {
	if r.n == 0 {
		return nil
	}
	if r.kind == nbd.CmdTrim {
		return d.Trim(r.off, r.n)
	}
	var flags block.ZeroFlags
	if r.flags&nbd.CmdFlagNoHole != 0 {
		flags |= block.NoHole
	}
	if r.flags&nbd.CmdFlagFastZero != 0 {
		flags |= block.FastZero
	}
	return d.WriteZeroes(r.off, r.n, flags)
}

// changed answers a request that changed the device, or failed to with err.
func (c *conn) changed(r *request, err error) error {
	c.rhythm.changed()
	if err != nil {
		c.failDevice(r, err)
		return nil
	}
	if r.kind == nbd.CmdWrite {
		c.count.written += uint64(r.n)
		c.moved += int(r.n)
	}
	if r.flags&nbd.CmdFlagFUA != 0 {
		return c.sync(r)
	}
	c.succeed(r)
	return nil
}

// sync flushes the device and then answers r, a FLUSH or a change with FUA.
// It is done here when nothing follows that would have to wait and flushes
// have been quick: a lone client should not pay for a change of goroutines.
func (c *conn) sync(r *request) error {
	if err := c.rhythm.flushed(c.srv.flushes.Add(1)); err != nil {
		c.failDevice(r, err)
		return nil
	}
	if len(c.in.have()) > 0 || c.synced.Load() > int64(quickSync) {
		j := newJob(c, r)
		j.flushOnly = true
		return c.start(j, 0)
	}
	if err := c.beforeWait(); err != nil {
		return err
	}
	if err := c.enter(); err != nil {
		return err
	}
	if _, err := c.flushDevice(); err != nil {
		c.failDevice(r, err)
		return nil
	}
	c.succeed(r)
	return nil
}

// blockStatus has a BLOCK_STATUS answered by a worker, for all contexts or
// those that its payload names.
func (c *conn) blockStatus(r *request, payload uint64) error {
	j := newJob(c, r)
	j.contexts = c.contexts
	if r.flags&nbd.CmdFlagPayloadLen == 0 {
		return c.start(j, statusBytes)
	}
	if payload > maxInlineWrite {
		j.free()
		return c.refuse(r, payload, errBadFilter)
	}
	length, chosen, ok := parseFilter(c.in.take(int(payload)), c.contexts)
	f := errBadFilter
	if ok {
		f = c.checkRange(&j.req, length)
	}
	if f != nil {
		j.free()
		return c.refuse(r, 0, f)
	}
	j.contexts = chosen
	return c.start(j, statusBytes)
}
