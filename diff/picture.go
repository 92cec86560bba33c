package diff

import (
	"bufio"
	"fmt"
	"html"
	"image"
	"image/color"
	"image/draw"
	"image/png"
	"io"

	"golang.org/x/image/font"
	"golang.org/x/image/font/basicfont"
	"golang.org/x/image/math/fixed"
)

// Measures of a picture, in pixels.
const (
	cellSide   = 8
	margin     = 12
	lineHeight = 20
	swatch     = 12
)

var (
	paper = color.RGBA{255, 255, 255, 255}
	ink   = color.RGBA{40, 40, 40, 255}
)

// size returns a picture's width and height.
func (g *Grid) size() (width, height int) {
	legend := len(g.used()) + 1
	return max(360, g.Cols*cellSide+2*margin), (legend+1)*lineHeight + g.Rows*cellSide + 2*margin
}

// cellAt returns the place of cell i.
func (g *Grid) cellAt(i int) image.Rectangle {
	x, y := margin+i%g.Cols*cellSide, margin+lineHeight+i/g.Cols*cellSide
	return image.Rect(x, y, x+cellSide-1, y+cellSide-1)
}

// A label is a line of text, and the colour it explains.
type label struct {
	text  string
	at    image.Point // of the text's base line
	color *color.RGBA
}

// labels returns the picture's texts: the title and the legend.
func (g *Grid) labels(title string) []label {
	out := []label{{text: title, at: image.Pt(margin, margin+10)}}
	y := margin + lineHeight + g.Rows*cellSide + lineHeight
	for _, k := range g.used() {
		c := &g.Categories[k]
		out = append(out, label{c.Name, image.Pt(margin+swatch+8, y), &c.Color})
		y += lineHeight
	}
	return append(out, label{text: fmt.Sprintf("a square is %d bytes", g.Cell), at: image.Pt(margin, y)})
}

// WriteSVG draws the grid as SVG.
func (g *Grid) WriteSVG(out io.Writer, title string) error {
	w := bufio.NewWriter(out)
	width, height := g.size()
	fmt.Fprintf(w, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" font-family="sans-serif" font-size="12">`+"\n", width, height)
	fmt.Fprintf(w, "<rect width=\"100%%\" height=\"100%%\" fill=\"%s\"/>\n", hex(paper))
	// Neighbours of one colour in a row are one rectangle.
	for i := 0; i < g.Len(); {
		c, first, last := g.shade(i), g.cellAt(i), g.cellAt(i)
		for i++; i < g.Len() && i%g.Cols != 0 && g.shade(i) == c; i++ {
			last = g.cellAt(i)
		}
		fmt.Fprintf(w, "<rect x=\"%d\" y=\"%d\" width=\"%d\" height=\"%d\" fill=\"%s\"/>\n",
			first.Min.X, first.Min.Y, last.Max.X-first.Min.X, first.Dy(), hex(c))
	}
	for _, l := range g.labels(title) {
		if l.color != nil {
			fmt.Fprintf(w, "<rect x=\"%d\" y=\"%d\" width=\"%d\" height=\"%d\" fill=\"%s\"/>\n",
				margin, l.at.Y-swatch+2, swatch, swatch, hex(*l.color))
		}
		fmt.Fprintf(w, "<text x=\"%d\" y=\"%d\" fill=\"%s\">%s</text>\n", l.at.X, l.at.Y, hex(ink), html.EscapeString(l.text))
	}
	fmt.Fprintln(w, "</svg>")
	return w.Flush()
}

func hex(c color.RGBA) string { return fmt.Sprintf("#%02x%02x%02x", c.R, c.G, c.B) }

// WritePNG draws the grid as PNG.
func (g *Grid) WritePNG(w io.Writer, title string) error {
	width, height := g.size()
	img := image.NewRGBA(image.Rect(0, 0, width, height))
	fill := func(r image.Rectangle, c color.RGBA) { draw.Draw(img, r, image.NewUniform(c), image.Point{}, draw.Src) }
	fill(img.Bounds(), paper)
	for i := range g.Len() {
		fill(g.cellAt(i), g.shade(i))
	}
	for _, l := range g.labels(title) {
		if l.color != nil {
			fill(image.Rect(margin, l.at.Y-swatch+2, margin+swatch, l.at.Y+2), *l.color)
		}
		d := font.Drawer{Dst: img, Src: image.NewUniform(ink), Face: basicfont.Face7x13, Dot: fixed.P(l.at.X, l.at.Y)}
		d.DrawString(l.text)
	}
	return png.Encode(w, img)
}
