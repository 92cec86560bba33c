package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"github.com/cowdev/cowdev/attach"
	"github.com/cowdev/cowdev/attach/nbdnl"
)

func detachCommand() *cli.Command {
	return &cli.Command{
		Name:      "detach",
		Usage:     "End an attached device",
		ArgsUsage: "DEVICE|COW",
		Description: "What was written is durable when it returns. A device that is in use is refused.\n" +
			"A /dev/nbdN that another program connected, or whose server is gone, is ended too.",
		Action: func(c *cli.Context) error {
			args, err := arguments(c, c.Command.ArgsUsage)
			if err != nil {
				return err
			}
			s, err := attach.DefaultStates.Find(args[0])
			if errors.Is(err, attach.ErrNotAttached) {
				if index, notNBD := attach.NBDIndex(args[0]); notNBD == nil && attach.ConnectedNBD(index) {
					return detachForeign(index, attach.OwnerNBD(index))
				}
			}
			if err != nil {
				return err
			}
			return detach(c, s)
		},
	}
}

// detachForeign ends a device of which nobody has told, while it has that owner.
func detachForeign(index int, owner string) error {
	if err := refuseBusy(attach.NBDPath(index)); err != nil {
		return err
	}
	ctx, cancel := limited()
	defer cancel()
	return attach.DisconnectNBD(ctx, index, owner)
}

// detach ends a device and waits until the process that held it is gone.
func detach(c *cli.Context, s *attach.State) error {
	alive := s.Alive()
	if alive || !s.Gone() { // else its name may be that of another device
		if err := refuseBusy(s.Device); err != nil {
			return err
		}
	}
	if !alive {
		return detachOrphan(c, s)
	}
	if err := unix.Kill(s.PID, unix.SIGTERM); err != nil && err != unix.ESRCH {
		return fmt.Errorf("end process %d, which holds %s: %w", s.PID, s.Device, err)
	}
	ctx, cancel := limited()
	defer cancel()
	for s.Alive() {
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s: process %d, which holds it, has not ended within %v; it waits for who has the device open", s.Device, s.PID, usableLimit)
		case <-time.After(10 * time.Millisecond):
		}
	}
	now, err := attach.DefaultStates.Find(s.Device)
	switch {
	case err != nil || !now.SameHolder(s):
		return nil
	case now.Failure != "":
		return fmt.Errorf("%s is detached; its store was not closed in order: %s", s.Device, now.Failure)
	case now.Driver == attach.DriverLoop || now.Gone(): // the process was killed
		return detachOrphan(c, now)
	}
	return fmt.Errorf("%s: came into use, and is not detached: %w", s.Device, unix.EBUSY)
}

// detachOrphan ends a device whose server is gone. The store is opened and
// closed once, so that what was acknowledged and not flushed becomes durable.
func detachOrphan(c *cli.Context, s *attach.State) error {
	if err := removeOrphan(s); err != nil {
		return err
	}
	var sc serveConfig
	if err := parseServe(c, laterFlags(s.Flags), s.Base, s.COW, &sc); err != nil {
		return err
	}
	v, err := openView(c.Context, c, sc.base, sc.cow, sc.view)
	if err != nil {
		return fmt.Errorf("%s is detached; its store was not closed in order: %w", s.Device, err)
	}
	return v.Close()
}

// removeOrphan ends a device whose server is gone, and forgets it.
func removeOrphan(s *attach.State) error {
	ctx, cancel := limited()
	defer cancel()
	var err error
	switch s.Driver {
	case attach.DriverNBD:
		err = disconnectByName(ctx, s)
	case attach.DriverLoop:
		if !s.Gone() {
			err = attach.DetachLoop(ctx, s.Device, attach.FusePath(s.FuseDir))
		}
		// The mount of a FUSE server that died answers ENOTCONN to all else.
		if e := unix.Unmount(s.FuseDir, unix.MNT_DETACH); e != nil && !errors.Is(e, unix.EINVAL) && !errors.Is(e, unix.ENOENT) {
			err = errors.Join(err, fmt.Errorf("unmount %s: %w", s.FuseDir, e))
		}
		os.Remove(s.FuseDir)
	}
	if err != nil {
		return err
	}
	return attach.DefaultStates.Remove(s)
}

func disconnectByName(ctx context.Context, s *attach.State) error {
	index, err := attach.NBDIndex(s.Device)
	if err != nil {
		return err
	}
	owner := s.Owner
	if owner == "" { // noted by a cowdev of before
		owner = attach.OwnerNBD(index)
	}
	if err := attach.DisconnectNBD(ctx, index, owner); err != nil && !errors.Is(err, nbdnl.ErrNoDriver) {
		return err
	}
	return nil
}

// refuseBusy says that a device is in use, and by which mount.
func refuseBusy(device string) error {
	if dir := attach.MountOf(device); dir != "" {
		return fmt.Errorf("%s: mounted at %s, unmount it first (cowdev umount %s): %w", device, dir, shellWord(dir), unix.EBUSY)
	}
	busy, err := attach.Busy(device)
	if err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.ENXIO) {
		return nil // a dead device cannot be opened
	}
	if !busy {
		return nil
	}
	return fmt.Errorf("%s: in use, close it first: %w", device, unix.EBUSY)
}
