package main

import (
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
	defer func() { err = errors.Join(err, view.Close()) }()
	if view.device.Size() < attach.DefaultBlockSize {
		return fmt.Errorf("%s: %d bytes, a device has at least one sector of %d", ac.serve.base, view.device.Size(), attach.DefaultBlockSize)
	}
	if err := os.MkdirAll(string(attach.DefaultStates), 0o755); err != nil {
		return err
	}
	dir, err := os.MkdirTemp(string(attach.DefaultStates), "fuse-")
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
	defer func() {
		ctx, cancel := limited()
		defer cancel()
		err = errors.Join(err, loop.Detach(ctx))
	}()
	return holdLoop(c, &ac, view, loop, dir)
}

func holdLoop(c *cli.Context, ac *attachConfig, view *view, loop *attach.Loop, dir string) error {
	signals, stop := deviceSignals()
	defer stop()
	ac.nbd.Size = view.device.Size()
	s := ac.state(loop.Path(), attach.DriverLoop, view.store.Header().UUID.String())
	s.FuseDir = dir
	if err := announce(c, ac, s); err != nil {
		return err
	}
	for sig := range signals {
		if sig == syscall.SIGUSR2 {
			warn(c, "%s: a loop device cannot be handed over", loop.Path())
			continue
		}
		if busy, err := attach.Busy(loop.Path()); busy || err != nil {
			warn(c, "%s is in use, and would not outlive this process: unmount it first", loop.Path())
			continue
		}
		break
	}
	view.device.Release() // writes that wait for room would wait for ever
	return attach.DefaultStates.Remove(s.Device)
}
