package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"

	"github.com/urfave/cli/v2"

	"github.com/cowdev/cowdev/block"
	"github.com/cowdev/cowdev/files"
	"github.com/cowdev/cowdev/image"
	"github.com/cowdev/cowdev/internal/nbdview"
)

// partitionFlag is of the verbs that look into file systems.
var partitionFlag = &cli.IntFlag{Name: "partition", Usage: "look into partition `N` of a GPT or MBR table", DefaultText: "the whole device"}

// lookFlags are the flags of the verbs that look into one image.
func lookFlags(more ...cli.Flag) []cli.Flag {
	own := append([]cli.Flag{
		&cli.StringFlag{Name: "cow", Usage: "look into BASE as it is seen through the overlay `COW`"},
		partitionFlag,
	}, more...)
	return append(own, baseFlags()...)
}

const imageDescription = "IMAGE is a raw image or a block device, or the socket or NBD URI of a running server. " +
	"Nothing is mounted and nothing is written; an ext journal is replayed in memory."

// A lookView is a device that is looked into, cut to the partition that was
// chosen.
type lookView struct {
	block.Reader
	base   block.Reader // the same without the overlay; nil where there is none
	off    int64        // of the partition in the device
	stored func() ([]block.Extent, error)
	close  func() error
	live   bool // somebody may be writing
}

// settled calls do, which prints nothing, again when it met damage on a device
// that is being written: most likely a moment between two writes.
func (v *lookView) settled(do func() error) (err error) {
	const tries = 5
	for range tries {
		err = do()
		if !v.live || exitStatus(err) != exitDamaged {
			return err
		}
	}
	return fmt.Errorf("%w; the device is being written, try again when it rests", err)
}

// openLook opens what a verb looks into: an image, one through its overlay, or
// a running server's device. The caller calls close.
func openLook(c *cli.Context, imagePath, cowPath string) (*lookView, error) {
	switch {
	case nbdview.IsAddress(imagePath, isSocket):
		if cowPath != "" {
			return nil, usagef("--cow: %s is a server, which knows its overlay itself", imagePath)
		}
		return dialLook(c, imagePath)
	case cowPath != "":
		return openPair(c, imagePath, cowPath)
	}
	base, err := openBase(c, imagePath)
	if err != nil {
		return nil, err
	}
	v := &lookView{Reader: base, close: base.Close}
	return v.cut(c, imagePath)
}

// openPair opens BASE and its overlay: a store, or the server that serves it.
func openPair(c *cli.Context, basePath, cowPath string) (*lookView, error) {
	if nbdview.IsAddress(cowPath, isSocket) {
		base, err := openBase(c, basePath)
		if err != nil {
			return nil, err
		}
		server, err := nbdview.Dial(cowPath)
		if err != nil {
			base.Close()
			return nil, err
		}
		v := &lookView{Reader: server, base: base, stored: server.Stored, live: true}
		v.close = func() error { return errors.Join(server.Close(), base.Close()) }
		if err := v.sameBase(basePath, cowPath); err != nil {
			return nil, errors.Join(err, v.close())
		}
		return v.cut(c, cowPath)
	}
	o, err := viewOptionsOf(c)
	if err != nil {
		return nil, err
	}
	o.readOnly, o.existing = true, true
	pair, err := openView(c.Context, c, basePath, cowPath, o)
	if err != nil {
		return nil, ifLocked(err, "name the socket of its server instead of COW")
	}
	v := &lookView{Reader: pair.device, base: pair.base, close: pair.Close}
	v.stored = func() ([]block.Extent, error) { return storedExtents(pair.device) }
	return v.cut(c, basePath)
}

