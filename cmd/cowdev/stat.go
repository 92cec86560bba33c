package main

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/cowdev/cowdev/files"
)

func statCommand() *cli.Command {
	return &cli.Command{
		Name:        "stat",
		Usage:       "Show what an image knows of a file, and where it lies",
		ArgsUsage:   "IMAGE PATH",
		Description: imageDescription,
		Flags: lookFlags(
			&cli.BoolFlag{Name: "follow", Aliases: []string{"L"}, Usage: "of a link show what it leads to"},
			jsonFlag,
		),
		Action: stat,
	}
}

// statInfo is what stat prints; the JSON names are part of the interface.
type statInfo struct {
	Path string `json:"path"`
	*files.StatJSON
	Xattrs  map[string][]byte `json:"xattrs,omitempty"`  // base64
	Extents []files.Place     `json:"extents,omitempty"` // in the device
	Overlay *int64            `json:"overlay-bytes,omitempty"`
}

func stat(c *cli.Context) error {
	args, err := arguments(c, c.Command.ArgsUsage)
	if err != nil {
		return err
	}
	return withFile(c, args[0], args[1], c.Bool("follow"), func(v *lookView, f files.File) error {
		info := &statInfo{Path: args[1], StatJSON: files.StatOf(f)}
		if err := info.fill(v, f); err != nil {
			return fmt.Errorf("%s: %s: %w", args[0], args[1], err)
		}
		if c.Bool("json") {
			return printJSON(c.App.Writer, info)
		}
		return info.print(c)
	})
}

// fill adds attributes and places.
func (i *statInfo) fill(v *lookView, f files.File) (err error) {
	if i.Xattrs, err = f.Xattrs(); err != nil {
		return err
	}
	i.Extents, err = files.Places(f)
	if err != nil && !errors.Is(err, files.ErrUnsupported) {
		return err
	}
	if v.stored == nil {
		return nil
	}
	overlay, err := v.overlay()
	if err != nil {
		return nil // a server that cannot tell
	}
	n := int64(0)
	for k := range i.Extents {
		for _, e := range overlay {
			n += max(0, min(e.End(), i.Extents[k].End())-max(e.Off, i.Extents[k].Start))
		}
	}
	for k := range i.Extents {
		i.Extents[k].Start += v.off
	}
	i.Overlay = &n
	return nil
}

func (i *statInfo) print(c *cli.Context) error {
	t := newTable(c.App.Writer)
	t.line("file", "%s", files.Quote(i.Path))
	t.line("type", "%s", i.Type)
	if i.Target != "" {
		t.line("target", "%s", files.Quote(i.Target))
	}
	if i.Device != "" {
		t.line("device", "%s", i.Device)
	}
	t.line("size", "%s", size(i.Size))
	t.line("mode", "%s", i.Mode)
	t.line("owner", "uid %d, gid %d", i.UID, i.GID)
	t.line("inode", "%d, %d links", i.ID, i.Links)
	for _, when := range []struct {
		name string
		t    *time.Time
	}{{"modified", i.Modified}, {"changed", i.Changed}, {"accessed", i.Accessed}, {"born", i.Born}} {
		if when.t != nil {
			t.line(when.name, "%s", when.t.Format(time.RFC3339Nano))
		}
	}
	for _, name := range slices.Sorted(maps.Keys(i.Xattrs)) {
		t.line("attribute", "%s = %q", files.Quote(name), i.Xattrs[name])
	}
	for _, e := range i.Extents {
		t.line("extent", "byte %d: %s at %d", e.Off, size(e.N), e.Start)
	}
	if i.Overlay != nil {
		t.line("in overlay", "%s", size(*i.Overlay))
	}
	return t.end()
}
