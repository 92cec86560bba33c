package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"github.com/cowdev/cowdev/files"
	"github.com/cowdev/cowdev/internal/disk"
)

func cpCommand() *cli.Command {
	return &cli.Command{
		Name:      "cp",
		Usage:     "Copy files out of an image, without mounting it",
		ArgsUsage: "IMAGE PATH DEST",
		Description: imageDescription + "\n\nDEST is a directory that PATH is put into, or the new file's name; with a " +
			"slash at its end it must be a directory. Links in DEST that lead out of it are not followed; holes stay holes.",
		Flags: lookFlags(
			&cli.BoolFlag{Name: "recursive", Aliases: []string{"r"}, Usage: "copy directories"},
			&cli.BoolFlag{Name: "archive", Aliases: []string{"a"}, Usage: "copy directories, devices, owners, times, extended attributes and hard links too"},
			&cli.BoolFlag{Name: "force", Aliases: []string{"f"}, Usage: "replace files and symbolic links that exist"},
		),
		Action: cp,
	}
}

func cp(c *cli.Context) error {
	args, err := arguments(c, c.Command.ArgsUsage)
	if err != nil {
		return err
	}
	ctx, stop := untilSignal(c)
	defer stop()
	context.AfterFunc(ctx, stop) // a second signal ends what waits for a server
	return withFile(c, args[0], args[1], !c.Bool("archive"), func(_ *lookView, f files.File) error {
		if f.Attr().Mode.IsDir() && !c.Bool("recursive") && !c.Bool("archive") {
			return usagef("%s: %s is a directory; copy it with --recursive", args[0], args[1])
		}
		dir, name, err := destination(args[1], args[2])
		if err != nil {
			return err
		}
		var inputs []fs.FileInfo
		for _, input := range []string{args[0], c.String("cow")} {
			if info, err := os.Stat(input); err == nil {
				inputs = append(inputs, info)
			}
			if to := filepath.Join(dir, name); input != "" && disk.SameFile(to, input) {
				return usagef("cp: %s is %s itself; give another name", to, input)
			}
		}
		root, err := os.OpenRoot(dir)
		if err != nil {
			return err
		}
		defer root.Close()
		var encrypted []string
		skipped, err := files.Extract(ctx, f, root, name, files.ExtractOptions{
			Archive: c.Bool("archive"), Replace: c.Bool("force"), Keep: inputs,
			Encrypted: func(name string) { encrypted = append(encrypted, filepath.Join(dir, name)) },
		})
		for _, s := range skipped {
			warn(c, "%s: passed over, it is neither a file nor a link", filepath.Join(dir, s))
		}
		if errors.Is(err, fs.ErrExist) && !c.Bool("force") {
			err = fmt.Errorf("%w; --force replaces files and symbolic links", err)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", args[0], err)
		}
		if len(encrypted) > 0 {
			return passedOver(c, encrypted)
		}
		return nil
	})
}

// destination returns the directory that exists, and the name in it, that the
// file at source is copied to.
func destination(source, dest string) (dir, name string, err error) {
	info, err := os.Stat(dest)
	if err == nil && info.IsDir() {
		name = path.Base(path.Join("/", source))
		if name == "/" {
			name = "." // all of the image fills the directory
		}
		return dest, name, nil
	}
	dir, name = filepath.Split(dest)
	if name == "" || name == "." || name == ".." {
		return "", "", fmt.Errorf("%s: expected a directory that exists; make it first: %w", dest, unix.ENOTDIR)
	}
	if dir == "" {
		dir = "."
	}
	return dir, name, nil
}
