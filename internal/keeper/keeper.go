package keeper

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"
)

// ErrGaveUp says that no server could be had for as long as the keeper was
// told to try.
var ErrGaveUp = errors.New("no server behind the device")

// A Server is one run of what answers.
type Server struct {
	Conns  []net.Conn      // one for each front, the transmission phase begun
	Exited <-chan struct{} // closed when it is gone
	Stop   func()          // asks it to end in good order; Exited follows
	Kill   func()          // ends it
}

// A Config says whom a keeper serves, and how it comes by servers.
type Config struct {
	// Launch starts a server. Its error is reported and it is tried again. ctx
	// ends when the keeper gives up, or the kernel has use for none.
	Launch func(ctx context.Context) (*Server, error)
	// Reconnect is asked for a new front when the kernel gave one up without
	// a goodbye. Nil, or an error, ends the keeper.
	Reconnect func(front int) (net.Conn, error)
	// Patience is how long the keeper tries to have a server again before it
	// gives up.
	Patience time.Duration
	// StopLimit is how long a server may take to end when asked to, before it
	// is killed. Zero is a minute.
	StopLimit time.Duration
	// Log is told, a line each, of servers lost and found. Nil drops it.
	Log func(format string, args ...any)
}

// Stats tell of the servers so far.
type Stats struct {
	Losses    int           // servers that died or failed
	HandOvers int           // servers that were replaced on demand
	LastGap   time.Duration // between the last server's end and the next one's beginning
	MaxGap    time.Duration
}

// A Keeper serves a set of fronts.
type Keeper struct {
	cfg      Config
	handOver chan chan error

	mu     sync.Mutex
	relays []*Relay
	stats  Stats
}

// frontEnd tells that a front's Run returned.
type frontEnd struct {
	index int
	err   error
}

// New returns a keeper of fronts, which it owns from now on.
func New(cfg Config, fronts []net.Conn) *Keeper {
	if cfg.Log == nil {
		cfg.Log = func(string, ...any) {}
	}
	if cfg.StopLimit == 0 {
		cfg.StopLimit = time.Minute
	}
	k := &Keeper{cfg: cfg, handOver: make(chan chan error)}
	for _, f := range fronts {
		k.relays = append(k.relays, NewRelay(f))
	}
	return k
}

// Stats returns the counts so far.
func (k *Keeper) Stats() Stats {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.stats
}

