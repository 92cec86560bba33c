package main

import (
	"fmt"
	"io"
	"strings"

	"github.com/cowdev/cowdev/bench/guest"
)

// The marks that the part about the guest stands between.
const (
	beginVMMark = "<!-- bench-vm: begin -->"
	endVMMark   = "<!-- bench-vm: end -->"
)

// A measure is what one table shows of some loads.
type measure struct {
	title, note string
	loads       func(*guest.Load) bool
	of          func(*guest.Sample) float64
	format      string
}

func anyLoad(*guest.Load) bool       { return true }
func writes(l *guest.Load) bool      { return l.Write }
func firstWrites(l *guest.Load) bool { return l.Write && !l.Again }

// measures are the tables, the comparable ones first.
var measures = []measure{
	{
		"Bytes written to the store's disk for each byte written", "", writes,
		func(s *guest.Sample) float64 { return float64(s.Written) / float64(s.Bytes) }, "%.2f",
	},
	{
		"Flushes of the store's disk for each write", "", writes,
		func(s *guest.Sample) float64 { return float64(s.Flushes) / float64(s.Requests) }, "%.3f",
	},
	{
		"Bytes read from the base for each byte read or written", "", anyLoad,
		func(s *guest.Sample) float64 { return float64(s.OriginRead) / float64(s.Bytes) }, "%.2f",
	},
	{
		"Bytes taken at rest for each byte written",
		"What the store has grown by since it was empty: sectors allocated (dm-snapshot), slots in use (on the disk), blocks of the file.", firstWrites,
		func(s *guest.Sample) float64 { return float64(s.AtRest) / float64(s.Bytes) }, "%.2f",
	},
	{
		"Requests a second",
		"Under software emulation only ratios mean anything, and they too little: processor time and changes between processes weigh far more than on hardware, and a flush costs next to nothing, for the host syncs nothing.", anyLoad,
		func(s *guest.Sample) float64 { return float64(s.Requests) / s.Seconds }, "%.0f",
	},
}

// write writes the conditions and the tables.
func (r *VMResults) write(w io.Writer) {
	rounds := 0
	for i := range r.Samples {
		rounds = max(rounds, r.Samples[i].Round+1)
	}
	fmt.Fprintf(w, "\nMeasured on %s in %d interleaved rounds: medians, and the range of the rounds where they differ.\n\n", r.Began.Format("2006-01-02"), rounds)
	fmt.Fprintf(w, "- guest: kernel %s, 2 processors, software emulation\n", r.Kernel)
	for _, line := range r.Machine {
		fmt.Fprintf(w, "- %s\n", line)
	}
	fmt.Fprint(w, "\nA device of each system was made so:\n\n```\n")
	for _, s := range guest.Systems() {
		fmt.Fprintf(w, "%s: %s\n", s.Title, s.Commands)
	}
	fmt.Fprint(w, "```\n")
	for i := range measures {
		r.writeMeasure(w, &measures[i])
	}
	r.writeRatios(w)
	r.writeCreation(w)
	fmt.Fprintln(w)
}

func (r *VMResults) writeMeasure(w io.Writer, m *measure) {
	fmt.Fprintf(w, "\n### %s\n\n", m.title)
	if m.note != "" {
		fmt.Fprintf(w, "%s\n\n", m.note)
	}
	writeSystemsHead(w)
	for _, group := range guest.Groups {
		for _, l := range group {
			if !m.loads(&l) {
				continue
			}
			fmt.Fprintf(w, "| %s", l.Title)
			for _, s := range guest.Systems() {
				fmt.Fprintf(w, " | %s", showRange(figureOf(r.figures(l.ID, s.Name, m.of)), m.format))
			}
			fmt.Fprintln(w, " |")
		}
	}
}

// writeRatios compares cowdev's rates with those of either dm-snapshot.
func (r *VMResults) writeRatios(w io.Writer) {
	rate := measures[len(measures)-1].of
	pairs := [][2]string{{"cowdev-disk", "dm-4k"}, {"cowdev-disk", "dm-64k"}, {"cowdev-file", "dm-4k"}, {"cowdev-file", "dm-64k"}}
	fmt.Fprint(w, "\nThe rounds' ratios of requests a second:\n\n|")
	for _, p := range pairs {
		fmt.Fprintf(w, " | %s / %s", p[0], p[1])
	}
	fmt.Fprintf(w, " |\n|---%s|\n", strings.Repeat("|---", len(pairs)))
	for _, group := range guest.Groups {
		for _, l := range group {
			fmt.Fprintf(w, "| %s", l.Title)
			for _, p := range pairs {
				ours, theirs := r.figures(l.ID, p[0], rate), r.figures(l.ID, p[1], rate)
				for n := range ours {
					ours[n] /= theirs[n]
				}
				fmt.Fprintf(w, " | %s", showRange(figureOf(ours), "%.2f"))
			}
			fmt.Fprintln(w, " |")
		}
	}
}

// writeCreation tells what an empty store costs.
func (r *VMResults) writeCreation(w io.Writer) {
	fmt.Fprint(w, "\n### An empty store, made, opened and closed\n\n")
	writeSystemsHead(w)
	for _, row := range []struct {
		title string
		of    func(*guest.Sample) float64
	}{
		{"MiB written to its disk", func(s *guest.Sample) float64 { return float64(s.Written) / mib }},
		{"MiB read from the base", func(s *guest.Sample) float64 { return float64(s.OriginRead) / mib }},
	} {
		fmt.Fprintf(w, "| %s", row.title)
		for _, s := range guest.Systems() {
			fmt.Fprintf(w, " | %s", showRange(figureOf(r.figures(guest.Creation, s.Name, row.of)), "%.3f"))
		}
		fmt.Fprintln(w, " |")
	}
}

func writeSystemsHead(w io.Writer) {
	systems := guest.Systems()
	fmt.Fprint(w, "|")
	for _, s := range systems {
		fmt.Fprintf(w, " | %s", s.Title)
	}
	fmt.Fprintf(w, " |\n|---%s|\n", strings.Repeat("|---", len(systems)))
}

// figures returns a system's figures for a load, by round.
func (r *VMResults) figures(load, system string, of func(*guest.Sample) float64) map[int]float64 {
	all := make(map[int]float64)
	for i := range r.Samples {
		if s := &r.Samples[i]; s.Load == load && s.System == system {
			all[s.Round] = of(s)
		}
	}
	return all
}

// showRange prints a median, and the range where it is not the same.
func showRange(f Figure, format string) string {
	median, low, high := fmt.Sprintf(format, f.Median), fmt.Sprintf(format, f.Min), fmt.Sprintf(format, f.Max)
	if low == high {
		return median
	}
	return fmt.Sprintf("%s (%s to %s)", median, low, high)
}
