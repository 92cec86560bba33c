package main

import (
	"fmt"
	"io"

	"github.com/urfave/cli/v2"

	"github.com/cowdev/cowdev/files"
)

func catCommand() *cli.Command {
	return &cli.Command{
		Name:        "cat",
		Usage:       "Print a file of an image, without mounting it",
		ArgsUsage:   "IMAGE PATH",
		Description: imageDescription,
		Flags:       lookFlags(),
		Action: func(c *cli.Context) error {
			args, err := arguments(c, c.Command.ArgsUsage)
			if err != nil {
				return err
			}
			return withFile(c, args[0], args[1], true, func(_ *lookView, f files.File) error {
				n, err := io.Copy(c.App.Writer, io.NewSectionReader(f, 0, f.Attr().Size))
				if err == nil && n < f.Attr().Size {
					err = fmt.Errorf("%w: it ends after %d bytes of %d", files.ErrDamaged, n, f.Attr().Size)
				}
				if a := f.Attr(); err == nil && !a.Mode.IsRegular() {
					err = fmt.Errorf("a %s, expected a regular file: %w", files.TypeName(a.Mode), files.ErrUnsupported)
				}
				if err != nil {
					return fmt.Errorf("%s: %s: %w", args[0], args[1], err)
				}
				return nil
			})
		},
	}
}
