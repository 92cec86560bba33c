package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"image/color"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/urfave/cli/v2"
	"golang.org/x/term"

	"github.com/cowdev/cowdev/block"
	"github.com/cowdev/cowdev/cow"
	"github.com/cowdev/cowdev/diff"
	"github.com/cowdev/cowdev/exception"
	"github.com/cowdev/cowdev/files"
	"github.com/cowdev/cowdev/image"
	"github.com/cowdev/cowdev/internal/disk"
)

func mapCommand() *cli.Command {
	return &cli.Command{
		Name:      "map",
		Usage:     "Show where each part of the device comes from",
		ArgsUsage: "COW [BASE]",
		Description: "On a terminal the device is drawn; elsewhere its extents are listed. With BASE its holes are told,\n" +
			"and a picture shows what the changed bytes are used for where the filesystem is known (ext2/3/4).\n" +
			"No lock is taken: of a store that is being served the last committed state is shown.",
		Flags: []cli.Flag{
			jsonFlag,
			&cli.BoolFlag{Name: "list", Usage: "list extents, on a terminal too"},
			&cli.BoolFlag{Name: "grid", Usage: "draw, not on a terminal too"},
			&cli.BoolFlag{Name: "summary", Usage: "print sums only"},
			&cli.StringFlag{Name: "output", Aliases: []string{"o"}, Usage: "draw into `FILE`, which ends in .svg or .png"},
		},
		Action: func(c *cli.Context) error {
			args, err := arguments(c, c.Command.ArgsUsage)
			if err != nil {
				return err
			}
			output := c.String("output")
			if ext := filepath.Ext(output); output != "" && ext != ".svg" && ext != ".png" {
				return usagef("map: --output %s: expected a name that ends in .svg or .png", output)
			}
			for _, input := range args {
				if disk.SameFile(output, input) {
					return usagef("map: --output %s is %s itself; give another name", output, input)
				}
			}
			return mapDevice(c, args[0], args[1], output)
		},
	}
}

// A mapped is a device that is only looked at, without a lock.
type mapped struct {
	store  *exception.Store
	base   *image.Base // nil where none was given
	device *cow.Device
}

// nowhere is the origin of a device whose base is not known.
type nowhere int64

func (n nowhere) Size() int64 { return int64(n) }

func (n nowhere) ReadAt([]byte, int64) (int, error) {
	return 0, errors.New("the base is not known, give BASE too")
}

// openMapped opens COW, and BASE unless it is empty, for looking.
func openMapped(cowPath, basePath string) (*mapped, error) {
	store, _, err := openLooking(cowPath)
	if err != nil {
		return nil, err
	}
	l := &mapped{store: store}
	var origin cow.Origin = nowhere(store.Geometry().Size)
	if basePath != "" {
		if l.base, err = image.Open(basePath, image.Options{NoLock: true}); err != nil {
			store.Close()
			return nil, err
		}
		if l.base.Size() != store.Geometry().Size {
			l.close()
			return nil, fmt.Errorf("%s: made over a base of %d bytes, %s has %d: %w",
				cowPath, store.Geometry().Size, basePath, l.base.Size(), image.ErrWrongBase)
		}
		origin = l.base
	}
	l.device = cow.New(origin, store, cow.Options{ReadOnly: true})
	return l, nil
}

func (l *mapped) close() error {
	err := l.store.Close()
	if l.base != nil {
		err = errors.Join(err, l.base.Close())
	}
	return err
}

func mapDevice(c *cli.Context, cowPath, basePath, output string) (err error) {
	ctx, stop := untilSignal(c)
	defer stop()
	l, err := openMapped(cowPath, basePath)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.close()) }()
	w := bufio.NewWriter(c.App.Writer)
	defer func() { err = errors.Join(err, w.Flush()) }()
	terminal := isTerminal(c.App.Writer)
	switch {
	case output != "":
		return l.picture(ctx, cowPath, output)
	case c.Bool("summary"):
		return l.summary(w, c.Bool("json"))
	case c.Bool("grid") || terminal && !c.Bool("list") && !c.Bool("json"):
		cols, rows := screen(c.App.Writer)
		g, err := l.grid(ctx, cols, rows)
		if err != nil {
			return err
		}
		return g.WriteText(w, terminal && os.Getenv("NO_COLOR") == "")
	}
	return l.list(ctx, w, c.Bool("json"))
}

// mapExtent is an extent as qemu-img map --output=json has it.
type mapExtent struct {
	Start   int64  `json:"start"`
	Length  int64  `json:"length"`
	Depth   int    `json:"depth"`   // 0 the overlay, 1 the base
	Present bool   `json:"present"` // known to this command
	Zero    bool   `json:"zero"`
	Data    bool   `json:"data"`
	State   string `json:"state"` // stored, zero or base
}

