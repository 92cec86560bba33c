package main

import (
	"fmt"
	"os"
	"path"
	"path/filepath"

	"github.com/urfave/cli/v2"

	"github.com/cowdev/cowdev/files"
)

func cpCommand() *cli.Command {
	return &cli.Command{
		Name:      "cp",
		Usage:     "Copy files out of an image, without mounting it",
		ArgsUsage: "IMAGE PATH DEST",
		Description: imageDescription + "\n\nDEST is a directory that PATH is put into, or the new file's name. " +
			"Links in DEST that lead out of it are not followed; holes stay holes.",
		Flags: lookFlags(
			&cli.BoolFlag{Name: "recursive", Aliases: []string{"r"}, Usage: "copy directories"},
			&cli.BoolFlag{Name: "archive", Aliases: []string{"a"}, Usage: "copy directories, devices, owners, times, extended attributes and hard links too"},
			&cli.BoolFlag{Name: "force", Aliases: []string{"f"}, Usage: "replace files that exist"},
		),
		Action: cp,
	}
}

func cp(c *cli.Context) error {
	args, err := arguments(c, c.Command.ArgsUsage)
	if err != nil {
		return err
	}
	return withFile(c, args[0], args[1], !c.Bool("archive"), func(_ *lookView, f files.File) error {
		if f.Attr().Mode.IsDir() && !c.Bool("recursive") && !c.Bool("archive") {
			return usagef("%s: %s is a directory; copy it with --recursive", args[0], args[1])
		}
		dir, name := filepath.Split(filepath.Clean(args[2]))
		if info, err := os.Stat(args[2]); err == nil && info.IsDir() {
			dir, name = args[2], path.Base(path.Join("/", args[1]))
			if name == "/" {
				name = "." // all of the image fills the directory
			}
		}
		if dir == "" {
			dir = "."
		}
		root, err := os.OpenRoot(dir)
		if err != nil {
			return err
		}
		defer root.Close()
		var encrypted []string
		skipped, err := files.Extract(f, root, name, files.ExtractOptions{
			Archive: c.Bool("archive"), Replace: c.Bool("force"),
			Encrypted: func(name string) { encrypted = append(encrypted, filepath.Join(dir, name)) },
		})
		for _, s := range skipped {
			warn(c, "%s: passed over, it is neither a file nor a link", filepath.Join(dir, s))
		}
		if err != nil {
			return fmt.Errorf("%s: %w", args[2], err)
		}
		if len(encrypted) > 0 {
			return passedOver(c, encrypted)
		}
		return nil
	})
}
