package nbdserver

import "time"

// A FLUSH is expected after so many in a row that came after as many changes
// each, and after more where an expectation was wrong before.
const (
	leastTrust = 4
	mostDoubt  = 256
)

// A rhythm is how many changes a client makes before each FLUSH. One that waits
// for every answer, and always flushes after as many, has the device flushed
// while it is on its way to ask for that.
type rhythm struct {
	changes int    // since the last FLUSH
	usual   int    // before that one
	times   int    // FLUSHes in a row that came after as many
	doubt   int    // how many more than leastTrust it takes
	last    uint64 // the last FLUSH among those of all connections
	ahead   bool   // the device was flushed after the last change
	err     error  // what that came to
}

// changed counts a change.
func (y *rhythm) changed() {
	y.changes++
	if y.ahead {
		y.mistaken()
	}
}

// mistaken says that the device was flushed in vain, or for long.
func (y *rhythm) mistaken() {
	y.ahead, y.times = false, 0
	y.doubt = min(2*y.doubt+leastTrust, mostDoubt)
}

// flushed counts a FLUSH, or a change with FUA, the nth of all connections, and
// returns what the one ahead of it came to. Where others flush too, they wait
// for the disk together, and that is worth more.
func (y *rhythm) flushed(nth uint64) error {
	if y.changes != y.usual || nth != y.last+1 {
		y.times = 0
	}
	if y.ahead {
		y.doubt = max(y.doubt-1, 0)
	}
	err := y.err
	*y = rhythm{usual: y.changes, times: y.times + 1, doubt: y.doubt, last: nth}
	return err
}

// expects says that a FLUSH comes next.
func (y *rhythm) expects() bool {
	return y.changes > 0 && y.changes == y.usual && y.times >= leastTrust+y.doubt && !y.ahead
}

// flushAhead flushes the device if the client is expected to ask for that next,
// nothing of it is under way, and nobody would have to wait long. It has been
// sent what it is owed.
func (c *conn) flushAhead() {
	if !c.rhythm.expects() || len(c.in.have()) > 0 || c.jobs.any() || c.ending ||
		c.synced.Load() > int64(quickSync) || c.mayBlock() || !c.srv.workers.inline.tryEnter() {
		return
	}
	took, err := c.flushDevice()
	c.srv.workers.inline.leave()
	c.rhythm.ahead, c.rhythm.err = true, err
	if took > quickSync {
		c.rhythm.mistaken()
	}
}

// flushDevice flushes the device, and notes how long that took.
func (c *conn) flushDevice() (took time.Duration, err error) {
	began := time.Now()
	err = c.export.Device.Flush()
	took = time.Since(began)
	c.synced.Store(int64(took))
	return took, err
}