// sameBase looks at some places that the server's overlay does not hold: there
// the server must give the base's bytes. A difference counts when it is still
// there after asking again what the overlay holds.
func (v *lookView) sameBase(basePath, cowPath string) error {
	if v.Size() != v.base.Size() {
		return fmt.Errorf("%s serves %d bytes, %s has %d: %w", cowPath, v.Size(), basePath, v.base.Size(), image.ErrWrongBase)
	}
	for try := 0; ; try++ {
		overlay, err := v.stored()
		if err != nil {
			return fmt.Errorf("%s: %w", cowPath, err)
		}
		off, err := v.strange(overlay)
		if err != nil || off < 0 {
			return err
		}
		if try == 2 {
			return fmt.Errorf("%s: the server %s gives other bytes at %d, which its overlay does not hold: %w", basePath, cowPath, off, image.ErrWrongBase)
		}
	}
}

// strange returns a place outside the overlay where the view differs from the
// base, or -1 when none was found.
func (v *lookView) strange(overlay []block.Extent) (int64, error) {
	const unit, spread, head = 4096, 64, 16
	x, y := make([]byte, unit), make([]byte, unit)
	for i := range int64(spread + head) {
		off := i * unit // where superblocks lie
		if i >= head {
			off = v.Size() / spread * (i - head) / unit * unit
		}
		n := min(unit, v.Size()-off)
		held := slices.ContainsFunc(overlay, func(e block.Extent) bool { return e.Off < off+n && off < e.End() })
		if n <= 0 || held {
			continue
		}
		if _, err := v.base.ReadAt(x[:n], off); err != nil && !errors.Is(err, io.EOF) {
			return 0, err
		}
		if _, err := v.ReadAt(y[:n], off); err != nil && !errors.Is(err, io.EOF) {
			return 0, err
		}
		if !bytes.Equal(x[:n], y[:n]) {
			return off, nil
		}
	}
	return -1, nil
}

func openBase(c *cli.Context, path string) (*image.Base, error) {
	if _, err := viewOptionsOf(c); err != nil {
		return nil, err
	}
	return image.Open(path, image.Options{NoExcl: c.Bool("no-excl")})
}

func dialLook(c *cli.Context, address string) (*lookView, error) {
	server, err := nbdview.Dial(address)
	if err != nil {
		return nil, err
	}
	v := &lookView{Reader: server, stored: server.Stored, close: server.Close, live: true}
	return v.cut(c, address)
}

func isSocket(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode()&fs.ModeSocket != 0
}

// storedExtents returns the extents of d that do not come from its origin.
func storedExtents(d block.Device) ([]block.Extent, error) {
	const most = 4096
	var out []block.Extent
	for off := int64(0); off < d.Size(); {
		extents, err := d.Extents(off, d.Size()-off, most)
		if err != nil {
			return nil, err
		}
		for _, e := range extents {
			if e.State != block.FromBase {
				out = append(out, e)
			}
		}
		off = extents[len(extents)-1].End()
	}
	return out, nil
}

// cut narrows the view of name to the partition that was chosen.
func (v *lookView) cut(c *cli.Context, name string) (*lookView, error) {
	if !c.IsSet("partition") {
		return v, nil
	}
	p, err := files.Choose(v.Reader, c.Int("partition"))
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", name, err), v.close())
	}
	v.off, v.Reader = p.Off, p.In(v.Reader)
	if v.base != nil {
		v.base = p.In(v.base)
	}
	return v, nil
}

// overlay returns what the overlay holds of the view, from its beginning.
func (v *lookView) overlay() ([]block.Extent, error) {
	all, err := v.stored()
	if err != nil {
		return nil, err
	}
	var out []block.Extent
	for _, e := range all {
		from, end := max(e.Off, v.off), min(e.End(), v.off+v.Size())
		if from < end {
			e.Off, e.N = from-v.off, end-from
			out = append(out, e)
		}
	}
	return out, nil
}

// withFile opens an image and a path in it and hands both to do.
func withFile(c *cli.Context, imagePath, path string, follow bool, do func(v *lookView, f files.File) error) (err error) {
	v, err := openLook(c, imagePath, c.String("cow"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, v.close()) }()
	var f files.File
	err = v.settled(func() error {
		fsys, err := files.Open(v)
		if err == nil {
			f, err = files.Lookup(fsys, path, follow)
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("%s: %w", imagePath, err)
	}
	return do(v, f)
}
