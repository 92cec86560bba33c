package diff

// Comparing an overlay with its base tells exactly the blocks that differ;
// pictures hold every byte once.

import (
	"bytes"
	"context"
	"encoding/xml"
	"errors"
	"image/color"
	"image/png"
	"io"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/cowdev/cowdev/block"
)

// memory is a device in memory that says which blocks it has.
type memory struct {
	*bytes.Reader
	block  int
	states []block.State
}

func (m memory) BlockSize() int { return m.block }

func (m memory) Extents(off, n int64, limit int) ([]block.Extent, error) {
	var out []block.Extent
	for off < m.Size() && len(out) < limit && n > 0 {
		end := min(m.Size(), (off/int64(m.block)+1)*int64(m.block))
		s := m.states[off/int64(m.block)]
		out = append(out, block.Extent{Off: off, N: end - off, State: s, Hole: s == block.Zero})
		n -= end - off
		off = end
	}
	return out, nil
}

// random makes a base and an overlay over it, of which some blocks have the
// same bytes.
func random(seed uint64, size, bs int) (base []byte, d memory) {
	rng := rand.New(rand.NewPCG(seed, 1))
	base = make([]byte, size)
	for i := range base {
		base[i] = byte(rng.Uint32() & 1)
	}
	now := bytes.Clone(base)
	d = memory{block: bs, states: make([]block.State, (size+bs-1)/bs)}
	for i := range d.states {
		p := now[i*bs : min(size, (i+1)*bs)]
		d.states[i] = block.State(rng.IntN(3))
		switch {
		case d.states[i] == block.Zero:
			clear(p)
		case d.states[i] == block.Stored && rng.IntN(2) == 0:
			p[rng.IntN(len(p))] ^= 1
		}
	}
	clear(base[size/3 : size/2])
	for i := size / 3; i < size/2; i++ {
		if d.states[i/bs] == block.FromBase {
			now[i] = 0
		}
	}
	d.Reader = bytes.NewReader(now)
	return base, d
}

func TestCompare(t *testing.T) {
	for seed := range uint64(20) {
		const bs = 512
		size := 100_000 + int(seed)*37
		base, d := random(seed, size, bs)
		seen := make([]bool, size)
		var sum Summary
		var last Run
		err := Compare(context.Background(), bytes.NewReader(base), d, func(r Run) error {
			sum.Add(r)
			if last.N > 0 && last.Off+last.N == r.Off && last.State == r.State && last.Equal == r.Equal {
				t.Errorf("seed %d: %+v and %+v are one run", seed, last, r)
			}
			last = r
			for off := r.Off; off < r.Off+r.N; {
				end := min(r.Off+r.N, (off/bs+1)*bs)
				now := make([]byte, end-off)
				d.ReadAt(now, off)
				if equal := bytes.Equal(now, base[off:end]); equal != r.Equal || d.states[off/bs] != r.State {
					t.Errorf("seed %d: block at %d: %+v, equal is %v, state %v", seed, off, r, equal, d.states[off/bs])
				}
				for i := off; i < end; i++ {
					seen[i] = true
				}
				off = end
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		for i, s := range seen {
			if s != (d.states[i/bs] != block.FromBase) {
				t.Fatalf("seed %d: byte %d in a run is %v, its state %v", seed, i, s, d.states[i/bs])
			}
		}
		if sum.Stored+sum.Zero != sum.Different+sum.Equal {
			t.Errorf("seed %d: %+v does not add up", seed, sum)
		}
	}
}

func TestCompareEnds(t *testing.T) {
	base, d := random(1, 50_000, 512)
	boom := errors.New("boom")
	if err := Compare(context.Background(), bytes.NewReader(base), d, func(Run) error { return boom }); err != boom {
		t.Errorf("an error of the caller's: %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := Compare(ctx, bytes.NewReader(base), d, func(Run) error { return nil }); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

var testCategories = []Category{
	{"ground", color.RGBA{220, 220, 220, 255}}, {"red", color.RGBA{200, 0, 0, 255}}, {"<blue>", color.RGBA{0, 0, 200, 255}},
}

func TestGrid(t *testing.T) {
	for _, size := range []int64{1, 511, 512, 100_000, 1<<40 + 5} {
		g := NewGrid(size, 40, 10, 512, testCategories)
		if g.Cols > 40 || g.Rows > 10 || g.Cell%512 != 0 || int64(g.Len())*g.Cell < size || int64(g.Len()-1)*g.Cell >= size {
			t.Fatalf("size %d: %d columns, %d rows, %d cells of %d", size, g.Cols, g.Rows, g.Len(), g.Cell)
		}
		g.Add(0, size, 1)
		for i := range g.Len() {
			if c, share := g.At(i); c != 1 || share != 1 {
				t.Fatalf("size %d, cell %d: category %d, share %v", size, i, c, share)
			}
		}
	}
}

func TestPictures(t *testing.T) {
	g := NewGrid(1<<20, 16, 16, 4096, testCategories)
	g.Add(0, 1<<20-8192, 0)
	g.Add(1<<20-8192, 4096, 1)
	g.Add(1<<20-4096, 100, 2)
	var svg, image, text bytes.Buffer
	if err := errors.Join(g.WriteSVG(&svg, "a & b"), g.WritePNG(&image, "a & b"), g.WriteText(&text, false)); err != nil {
		t.Fatal(err)
	}
	for dec := xml.NewDecoder(&svg); ; {
		if _, err := dec.Token(); err == io.EOF {
			break
		} else if err != nil {
			t.Fatalf("not XML: %v", err)
		}
	}
	img, err := png.Decode(&image)
	if err != nil {
		t.Fatal(err)
	}
	at := g.cellAt(g.Len() - 2).Min
	if c := color.RGBAModel.Convert(img.At(at.X, at.Y)); c != testCategories[1].Color {
		t.Errorf("the cell that is all red is %v", c)
	}
	lines := strings.Split(text.String(), "\n")
	if want := "··············█░"; lines[15] != want {
		t.Errorf("last row %q, expected %q", lines[15], want)
	}
	if want := "· ground  █ red  █ <blue>  (a mark is 4096 bytes)"; lines[16] != want {
		t.Errorf("legend %q, expected %q", lines[16], want)
	}
}
