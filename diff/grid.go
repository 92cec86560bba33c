package diff

import (
	"fmt"
	"image/color"
	"io"
	"strings"
)

// A Category is what a byte of a picture can be. The first of a grid's
// categories is the ground: it shows only where there is nothing else.
type Category struct {
	Name  string
	Color color.RGBA
}

// A Grid is a picture of a device: cells of equal size in rows, each coloured
// by the category that most of its bytes belong to, the ground left aside, and
// as strongly as they fill it.
type Grid struct {
	Cols, Rows int
	Cell       int64 // bytes of a cell
	Size       int64 // bytes of the device
	Categories []Category

	bytes []int64 // of each cell, by category
}

// NewGrid returns a grid for a device of size bytes, of at most cols times rows
// cells, none of which is smaller than unit bytes.
func NewGrid(size int64, cols, rows int, unit int64, categories []Category) *Grid {
	cells := int64(cols) * int64(rows)
	cell := max(unit, (size+cells-1)/cells)
	cell = (cell + unit - 1) / unit * unit
	used := (size + cell - 1) / cell
	g := &Grid{Cols: int(min(int64(cols), used)), Cell: cell, Size: size, Categories: categories}
	g.Rows = int((used + int64(g.Cols) - 1) / int64(g.Cols))
	g.bytes = make([]int64, used*int64(len(categories)))
	return g
}

// Add says that [off, off+n) belongs to a category.
func (g *Grid) Add(off, n int64, category int) {
	for n > 0 {
		cell := off / g.Cell
		k := min(n, (cell+1)*g.Cell-off)
		g.bytes[cell*int64(len(g.Categories))+int64(category)] += k
		off, n = off+k, n-k
	}
}

// Len returns the number of cells.
func (g *Grid) Len() int { return len(g.bytes) / len(g.Categories) }

// At returns the category of cell i, and the share of its bytes that belong to
// any but the ground: 0 where it is the ground.
func (g *Grid) At(i int) (category int, share float64) {
	counts := g.bytes[i*len(g.Categories):][:len(g.Categories)]
	var sum int64
	for k := 1; k < len(counts); k++ {
		sum += counts[k]
		if counts[k] > 0 && (category == 0 || counts[k] > counts[category]) {
			category = k
		}
	}
	return category, float64(sum) / float64(min(g.Cell, g.Size-int64(i)*g.Cell))
}

// shade returns the colour of cell i: even a little of something is seen.
func (g *Grid) shade(i int) color.RGBA {
	category, share := g.At(i)
	if category == 0 {
		return g.Categories[0].Color
	}
	weight := 0.35 + 0.65*share
	from, to := g.Categories[0].Color, g.Categories[category].Color
	mix := func(a, b uint8) uint8 { return uint8(float64(a)*(1-weight) + float64(b)*weight) }
	return color.RGBA{mix(from.R, to.R), mix(from.G, to.G), mix(from.B, to.B), 255}
}

// used returns the categories that some cell holds.
func (g *Grid) used() []int {
	var used []int
	for k := range g.Categories {
		for i := range g.Len() {
			if g.bytes[i*len(g.Categories)+k] > 0 {
				used = append(used, k)
				break
			}
		}
	}
	return used
}

// marks draw the categories where there is no colour, or cannot be told apart:
// the more of a cell is not the ground, the fuller the mark.
var marks = []string{"·", "░", "▒", "▓", "█"}

// WriteText draws the grid for a terminal, with a legend; in colours if these
// are wanted.
func (g *Grid) WriteText(w io.Writer, colours bool) error {
	var b strings.Builder
	paint := func(c color.RGBA, s string) {
		if colours {
			s = fmt.Sprintf("\x1b[38;2;%d;%d;%dm%s\x1b[0m", c.R, c.G, c.B, s)
		}
		b.WriteString(s)
	}
	for i := range g.Len() {
		category, share := g.At(i)
		mark := marks[0]
		if category > 0 {
			mark = marks[min(len(marks)-1, 1+int(share*float64(len(marks)-1)))]
		}
		paint(g.Categories[category].Color, mark)
		if (i+1)%g.Cols == 0 || i == g.Len()-1 {
			b.WriteByte('\n')
		}
	}
	for _, k := range g.used() {
		mark := marks[len(marks)-1]
		if k == 0 {
			mark = marks[0]
		}
		paint(g.Categories[k].Color, mark)
		fmt.Fprintf(&b, " %s  ", g.Categories[k].Name)
	}
	fmt.Fprintf(&b, "(a mark is %d bytes)\n", g.Cell)
	_, err := io.WriteString(w, b.String())
	return err
}
