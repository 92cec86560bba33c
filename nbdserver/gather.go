package nbdserver

import (
	"sync"

	"github.com/cowdev/cowdev/block"
	"github.com/cowdev/cowdev/internal/nbd"
)

// What is gathered.
const (
	maxGathered  = 64       // WRITEs
	maxGatherOne = 16 << 10 // bytes of each
)

// A gatherer holds WRITEs whose payloads lie in the receive buffer, to be done
// together before anything else is done for the connection, or the buffer
// changes.
type gatherer struct {
	requests []request
	writes   []block.Write
}

var gatherers = sync.Pool{New: func() any { return new(gatherer) }}

// gathers reports whether r, a valid request, is to be gathered.
func (c *conn) gathers(r *request) bool {
	return c.batched != nil && r.kind == nbd.CmdWrite && r.n > 0 && r.n <= maxGatherOne &&
		r.flags&nbd.CmdFlagFUA == 0 && !c.mayBlock()
}

// gather puts off a WRITE whose payload comes next, and lies in the buffer.
func (c *conn) gather(r *request) error {
	if c.gathered == nil {
		c.gathered = gatherers.Get().(*gatherer)
	}
	g := c.gathered
	g.requests = append(g.requests, *r)
	g.writes = append(g.writes, block.Write{Data: c.in.take(int(r.n)), Off: r.off})
	if len(g.requests) == maxGathered {
		return c.settle()
	}
	return nil
}

// settle does what was gathered, and answers it. A client that waits for all of
// it has the first half answered while the second is done: it need not wait for
// the whole, and the server not for all that comes next.
func (c *conn) settle() error {
	g := c.gathered
	if g == nil {
		return nil
	}
	c.gathered = nil
	n, half := len(g.requests), 0
	if c.ebb.reached(n) && n >= leastSplit && c.srv.lone() {
		half = n / 2
	}
	var err error
	if half > 0 {
		if err = c.writeTogether(g.requests[:half], g.writes[:half]); err == nil {
			err = c.flush()
		}
	}
	if err == nil {
		err = c.writeTogether(g.requests[half:], g.writes[half:])
	}
	clear(g.writes)
	g.requests, g.writes = g.requests[:0], g.writes[:0]
	gatherers.Put(g)
	return err
}

// writeTogether does writes, which answer requests, and adds the answers to the
// batch.
func (c *conn) writeTogether(requests []request, writes []block.Write) error {
	err := c.enter()
	if err == nil && len(writes) == 1 && !c.parks {
		w := &writes[0]
		_, w.Err = c.export.Device.WriteAt(w.Data, w.Off)
	} else if err == nil {
		c.batched.WriteBatch(writes)
	}
	for i := range requests {
		if err == nil && c.batch().full() {
			err = c.flush()
		}
		r, w := &requests[i], &writes[i]
		switch {
		case err != nil:
		case w.Err == block.ErrAlone:
			err = c.startWrite(r, w.Data)
		default:
			err = c.changed(r, w.Err)
		}
	}
	return err
}

// startWrite gives a WRITE with a copy of its payload to a worker.
func (c *conn) startWrite(r *request, payload []byte) error {
	j := newJob(c, r)
	j.buf = getBuffer(len(payload))
	copy(j.buf.b, payload)
	return c.start(j, len(j.buf.b))
}
