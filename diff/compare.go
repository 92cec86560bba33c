package diff

import (
	"bytes"
	"context"
	"fmt"

	"github.com/cowdev/cowdev/block"
)

// extentsAtOnce bounds the extents that are asked for in one call.
const extentsAtOnce = 4096

// A Lister is a device whose extents can be asked for.
type Lister interface {
	Size() int64
	Extents(off, n int64, limit int) ([]block.Extent, error)
}

// A Device is what is compared with a base.
type Device interface {
	Lister
	block.Reader
	BlockSize() int
}

// Extents calls f for every extent of d in order; neighbours that are alike
// come as one.
func Extents(ctx context.Context, d Lister, f func(block.Extent) error) error {
	var last block.Extent
	for off, size := int64(0), d.Size(); off < size; {
		if err := ctx.Err(); err != nil {
			return err
		}
		extents, err := d.Extents(off, size-off, extentsAtOnce)
		if err != nil {
			return err
		}
		for _, e := range extents {
			off = e.End()
			if last.N > 0 && last.State == e.State && last.Hole == e.Hole {
				last.N += e.N
				continue
			}
			if last.N > 0 {
				if err := f(last); err != nil {
					return err
				}
			}
			last = e
		}
	}
	if last.N == 0 {
		return nil
	}
	return f(last)
}

// A Run is a run of bytes that the overlay has, all of which differ from the
// base, or none, as told by block.
type Run struct {
	Off, N int64
	State  block.State // Stored or Zero
	Equal  bool        // the base has the same bytes there
}

// A Summary adds runs up, in bytes.
type Summary struct {
	Stored    int64 `json:"stored-bytes"`
	Zero      int64 `json:"zero-bytes"`
	Different int64 `json:"different-bytes"` // from the base, of both
	Equal     int64 `json:"equal-bytes"`     // to the base, of both
}

// Add counts a run.
func (s *Summary) Add(r Run) {
	if r.State == block.Stored {
		s.Stored += r.N
	} else {
		s.Zero += r.N
	}
	if r.Equal {
		s.Equal += r.N
	} else {
		s.Different += r.N
	}
}

// Compare calls f for every run that the overlay d has over base, in order.
// Only what the overlay has is read.
func Compare(ctx context.Context, base block.Reader, d Device, f func(Run) error) error {
	c := comparer{base: base, d: d, f: f, a: make([]byte, compareSize), b: make([]byte, compareSize)}
	err := Extents(ctx, d, func(e block.Extent) error {
		if e.State == block.FromBase {
			return nil
		}
		return c.extent(ctx, e)
	})
	if err != nil {
		return err
	}
	return c.flush()
}

// compareSize is how much of both is read at once: whole blocks of any size.
const compareSize = 1 << 20

type comparer struct {
	base block.Reader
	d    Device
	f    func(Run) error
	a, b []byte
	last Run
}

// extent compares one extent, block by block.
func (c *comparer) extent(ctx context.Context, e block.Extent) error {
	bs := int64(c.d.BlockSize())
	for off := e.Off; off < e.End(); {
		if err := ctx.Err(); err != nil {
			return err
		}
		n := min(compareSize, e.End()-off)
		a, b := c.a[:n], c.b[:n]
		if err := readFull(c.base, a, off); err != nil {
			return fmt.Errorf("read the base at %d: %w", off, err)
		}
		if e.State == block.Zero {
			clear(b)
		} else if err := readFull(c.d, b, off); err != nil {
			return fmt.Errorf("read the overlay at %d: %w", off, err)
		}
		for i := int64(0); i < n; {
			// Extents begin where blocks do.
			k := min(bs-(off+i)%bs, n-i)
			if err := c.add(Run{off + i, k, e.State, bytes.Equal(a[i:i+k], b[i:i+k])}); err != nil {
				return err
			}
			i += k
		}
		off += n
	}
	return nil
}

// add passes runs on, neighbours that are alike as one.
func (c *comparer) add(r Run) error {
	if l := &c.last; l.N > 0 && l.Off+l.N == r.Off && l.State == r.State && l.Equal == r.Equal {
		l.N += r.N
		return nil
	}
	err := c.flush()
	c.last = r
	return err
}

func (c *comparer) flush() error {
	if c.last.N == 0 {
		return nil
	}
	return c.f(c.last)
}

func readFull(r block.Reader, p []byte, off int64) error {
	n, err := r.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	return err
}
