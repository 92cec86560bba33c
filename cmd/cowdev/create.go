package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"github.com/cowdev/cowdev/image"
	"github.com/cowdev/cowdev/internal/disk"
)

func createCommand() *cli.Command {
	return &cli.Command{
		Name:        "create",
		Usage:       "Make COW, an empty store over BASE",
		ArgsUsage:   "BASE COW",
		Description: "serve makes a store where there is none; create is for block devices, and for making one beforehand.",
		Flags: append([]cli.Flag{
			chunkSizeFlag,
			&cli.BoolFlag{Name: "force", Usage: "make a store on a block device that is not blank, destroying what it holds"},
		}, baseFlags()...),
		Action: func(c *cli.Context) error {
			args, err := arguments(c, c.Command.ArgsUsage)
			if err != nil {
				return err
			}
			o, err := viewOptionsOf(c)
			if err != nil {
				return err
			}
			if o.chunkSize, err = chunkSizeOf(c); err != nil {
				return err
			}
			return create(c, args[0], args[1], o)
		},
	}
}

func create(c *cli.Context, basePath, cowPath string, o viewOptions) error {
	if err := checkPaths(basePath, cowPath); err != nil {
		return err
	}
	base, err := image.Open(basePath, image.Options{NoExcl: o.noExcl})
	if err != nil {
		return err
	}
	defer base.Close()
	v := &view{base: base}
	f, err := v.newStore(c, cowPath, o)
	if err != nil {
		return err
	}
	return f.Close()
}

// newStore makes the store: a file that does not exist, or a block device.
func (v *view) newStore(c *cli.Context, path string, o viewOptions) (*disk.OS, error) {
	if err := v.checkPlace(path); err != nil {
		return nil, err
	}
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return v.create(path, o)
	case err != nil:
		return nil, err
	case info.Mode()&fs.ModeDevice == 0 || info.Mode()&fs.ModeCharDevice != 0:
		return nil, fmt.Errorf("%s: %w; create makes a new file, remove it or give another name", path, fs.ErrExist)
	}
	f, err := openStoreFile(path, false)
	if err != nil {
		return nil, err
	}
	if err := v.onDevice(f, path, c.Bool("force"), o); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// blankSize is how much of a device's beginning is read to see whether it
// holds anything: every filesystem and partition table shows there.
const blankSize = 2 << 20

// onDevice makes a store on the block device f.
func (v *view) onDevice(f *disk.OS, path string, force bool, o viewOptions) error {
	if !force {
		head := make([]byte, blankSize)
		n, err := f.ReadAt(head, 0)
		if err != nil && err != io.EOF {
			return err
		}
		for i, b := range head[:n] {
			if b != 0 {
				return fmt.Errorf("%s: not blank, byte %d is not zero; --force to destroy what it holds: %w", path, i, unix.EEXIST)
			}
		}
	}
	return v.make(f, path, o)
}
