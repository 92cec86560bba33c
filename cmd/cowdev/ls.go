package main

import (
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
	if args[1] == "" {
		args[1] = "/"
	}
	return withFile(c, args[0], args[1], true, func(_ *lookView, f files.File) error {
		list := []lsFile{}
		out := lsPrinter(c, &list)
		top := path.Join("/", args[1])
		if err := lsList(f, top, c.Bool("recursive"), out); err != nil {
			return fmt.Errorf("%s: %w", args[0], err)
		}
		if c.Bool("json") {
			return printJSON(c.App.Writer, list)
		}
		if c.Bool("long") {
			return printLong(c.App.Writer, list)
		}
		return nil
	})
}

// lsPrinter returns what takes the files that are listed: names are printed at
// once, everything else is gathered in list.
func lsPrinter(c *cli.Context, list *[]lsFile) func(name string, f files.File) error {
	if !c.Bool("json") && !c.Bool("long") {
		return func(name string, _ files.File) error {
			_, err := fmt.Fprintln(c.App.Writer, files.Quote(name))
			return err
		}
	}
	return func(name string, f files.File) error {
		*list = append(*list, lsFile{name, files.StatOf(f)})
		return nil
	}
}

// lsList calls out for f when it is no directory, else for what it holds: by
// name, or when all is to be listed by path.
func lsList(f files.File, name string, all bool, out func(name string, f files.File) error) error {
	if !f.Attr().Mode.IsDir() {
		return out(path.Base(name), f)
	}
	if all {
		return files.Walk(name, f, out)
	}
	entries, err := f.ReadDir()
	if err != nil {
		return err
	}
	for _, e := range entries {
		child, err := f.Child(e.Name)
		if err != nil {
			return err
		}
		if err := out(e.Name, child); err != nil {
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
