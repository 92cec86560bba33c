package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"github.com/cowdev/cowdev/attach"
	"github.com/cowdev/cowdev/files"
	"github.com/cowdev/cowdev/internal/disk"
)

func mountCommand() *cli.Command {
	return &cli.Command{
		Name:      "mount",
		Usage:     "Attach BASE with its changes in COW, and mount its filesystem at DIR",
		ArgsUsage: "BASE COW DIR",
		Description: "It is attach --detach and mount(8) in one, and takes the flags of attach. cowdev umount DIR\n" +
			"undoes both.",
		Flags: append(append(append([]cli.Flag{
			&cli.IntFlag{Name: "partition", Usage: "mount the partition with this number", DefaultText: "the whole device"},
			&cli.StringFlag{Name: "type", Aliases: []string{"t"}, Usage: "type of the filesystem", DefaultText: "recognised"},
			&cli.StringFlag{Name: "options", Aliases: []string{"o"}, Usage: "options of mount(8), comma separated"},
		}, deviceFlags()...), storeFlags()...), baseFlags()...),
		Action: func(c *cli.Context) error {
			args, err := arguments(c, c.Command.ArgsUsage)
			if err != nil {
				return err
			}
			if c.Bool("resume") {
				return usagef("mount: --resume is for cowdev attach")
			}
			dir, err := mountPoint(args[2])
			if err != nil {
				return err
			}
			device, err := startDetached(c, mountWords(c, args))
			if err != nil {
				return err
			}
			if err := mountAttached(c, device, dir); err != nil {
				if s, e := attach.DefaultStates.Find(device); e == nil {
					err = errors.Join(err, detach(c, s))
				}
				return err
			}
			fmt.Fprintf(c.App.Writer, "ready: %s mounted at %s\n", device, dir)
			return nil
		},
	}
}

// mountWords are the words of the attach that a mount begins with.
func mountWords(c *cli.Context, args []string) []string {
	words := attachWords(c)
	return append(words[:len(words)-len(args)], absolute(args[0]), absolute(args[1]))
}

// mountPoint checks that something can be mounted at dir, where no mount of
// ours is, and returns its absolute name without links.
func mountPoint(dir string) (string, error) {
	st, err := os.Stat(dir)
	if err != nil {
		return "", err
	}
	if !st.IsDir() {
		return "", fmt.Errorf("%s: expected a directory: %w", dir, unix.ENOTDIR)
	}
	if os.Geteuid() != 0 {
		return "", fmt.Errorf("mount at %s: only root may: %w", dir, unix.EPERM)
	}
	dir, err = filepath.EvalSymlinks(dir)
	if err != nil {
		return "", err
	}
	if dir, err = filepath.Abs(dir); err != nil {
		return "", err
	}
	if s, err := attach.DefaultStates.Mounted(dir); err == nil && attach.MountedAt(dir) != "" {
		return "", fmt.Errorf("%s: %s is mounted there: %w, pid %d; unmount it first (cowdev umount %s)",
			dir, s.Device, disk.ErrLocked, s.PID, shellWord(dir))
	}
	return dir, nil
}

// mountAttached mounts what the flags of c say of device, and adds it to the
// device's state.
func mountAttached(c *cli.Context, device, dir string) error {
	options := c.String("options")
	if c.Bool("read-only") {
		options += ",ro"
	}
	source := device
	if n := c.Int("partition"); n != 0 {
		part, err := attachPartition(device, n, c.Bool("read-only"))
		if err != nil {
			return err
		}
		defer part.Release() // it goes with the mount
		source = part.Path()
	}
	// Before it is true: umount finds the device, wherever this process ends.
	err := attach.DefaultStates.Update(device, func(s *attach.State) { s.Mounts = append(s.Mounts, dir) })
	if err != nil {
		return err
	}
	return attach.MountDevice(source, dir, c.String("type"), options)
}

// attachPartition makes a device of partition n of device, which goes with
// its last user. It asks nothing of the kernel's own support for partitions.
func attachPartition(device string, n int, readOnly bool) (*attach.Loop, error) {
	f, err := os.Open(device)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	size, err := f.Seek(0, 2)
	if err != nil {
		return nil, err
	}
	parts, table, err := files.Partitions(sized{f, size})
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(parts, func(p files.Part) bool { return p.Number == n })
	if i < 0 {
		if table == "" {
			return nil, usagef("--partition %d: the image has no partition table", n)
		}
		return nil, usagef("--partition %d: the %s table has %d partitions, and not this one", n, table, len(parts))
	}
	return attach.AttachLoop(device, attach.LoopOptions{Off: parts[i].Off, N: parts[i].N, ReadOnly: readOnly, Autoclear: true, Direct: true})
}

// sized makes a block.Reader of a device.
type sized struct {
	*os.File
	size int64
}

func (s sized) Size() int64 { return s.size }