// list prints every extent.
func (l *mapped) list(ctx context.Context, w io.Writer, asJSON bool) error {
	list := newList(w, asJSON)
	if !asJSON {
		fmt.Fprintf(w, "%-14s %-14s %s\n", "start", "length", "state")
	}
	err := diff.Extents(ctx, l.device, func(e block.Extent) error {
		if asJSON {
			m := mapExtent{Start: e.Off, Length: e.N, Present: true, Zero: e.Hole, Data: !e.Hole, State: e.State.String()}
			if e.State == block.FromBase {
				m.Depth, m.Present = 1, l.base != nil
				m.Data = m.Data && m.Present
			}
			return list.add(m)
		}
		state := e.State.String()
		if e.State == block.FromBase && e.Hole {
			state += ", hole"
		}
		_, err := fmt.Fprintf(w, "%-14d %-14d %s\n", e.Off, e.N, state)
		return err
	})
	return errors.Join(err, list.end())
}

// mapSummary is what map --summary prints.
type mapSummary struct {
	Size   int64 `json:"virtual-size"`
	Stored int64 `json:"stored-bytes"`
	Zero   int64 `json:"zero-bytes"`
	Base   int64 `json:"base-bytes"`
}

func (l *mapped) summary(w io.Writer, asJSON bool) error {
	u := usageOf(l.store)
	s := mapSummary{Size: l.device.Size(), Stored: u.stored, Zero: u.zero}
	s.Base = s.Size - s.Stored - s.Zero
	if asJSON {
		return printJSON(w, s)
	}
	t := newTable(w)
	t.line("device", "%s", size(s.Size))
	t.line("stored", "%s", size(s.Stored))
	t.line("zero", "%s", size(s.Zero))
	t.line("from the base", "%s", size(s.Base))
	return t.end()
}

// Categories of a picture. Where the filesystem is not known, what is stored
// is of the one kind stored.
const (
	ofBase = iota
	ofZero
	ofStored
	ofKind // and the kinds of package files from here on
)

var categories = []diff.Category{
	ofBase:                        {Name: "base", Color: color.RGBA{214, 219, 223, 255}},
	ofZero:                        {Name: "zero", Color: color.RGBA{93, 138, 168, 255}},
	ofStored:                      {Name: "stored", Color: color.RGBA{202, 62, 71, 255}},
	ofKind + int(files.Data):      {Name: "stored: file data", Color: color.RGBA{202, 62, 71, 255}},
	ofKind + int(files.Directory): {Name: "stored: directories", Color: color.RGBA{232, 150, 47, 255}},
	ofKind + int(files.Metadata):  {Name: "stored: metadata", Color: color.RGBA{126, 87, 194, 255}},
	ofKind + int(files.Journal):   {Name: "stored: journal", Color: color.RGBA{60, 160, 100, 255}},
	ofKind + int(files.Free):      {Name: "stored: free space", Color: color.RGBA{150, 120, 90, 255}},
	ofKind + int(files.Outside):   {Name: "stored: outside of the filesystem", Color: color.RGBA{90, 90, 90, 255}},
	ofKind + int(files.Unknown):   {Name: "stored: of unknown use", Color: color.RGBA{220, 120, 180, 255}},
}

// screen returns how many cells a terminal has room for.
func screen(w io.Writer) (cols, rows int) {
	cols, rows = 80, 24
	if f, ok := w.(*os.File); ok {
		if width, height, err := term.GetSize(int(f.Fd())); err == nil && width > 0 && height > 0 {
			cols, rows = width, height
		}
	}
	return cols, max(4, rows-4)
}

// grid draws the device.
func (l *mapped) grid(ctx context.Context, cols, rows int) (*diff.Grid, error) {
	g := diff.NewGrid(l.device.Size(), cols, rows, int64(l.device.BlockSize()), categories)
	var stored []block.Extent
	err := diff.Extents(ctx, l.device, func(e block.Extent) error {
		switch e.State {
		case block.FromBase:
			g.Add(e.Off, e.N, ofBase)
		case block.Zero:
			g.Add(e.Off, e.N, ofZero)
		default:
			stored = append(stored, e)
		}
		return nil
	})
	l.addStored(g, stored)
	return g, err
}

// addStored draws what is stored by what it is used for, as far as that is
// known.
func (l *mapped) addStored(g *diff.Grid, stored []block.Extent) {
	for _, k := range l.kinds(stored) {
		g.Add(k.Off, k.N, ofKind+int(k.Kind))
		stored = nil
	}
	for _, e := range stored {
		g.Add(e.Off, e.N, ofStored)
	}
}

// kinds returns what the filesystem uses the extents for, or nothing where
// there is none that can tell.
func (l *mapped) kinds(stored []block.Extent) []files.KindRange {
	if l.base == nil {
		return nil
	}
	fsys, err := files.Open(l.device)
	if err != nil {
		return nil
	}
	kinds, err := files.Kinds(fsys, stored)
	if err != nil {
		return nil
	}
	return kinds
}

// Cells of a picture that is drawn into a file.
const pictureCols, pictureRows = 128, 96

// picture draws the device into a file.
func (l *mapped) picture(ctx context.Context, cowPath, output string) error {
	g, err := l.grid(ctx, pictureCols, pictureRows)
	if err != nil {
		return err
	}
	f, err := os.Create(output)
	if err != nil {
		return err
	}
	title := fmt.Sprintf("%s, %s", filepath.Base(cowPath), short(l.device.Size()))
	if strings.HasSuffix(output, ".svg") {
		err = g.WriteSVG(f, title)
	} else {
		err = g.WritePNG(f, title)
	}
	return errors.Join(err, f.Close())
}
