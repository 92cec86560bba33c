package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/urfave/cli/v2"

	"github.com/cowdev/cowdev/attach"
	"github.com/cowdev/cowdev/internal/keeper"
	"github.com/cowdev/cowdev/nbdserver"
)

// connect attaches a device for a server that told what it serves, or gives
// the device of before new connections.
func (ac *attachConfig) connect(t told) (*attach.NBD, []net.Conn, error) {
	ac.nbd.Size, ac.nbd.Flags, ac.nbd.Identifier = t.Size, t.Flags, t.UUID
	if ac.resume == nil {
		return attach.ConnectNBD(ac.nbd)
	}
	if !t.sameStore(told{UUID: ac.resume.UUID, Size: ac.resume.Size, File: ac.resume.File}) {
		return nil, nil, fmt.Errorf("%s: another store than the one that %s was attached to (%s)", ac.serve.cow, ac.resume.Device, ac.resume.UUID)
	}
	ctx, cancel := limited()
	defer cancel()
	return attach.ResumeNBD(ctx, ac.nbd)
}

// attachSupervised attaches a device whose server is another process, which
// is started again when it dies.
func attachSupervised(c *cli.Context, ac attachConfig) error {
	for _, what := range attach.Shield(true) {
		warn(c, "%s is not permitted: writes may hang when memory is short", what)
	}
	launcher := newLauncher(c, &ac)
	server, t, err := launcher.begin(c.Context)
	if err != nil {
		return err
	}
	dev, fronts, err := ac.connect(t)
	if err != nil {
		server.Stop()
		<-server.Exited
		return err
	}
	k := keeper.New(keeper.Config{
		Launch: launcher.launch,
		Reconnect: func(int) (net.Conn, error) {
			ctx, cancel := limited()
			defer cancel()
			return dev.Reconnect(ctx)
		},
		Patience: ac.nbd.DeadTimeout,
		Log:      func(format string, args ...any) { warn(c, dev.Path()+": "+format, args...) },
	}, fronts)
	serve := func(ctx context.Context) error {
		if err := k.Run(ctx, server); err != nil {
			return err
		}
		return launcher.closed()
	}
	s := ac.state(dev.Path(), attach.DriverNBD, t.UUID)
	s.ServerPID, s.Owner, s.File = t.PID, dev.Owner(), t.File
	launcher.setDevice(s.Device)
	return holdNBD(c, &ac, dev, s, serve, k.HandOver)
}

// attachDirect attaches a device that this process serves itself.
func attachDirect(c *cli.Context, ac attachConfig) error {
	attach.Shield(false)
	view, err := openView(c.Context, c, ac.serve.base, ac.serve.cow, ac.serve.view)
	if err != nil {
		return err
	}
	server, export, err := ac.serve.transmitter(c, view)
	if err != nil {
		return errors.Join(err, view.Close())
	}
	t := tell(view, export)
	dev, conns, err := ac.connect(t)
	if err != nil {
		return errors.Join(err, view.Close())
	}
	var notClosed error
	serve := func(ctx context.Context) error {
		err := serveConns(ctx, c, dev, server, export, conns)
		if e := view.Close(); e != nil {
			notClosed = fmt.Errorf("%w: %w", errNotClosed, e)
		}
		return cmp.Or(err, notClosed)
	}
	s := ac.state(dev.Path(), attach.DriverNBD, dev.Config().Identifier)
	s.Owner, s.File = dev.Owner(), t.File
	err = holdNBD(c, &ac, dev, s, serve, nil)
	if notClosed != nil && !errors.Is(err, errNotClosed) { // the device is left as it is
		err = errors.Join(err, notClosed)
	}
	return err
}

// serveConns serves a device's connections until the kernel said goodbye on
// all of them, and replaces those that it gave up. When ctx ends they are
// closed: the kernel keeps what is in flight for the next server.
func serveConns(ctx context.Context, c *cli.Context, dev *attach.NBD, server *nbdserver.Server, export *nbdserver.Export, conns []net.Conn) error {
	var all sync.WaitGroup
	failed := make(chan error, len(conns))
	for _, conn := range conns {
		all.Go(func() {
			for {
				end := context.AfterFunc(ctx, func() { conn.Close() })
				err := server.ServeTransmission(conn, export)
				end()
				if err == nil || ctx.Err() != nil {
					return
				}
				warn(c, "%s: connection ended (%v), connecting anew", dev.Path(), err)
				within, cancel := limited()
				conn, err = dev.Reconnect(within)
				cancel()
				if err != nil {
					failed <- err
					return
				}
			}
		})
	}
	all.Wait()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	select {
	case err := <-failed:
		return err
	default:
		return nil
	}
}

