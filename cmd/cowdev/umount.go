package main

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"github.com/cowdev/cowdev/attach"
)

func umountCommand() *cli.Command {
	return &cli.Command{
		Name:        "umount",
		Usage:       "Unmount what cowdev mount mounted at DIR, and detach its device",
		ArgsUsage:   "DIR",
		Description: "What was written is durable when it returns. A filesystem that is in use stays as it is.",
		Action: func(c *cli.Context) error {
			args, err := arguments(c, c.Command.ArgsUsage)
			if err != nil {
				return err
			}
			return umount(c, args[0])
		},
	}
}

func umount(c *cli.Context, dir string) error {
	if real, err := filepath.EvalSymlinks(dir); err == nil {
		dir = real
	}
	dir = absolute(dir)
	s, err := attach.DefaultStates.Mounted(dir)
	if err != nil {
		return err
	}
	// Who unmounted it by other means has left the rest to do.
	if attach.MountedAt(dir) != "" {
		if err := attach.Unmount(dir); errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("%w; a process has a file open or its directory there", err)
		} else if err != nil {
			return err
		}
	}
	err = attach.DefaultStates.Update(s.Device, func(s *attach.State) {
		s.Mounts = slices.DeleteFunc(s.Mounts, func(d string) bool { return d == dir })
	})
	if err != nil {
		return err
	}
	return detach(c, s)
}
