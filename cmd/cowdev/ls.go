package main

import (
	"bufio"
	"fmt"
	"io"
	"io/fs"
	"path"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/cowdev/cowdev/files"
)

func lsCommand() *cli.Command {
	return &cli.Command{
		Name:        "ls",
		Usage:       "List files in an image, without mounting it",
		ArgsUsage:   "IMAGE [PATH]",
		Description: imageDescription,
		Flags: lookFlags(
			&cli.BoolFlag{Name: "long", Aliases: []string{"l"}, Usage: "mode, links, owner, size and time too"},
			&cli.BoolFlag{Name: "recursive", Aliases: []string{"R"}, Usage: "list what is below directories too, by path"},
			jsonFlag,
		),
		Action: ls,
	}
}

// lsFile is a file that ls lists.
type lsFile struct {
	Path string `json:"path"`
	*files.StatJSON
}

func ls(c *cli.Context) error {
	args, err := arguments(c, c.Command.ArgsUsage)
	if err != nil {
		return err
	}
	top := path.Join("/", args[1])
	return withFile(c, args[0], top, true, func(_ *lookView, f files.File) error {
		var err error
		w := &lister{}
		if c.Bool("json") || c.Bool("long") {
			err = w.attributes(c, f, top)
		} else {
			err = w.names(c.App.Writer, f, top, c.Bool("recursive"))
		}
		if err != nil {
			return fmt.Errorf("%s: %w", args[0], err)
		}
		if len(w.encrypted) > 0 {
			return passedOver(c, w.encrypted)
		}
		return nil
	})
}

// lister lists files, and keeps the paths of directories that it could not.
type lister struct{ encrypted []string }

// walk is files.Walk, past directories that are encrypted.
func (l *lister) walk(top string, f files.File, visit func(name string, f files.File) error) error {
	return files.Walk(top, f, func(name string, f files.File) error {
		if err := visit(name, f); err != nil || !f.Attr().Mode.IsDir() || !files.Encrypted(f) {
			return err
		}
		l.encrypted = append(l.encrypted, name)
		return fs.SkipDir
	})
}

// names prints the names in a directory, or all paths from there on, or f's
// own name when it is no directory. For names no inode is read.
func (l *lister) names(out io.Writer, f files.File, top string, recursive bool) error {
	w := bufio.NewWriter(out)
	switch {
	case !f.Attr().Mode.IsDir():
		fmt.Fprintln(w, files.Quote(path.Base(top)))
	case recursive:
		if err := l.walk(top, f, func(name string, _ files.File) error {
			_, err := fmt.Fprintln(w, files.Quote(name))
			return err
		}); err != nil {
			return err
		}
	default:
		entries, err := f.ReadDir()
		if err != nil {
			return err
		}
		for _, e := range entries {
			fmt.Fprintln(w, files.Quote(e.Name))
		}
	}
	return w.Flush()
}

// attributes prints the same files with their attributes.
func (l *lister) attributes(c *cli.Context, f files.File, top string) error {
	list := []lsFile{}
	add := func(name string, f files.File) error {
		list = append(list, lsFile{name, files.StatOf(f)})
		return nil
	}
	var err error
	switch {
	case !f.Attr().Mode.IsDir():
		err = add(path.Base(top), f)
	case c.Bool("recursive"):
		err = l.walk(top, f, add)
	default:
		err = eachChild(f, add)
	}
	if err != nil {
		return err
	}
	if c.Bool("json") {
		return printJSON(c.App.Writer, list)
	}
	return printLong(c.App.Writer, list)
}

// eachChild calls do for the files in a directory.
func eachChild(dir files.File, do func(name string, f files.File) error) error {
	entries, err := dir.ReadDir()
	if err != nil {
		return err
	}
	for _, e := range entries {
		f, err := dir.Child(e.Name)
		if err != nil {
			return err
		}
		if err := do(e.Name, f); err != nil {
			return err
		}
	}
	return nil
}

// printLong prints files as ls -l does.
func printLong(w io.Writer, list []lsFile) error {
	t := tabwriter.NewWriter(w, 0, 8, 0, ' ', tabwriter.AlignRight)
	for _, f := range list {
		size := fmt.Sprint(f.Size)
		if f.Device != "" {
			size = strings.Replace(f.Device, ":", ", ", 1)
		}
		name := files.Quote(f.Path)
		if f.Target != "" {
			name += " -> " + files.Quote(f.Target)
		}
		when := "-"
		if f.Modified != nil {
			when = f.Modified.Format(time.DateTime)
		}
		fmt.Fprintf(t, "%s\t %d\t %d\t %d\t %s\t %s\t %s\n", modeString(f.FileMode()), f.Links, f.UID, f.GID, size, when, name)
	}
	return t.Flush()
}

// modeString returns a mode in ls's ten letters.
func modeString(mode fs.FileMode) string {
	kinds := map[fs.FileMode]byte{
		fs.ModeDir: 'd', fs.ModeSymlink: 'l', fs.ModeNamedPipe: 'p', fs.ModeSocket: 's',
		fs.ModeDevice: 'b', fs.ModeDevice | fs.ModeCharDevice: 'c', 0: '-',
	}
	out := []byte(mode.Perm().String())
	out[0] = kinds[mode.Type()]
	for _, bit := range []struct {
		mode  fs.FileMode
		at    int
		x, no byte // with and without the right to execute
	}{{fs.ModeSetuid, 3, 's', 'S'}, {fs.ModeSetgid, 6, 's', 'S'}, {fs.ModeSticky, 9, 't', 'T'}} {
		switch {
		case mode&bit.mode == 0:
		case out[bit.at] == 'x':
			out[bit.at] = bit.x
		default:
			out[bit.at] = bit.no
		}
	}
	return string(out)
}
