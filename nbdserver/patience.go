package nbdserver

import "time"

// What a client may ask that leads nowhere, options and requests that the
// specification forbids: so much at once, and then one for each price that
// passes. No client does that for long; one that does would take a processor
// from the others otherwise.
const (
	requestPrice = 10 * time.Millisecond
	optionPrice  = 4 * requestPrice
	credit       = 128 * requestPrice
	leastPause   = 10 * requestPrice // shorter ones would cost more than they save
)

// patience is with one client.
type patience struct {
	until time.Time // when what was asked so far will be paid for
	told  bool      // the log has been
}

// spend counts one more at a moment, and returns how long the client is to wait
// for it.
func (p *patience) spend(price time.Duration, now time.Time) time.Duration {
	if p.until.Before(now) {
		p.until = now
	}
	p.until = p.until.Add(price)
	if wait := p.until.Sub(now) - credit; wait >= leastPause {
		return wait
	}
	return 0
}

// slowDown counts an option, or a request that was refused, and makes a client
// wait that had many. What it is owed has been sent by then.
func (c *conn) slowDown(price time.Duration) error {
	wait := c.patience.spend(price, time.Now())
	if wait == 0 || c.stopping.Load() {
		return nil
	}
	if err := c.beforeWait(); err != nil {
		return err
	}
	if !c.patience.told {
		c.patience.told = true
		c.srv.log.printf("connection of %s: asks again and again what cannot be served, and is slowed down", c.peer)
	}
	time.Sleep(wait)
	return nil
}
