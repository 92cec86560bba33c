package nbdserver

import (
	"slices"
	"sync"
	"sync/atomic"
)

// How READs from the disk that came together are shared out.
const (
	maxCold     = 64 // READs that wait to be shared out
	coldWorkers = 8  // that share them
)

// readTogether has a READ whose bytes the disk was just told to fetch answered
// by a worker, together with others that came with it. The disk works on all
// of them at once; a worker for each would only mean that as many threads go
// to sleep and are woken.
func (c *conn) readTogether(r *request) error {
	if c.cold == nil {
		c.cold = coldGroups.Get().(*coldGroup)
	}
	c.cold.requests = append(c.cold.requests, *r)
	if len(c.cold.requests) == maxCold {
		return c.startCold()
	}
	return nil
}

// startCold gives the READs of readTogether to workers.
func (c *conn) startCold() error {
	g := c.cold
	if g == nil {
		return nil
	}
	c.cold = nil
	n := min(coldWorkers, len(g.requests))
	largest := slices.MaxFunc(g.requests, func(a, b request) int { return int(a.n - b.n) })
	g.users.Store(int32(n))
	for started := range n {
		j := newJob(c, &g.requests[0])
		j.group = g
		if err := c.start(j, readBuffer(&largest)); err != nil {
			g.leave(n - started)
			return err
		}
	}
	return nil
}

// A coldGroup is READs that several jobs share: each takes the next one, so
// that a place of the disk which is slow, or ends in an error after long, holds
// up no other.
type coldGroup struct {
	requests []request
	taken    atomic.Int32
	users    atomic.Int32
}

var coldGroups = sync.Pool{New: func() any { return new(coldGroup) }}

// leave ends the use of the group by some of its users.
func (g *coldGroup) leave(users int) {
	if g.users.Add(int32(-users)) == 0 {
		g.requests = g.requests[:0]
		g.taken.Store(0)
		coldGroups.Put(g)
	}
}

// readGroup answers the READs of the job's group until none is left.
func (j *job) readGroup() (err error) {
	g := j.group
	defer g.leave(1)
	for err == nil {
		i := int(g.taken.Add(1)) - 1
		if i >= len(g.requests) {
			return nil
		}
		j.req = g.requests[i]
		err = j.read()
	}
	return err
}

// prefetches says that Cache of the device sets a disk to work.
func (c *conn) prefetches() bool {
	d, ok := c.export.Device.(interface{ Prefetches() bool })
	return ok && d.Prefetches()
}