// HandOver replaces the server by a new one in good order: what it has been
// given is answered, what comes meanwhile is held, and no request is done
// twice. It returns when the new server answers.
func (k *Keeper) HandOver(ctx context.Context) error {
	done := make(chan error, 1)
	select {
	case k.handOver <- done:
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Run serves with server and its successors until the kernel said goodbye on
// every front (nil), ctx ends, or there is no server any more (ErrGaveUp). In
// each case fronts and server are gone when it returns.
func (k *Keeper) Run(ctx context.Context, server *Server) error {
	ends := make(chan frontEnd)
	var fronts sync.WaitGroup
	start := func(i int) {
		r := k.relays[i]
		fronts.Go(func() {
			err := r.Run()
			select {
			case ends <- frontEnd{i, err}:
			case <-ctx.Done():
			}
		})
	}
	ctx, cancel := context.WithCancel(ctx)
	defer fronts.Wait()
	defer cancel()
	defer k.closeFronts()
	for i := range k.relays {
		start(i)
	}
	alive := len(k.relays)
	for {
		why, end, asked := k.serve(ctx, server, ends, &alive)
		lost := time.Now()
		var err error
		switch why {
		case serverLost:
			k.count(func(s *Stats) { s.Losses++ })
		case askedFor:
			k.count(func(s *Stats) { s.HandOvers++ })
		case frontLost:
			if err = k.renew(end); err == nil {
				start(end.index)
			}
		case goodbye:
			return nil
		case stopped:
			return ctx.Err()
		}
		if err == nil {
			server, err = k.relaunch(ctx)
		}
		if errors.Is(err, errGoodbye) {
			err = nil
			why = goodbye
		}
		if asked != nil {
			asked <- err
		}
		if err != nil || why == goodbye {
			return err
		}
		k.noteGap(time.Since(lost), why)
	}
}

// What ended a server's time.
type reason int

const (
	serverLost reason = iota // it died, or its connection failed
	askedFor                 // HandOver
	frontLost                // the kernel gave up a connection
	goodbye                  // the kernel is done
	stopped                  // the keeper is to stop
)

// serve lets server answer until there is a reason to have another, or none.
// When it returns the server is gone.
func (k *Keeper) serve(ctx context.Context, server *Server, ends <-chan frontEnd, alive *int) (why reason, end frontEnd, asked chan error) {
	var backs sync.WaitGroup
	failed := make(chan error, len(k.relays))
	for i, r := range k.relays {
		r.Resume()
		backs.Go(func() {
			if err := r.Serve(server.Conns[i]); !errors.Is(err, errFront) && !r.saidGoodbye() {
				failed <- err
			}
		})
	}
	defer backs.Wait()
	for {
		select {
		case <-server.Exited:
			if k.goodbyeSaid() { // and it went before we heard of it
				return goodbye, end, nil
			}
			k.cfg.Log("server ended, starting another")
			return serverLost, end, nil
		case err := <-failed:
			k.cfg.Log("server's connection ended (%v), starting another", err)
			k.end(server, server.Kill)
			return serverLost, end, nil
		case end = <-ends:
			if end.err != nil {
				k.pause(server)
				k.end(server, server.Stop)
				return frontLost, end, nil
			}
			if *alive--; *alive == 0 {
				k.end(server, server.Stop)
				return goodbye, end, nil
			}
		case asked = <-k.handOver:
			k.pause(server)
			k.end(server, server.Stop)
			return askedFor, end, asked
		case <-ctx.Done():
			k.pause(server)
			k.end(server, server.Stop)
			return stopped, end, nil
		}
	}
}

// pause lets the server answer what it was given, and gives it no more. A
// server that takes longer than StopLimit is killed: what it did not answer
// will be sent to the next.
func (k *Keeper) pause(server *Server) {
	drained := make(chan struct{})
	go func() {
		defer close(drained)
		for _, r := range k.relays {
			r.Pause()
		}
		for _, r := range k.relays {
			r.Drain()
		}
	}()
	select {
	case <-drained:
	case <-time.After(k.cfg.StopLimit):
		k.cfg.Log("server did not answer everything within %v, killing it", k.cfg.StopLimit)
		k.end(server, server.Kill)
		<-drained
	}
}

// end ends a server by how, or by force, and waits for it.
func (k *Keeper) end(server *Server, how func()) {
	how()
	select {
	case <-server.Exited:
	case <-time.After(k.cfg.StopLimit):
		k.cfg.Log("server did not end within %v, killing it", k.cfg.StopLimit)
		server.Kill()
		<-server.Exited
	}
	for _, c := range server.Conns {
		c.Close()
	}
}

// renew puts a new front in the place of one that the kernel gave up. What
// came by the old one the kernel sends again.
func (k *Keeper) renew(end frontEnd) error {
	k.cfg.Log("%v, connecting anew", end.err)
	k.relays[end.index].Close()
	if k.cfg.Reconnect == nil {
		return end.err
	}
	front, err := k.cfg.Reconnect(end.index)
	if err != nil {
		return fmt.Errorf("%w; and again: %w", end.err, err)
	}
	k.mu.Lock()
	k.relays[end.index] = NewRelay(front)
	k.mu.Unlock()
	return nil
}

// errGoodbye says that the kernel has no use for a server any more.
var errGoodbye = errors.New("the kernel said goodbye")

// relaunch starts a server, trying again for as long as it has patience and the
// kernel has use for one.
func (k *Keeper) relaunch(ctx context.Context) (*Server, error) {
	giveUp := time.Now().Add(k.cfg.Patience)
	for pause := 10 * time.Millisecond; ; pause = min(2*pause, time.Second) {
		server, err := k.launch(ctx, giveUp)
		if err == nil {
			return server, nil
		}
		k.cfg.Log("start a server: %v", err)
		if k.goodbyeSaid() {
			return nil, errGoodbye
		}
		if time.Now().Add(pause).After(giveUp) {
			return nil, fmt.Errorf("%w for %v: %w", ErrGaveUp, k.cfg.Patience, err)
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(pause):
		}
	}
}

// launch starts a server, which has until giveUp or the kernel's goodbye.
func (k *Keeper) launch(ctx context.Context, giveUp time.Time) (*Server, error) {
	ctx, cancel := context.WithDeadline(ctx, giveUp)
	var watch sync.WaitGroup
	defer watch.Wait()
	defer cancel()
	watch.Go(func() {
		for ctx.Err() == nil && !k.goodbyeSaid() {
			select {
			case <-ctx.Done():
			case <-time.After(lookEvery):
			}
		}
		cancel()
	})
	return k.cfg.Launch(ctx)
}

// goodbyeSaid reports whether the kernel is done with every front.
func (k *Keeper) goodbyeSaid() bool {
	for _, r := range k.relays {
		if !r.saidGoodbye() {
			return false
		}
	}
	return true
}

func (k *Keeper) closeFronts() {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, r := range k.relays {
		r.Close()
	}
}

func (k *Keeper) count(f func(*Stats)) {
	k.mu.Lock()
	f(&k.stats)
	k.mu.Unlock()
}

func (k *Keeper) noteGap(gap time.Duration, why reason) {
	k.count(func(s *Stats) { s.LastGap, s.MaxGap = gap, max(gap, s.MaxGap) })
	k.cfg.Log("a server answers again after %v", gap.Round(time.Millisecond))
}
