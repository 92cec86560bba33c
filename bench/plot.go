package main

import (
	"fmt"
	"image/color"
	"io"
	"os"
	"path/filepath"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"

	"github.com/cowdev/cowdev/bench/peer"
)

// A chart is rows that are shown side by side.
type chart struct {
	name, title string
	rows        map[string]string // label -> row, in the order of labels
	labels      []string
	bandwidth   bool
}

func charts() []chart {
	return []chart{
		{name: "reads", title: "4 KiB random reads of the base, thousands a second", labels: []string{"depth 1", "depth 16", "depth 64", "4 x depth 16"},
			rows: map[string]string{"depth 1": "read-base-d1x1", "depth 16": "read-base-d16x1", "depth 64": "read-base-d64x1", "4 x depth 16": "read-base-d16x4"}},
		{name: "writes", title: "4 KiB random writes, thousands a second", labels: []string{"first, 16", "first, 64", "over, 16", "over, 64"},
			rows: map[string]string{"first, 16": "write-first-d16", "first, 64": "write-first-d64", "over, 16": "write-over-d16", "over, 64": "write-over-d64"}},
		{name: "flushes", title: "4 KiB writes with FLUSH, thousands a second", labels: []string{"first, each", "4 clients", "first, of 8", "over, each", "over, of 8"},
			rows: map[string]string{"first, each": "flush1-first-x1", "4 clients": "flush1-first-x4", "first, of 8": "flush8-first-x1", "over, each": "flush1-over-x1", "over, of 8": "flush8-over-x1"}},
		{name: "sequential", title: "Sequential, GiB/s", bandwidth: true, labels: []string{"read 1 MiB", "read 128 KiB", "write 1 MiB"},
			rows: map[string]string{"read 1 MiB": "seqread-1m", "read 128 KiB": "seqread-128k", "write 1 MiB": "seqwrite-1m"}},
		{name: "cold", title: "4 KiB random reads from the disk, thousands a second", labels: []string{"depth 1", "depth 64"},
			rows: map[string]string{"depth 1": "cold-d1", "depth 64": "cold-d64"}},
	}
}

// palette has a colour for each server, in the order of peer.Kinds; a family's
// are shades of one.
var palette = []color.RGBA{
	{0xd9, 0x5f, 0x02, 255}, {0x1b, 0x4f, 0x8a, 255}, {0x4a, 0x86, 0xc5, 255}, {0x9d, 0xc3, 0xe6, 255},
	{0x2e, 0x7d, 0x32, 255}, {0x81, 0xc7, 0x84, 255}, {0xb0, 0xbe, 0xc5, 255}, {0x9c, 0x6f, 0xb5, 255}, {0x42, 0x42, 0x42, 255},
}

// writePlots draws the charts beside the document.
func (r *Results) writePlots(w io.Writer, dir string) error {
	figures := filepath.Join(dir, "benchmarks")
	if err := os.MkdirAll(figures, 0o755); err != nil {
		return err
	}
	for _, c := range charts() {
		if err := r.bars(c, filepath.Join(figures, c.name+".svg")); err != nil {
			return err
		}
		fmt.Fprintf(w, "![%s](benchmarks/%s.svg)\n", c.title, c.name)
	}
	fmt.Fprintln(w)
	return r.growth(w, figures)
}

// bars draws a group of bars for each row, a bar for each server.
func (r *Results) bars(c chart, path string) error {
	p := plot.New()
	p.Title.Text = c.title
	p.Y.Min = 0
	p.Legend.Top, p.Legend.Left = true, true
	p.NominalX(c.labels...)
	width := vg.Points(9)
	var shown []int
	kinds := peer.Kinds(peer.Tools{})
	for i := range kinds {
		for _, l := range c.labels {
			if len(r.figures(&Row{ID: c.rows[l]}, kinds[i].Name)) > 0 {
				shown = append(shown, i)
				break
			}
		}
	}
	all := rows()
	for at, i := range shown {
		values := make(plotter.Values, len(c.labels))
		for n, l := range c.labels {
			for _, row := range all {
				if row.ID == c.rows[l] {
					values[n] = figureOf(r.figures(&row, kinds[i].Name)).Median / 1000
					if c.bandwidth {
						values[n] *= 1000. / 1024
					}
				}
			}
		}
		b, err := plotter.NewBarChart(values, width)
		if err != nil {
			return err
		}
		b.Color, b.LineStyle.Width = palette[i%len(palette)], 0
		b.Offset = width * vg.Length(float64(at)-float64(len(shown)-1)/2)
		p.Add(b)
		p.Legend.Add(kinds[i].Name, b)
	}
	return p.Save(9*vg.Inch, 4*vg.Inch, path)
}

// growth draws how reads of a large device hold up as exceptions come.
func (r *Results) growth(w io.Writer, figures string) error {
	p := plot.New()
	p.Title.Text = "1 TiB device: random reads at depth 64, thousands a second, by exceptions"
	p.Y.Min = 0
	stages := []string{"16 thousand", "1 million", "16 million"}
	p.NominalX(stages...)
	drawn := false
	for i, server := range []string{"cowdev", "qemu", "qemu-ext-uring"} {
		var points plotter.XYs
		for n, s := range stages {
			if f := figureOf(r.extra("1 TiB, "+s+" exceptions: random read, depth 64", server)); f.Median > 0 {
				points = append(points, plotter.XY{X: float64(n), Y: f.Median / 1000})
			}
		}
		if len(points) == 0 {
			continue
		}
		line, marks, err := plotter.NewLinePoints(points)
		if err != nil {
			return err
		}
		line.Color, marks.Color = palette[i], palette[i]
		p.Add(line, marks)
		p.Legend.Add(server, line)
		drawn = true
	}
	if !drawn {
		return nil
	}
	fmt.Fprintf(w, "![%s](benchmarks/growth.svg)\n\n", p.Title.Text)
	return p.Save(9*vg.Inch, 3.5*vg.Inch, filepath.Join(figures, "growth.svg"))
}