// holdNBD holds a device for as long as serve serves it and closes its store, and
// does what signals ask for.
func holdNBD(c *cli.Context, ac *attachConfig, dev *attach.NBD, s *attach.State, serve func(context.Context) error, handOver func(context.Context) error) error {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	served := make(chan error, 1)
	go func() { served <- serve(ctx) }()
	signals, stop := deviceSignals()
	defer stop()

	if err := waitUsable(dev, served); err != nil {
		dropNBD(dev, s)
		cancel()
		<-served
		return err
	}
	if err := announce(c, ac, s); err != nil {
		dropNBD(dev, s)
		return errors.Join(err, <-served)
	}
	var ending atomic.Bool
	for {
		select {
		case err := <-served:
			return ended(dev, s, err)
		case sig := <-signals:
			switch {
			case sig == syscall.SIGUSR2 && handOver == nil:
				warn(c, "%s: SIGUSR2 is for --supervise; end this process and run cowdev attach --resume", dev.Path())
			case sig == syscall.SIGUSR2:
				go func() {
					if err := handOver(ctx); err != nil {
						warn(c, "%s: hand over: %v", dev.Path(), err)
					}
				}()
			case !ending.Load(): // else a second one, while what the first asks is done
				if !leaveNBD(c, dev, s, &ending) {
					cancel()
				}
			}
		}
	}
}

// waitUsable waits until dev can be read, or its server has failed.
func waitUsable(dev *attach.NBD, served chan error) error {
	ctx, cancel := limited()
	defer cancel()
	usable := make(chan error, 1)
	go func() { usable <- dev.WaitUsable(ctx) }()
	select {
	case err := <-usable:
		return err
	case err := <-served:
		served <- err
		return errors.Join(errors.New("the server ended at once"), err)
	}
}

// leaveNBD is what a signal to end does: it disconnects a device that nobody
// uses, and reports whether it did; ending is set until that fails. A device in
// use stays, and its requests wait.
func leaveNBD(c *cli.Context, dev *attach.NBD, s *attach.State, ending *atomic.Bool) bool {
	if busy, err := attach.Busy(dev.Path()); busy || err != nil {
		warn(c, "%s is in use: its requests wait %v for cowdev attach --resume %s", dev.Path(), s.DeadTimeout, shellWord(s.COW))
		return false
	}
	ending.Store(true)
	go func() { // the goodbye ends serve, and then ended does the rest
		ctx, cancel := limited()
		defer cancel()
		if err := dev.Disconnect(ctx); err != nil {
			ending.Store(false)
			warn(c, "%v", err)
		}
	}()
	return true
}

// errNotClosed says that a device is gone, and what was acknowledged may not be
// durable.
var errNotClosed = errors.New("the store was not closed in order")

// dropNBD disconnects dev, and forgets it.
func dropNBD(dev *attach.NBD, s *attach.State) error {
	ctx, cancel := limited()
	defer cancel()
	err := dev.Disconnect(ctx)
	return errors.Join(err, attach.DefaultStates.Remove(s))
}

// loseNBD disconnects dev, whose store was not closed in order because of why, and
// has that told to who detaches it.
func loseNBD(dev *attach.NBD, s *attach.State, why error) error {
	ctx, cancel := limited()
	defer cancel()
	return errors.Join(dev.Disconnect(ctx), forget(s, why))
}

// ended returns what the end of a device's server means.
func ended(dev *attach.NBD, s *attach.State, err error) error {
	switch {
	case errors.Is(err, context.Canceled): // left for --resume
		return nil
	case errors.Is(err, keeper.ErrGaveUp):
		err = fmt.Errorf("%s: %w; its requests fail now", dev.Path(), err)
		return errors.Join(err, loseNBD(dev, s, err))
	case errors.Is(err, errNotClosed):
		return errors.Join(err, loseNBD(dev, s, err))
	case err != nil:
		return err
	}
	return dropNBD(dev, s) // waits until the kernel is done with it
}
