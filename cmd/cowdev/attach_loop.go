package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"

	"github.com/urfave/cli/v2"

	"github.com/cowdev/cowdev/attach"
)

// attachLoop attaches a loop device over a FUSE file, and serves it until a
// signal finds it unused.
func attachLoop(c *cli.Context, ac attachConfig) (err error) {
	attach.Shield(false)
	view, err := openView(c.Context, c, ac.serve.base, ac.serve.cow, ac.serve.view)
	if err != nil {
		return err
	}
	// From here on a signal, and one that comes twice, must leave nothing behind.
	signals, stop := deviceSignals()
	defer stop()
	var s *attach.State // nil until the device is announced
	defer func() {
		if s != nil {
			err = errors.Join(err, forget(s, err))
		}
	}()
	defer func() { err = errors.Join(err, view.Close()) }()
	if view.device.Size() < attach.DefaultBlockSize {
		return fmt.Errorf("%s: %d bytes, a device has at least one sector of %d", ac.serve.base, view.device.Size(), attach.DefaultBlockSize)
	}
	if err := os.MkdirAll(string(attach.DefaultStates), 0o755); err != nil {
		return err
	}
	dir, err := os.MkdirTemp(string(attach.DefaultStates), fmt.Sprintf(fuseDirOf, os.Getpid())+"*")
	if err != nil {
		return err
	}
	defer os.Remove(dir)
	file, err := attach.MountFuse(view.device, dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, file.Close()) }()
	loop, err := attach.AttachLoop(file.Path(), attach.LoopOptions{
		BlockSize: ac.nbd.BlockSize, ReadOnly: view.device.ReadOnly(), Direct: true,
	})
	if err != nil {
		return err
	}
	// Who has it open without mounting it is served until he closes it: all
	// that he writes would be lost.
	defer func() { err = errors.Join(err, loop.Detach(context.Background())) }()
	ac.nbd.Size = view.device.Size()
	told := ac.state(loop.Path(), attach.DriverLoop, view.store.Header().UUID.String())
	told.FuseDir = dir
	if err := announce(c, &ac, told); err != nil {
		return err
	}
	s = told
	holdLoop(c, loop, signals)
	view.device.Release() // writes that wait for room would wait for ever
	return nil
}

// fuseDirOf begins the name of the directory that a process mounts its FUSE
// filesystem at; the rest is random.
const fuseDirOf = "fuse-%d-"

// holdLoop waits for a signal that finds the device unused, and leaves it
// reserved.
func holdLoop(c *cli.Context, loop *attach.Loop, signals <-chan os.Signal) {
	for sig := range signals {
		if sig == syscall.SIGUSR2 {
			warn(c, "%s: a loop device cannot be handed over", loop.Path())
			continue
		}
		if free, err := loop.Reserve(); free {
			return
		} else if err != nil {
			warn(c, "%s: is it in use? %v", loop.Path(), err)
		} else {
			warn(c, "%s is in use, and would not outlive this process: unmount it first", loop.Path())
		}
	}
}

// forget ends what is told of a device that is gone. Where its store was not
// closed in order, who waits for the end is told why.
func forget(s *attach.State, err error) error {
	if err == nil {
		return attach.DefaultStates.Remove(s)
	}
	return attach.DefaultStates.Update(s.Device, func(now *attach.State) {
		if now.PID == s.PID && now.Born == s.Born {
			now.Failure = err.Error()
		}
	})
}
