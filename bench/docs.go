package main

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cowdev/cowdev/bench/peer"
)

// writeDocs writes benchmarks.md and its figures into dir. The text between
// the marks of a document that is there already is replaced, and the rest of
// it kept: what the figures mean is for people to write.
func (r *Results) writeDocs(dir string) error {
	var w strings.Builder
	r.writeConditions(&w)
	r.writeTargets(&w)
	if err := r.writePlots(&w, dir); err != nil {
		return err
	}
	r.writeFigures(&w)
	r.writeExtras(&w)
	return replaceMarked(filepath.Join(dir, "benchmarks.md"), beginMark, endMark, w.String())
}

// replaceMarked puts text between two marks of a document: in place of what
// is there, or at the end of one that has them not yet.
func replaceMarked(path, begin, end, text string) error {
	old, err := os.ReadFile(path)
	if os.IsNotExist(err) {
		old, err = []byte("# Benchmarks\n"), nil
	}
	if err != nil {
		return err
	}
	before, after := string(old)+"\n", "\n"
	if i := strings.Index(string(old), begin); i >= 0 {
		before = string(old[:i])
		if j := strings.Index(string(old), end); j >= 0 {
			after = string(old[j+len(end):])
		}
	}
	return os.WriteFile(path, []byte(before+begin+"\n"+text+end+after), 0o644)
}

// The marks that what is generated stands between.
const (
	beginMark = "<!-- bench: begin -->"
	endMark   = "<!-- bench: end -->"
)

func (r *Results) writeConditions(w io.Writer) {
	rounds := 0
	var others float64
	for i := range r.Samples {
		rounds = max(rounds, r.Samples[i].Round+1)
		others += r.Samples[i].Others / float64(len(r.Samples))
	}
	fmt.Fprintf(w, "\nMeasured on %s in %d interleaved rounds of %.2g s each row.\n", r.Began.Format("2006-01-02"), rounds, r.Seconds)
	fmt.Fprintf(w, "Other processes used %.0f %% of the processors meanwhile, on average.\n\n", others*100)
	for _, line := range append(r.Machine, r.Versions...) {
		fmt.Fprintf(w, "- %s\n", line)
	}
	fmt.Fprint(w, "\nEach server was run so, at the highest priority, with TMPDIR on the same filesystem:\n\n```\n")
	for _, line := range r.Commands {
		fmt.Fprintln(w, line)
	}
	fmt.Fprint(w, "```\n\n")
}

// writeTargets writes the ratios beside what they are meant to be.
func (r *Results) writeTargets(w io.Writer) {
	fmt.Fprint(w, "## cowdev against the best of each\n\n")
	fmt.Fprint(w, "The median over the rounds of the ratio to the best variant, and (the target). **Bold** misses it, + reaches the stretch.\n\n")
	fmt.Fprint(w, "| | cowdev | server CPU, us | p99, us | qemu-nbd | nbdkit cow | limit | disk |\n|---|---|---|---|---|---|---|---|\n")
	for _, row := range rows() {
		ours := figureOf(r.figures(&row, "cowdev"))
		if ours.Median == 0 {
			continue
		}
		cpu, p99 := r.costs(&row)
		fmt.Fprintf(w, "| %s | %s | %.1f | %.0f |", row.Title, row.show(ours.Median), cpu, p99)
		for _, f := range families {
			fmt.Fprintf(w, " %s |", r.cell(&row, f))
		}
		fmt.Fprintln(w)
	}
	fmt.Fprintln(w)
}

// cell is a ratio and its target in a table.
func (r *Results) cell(row *Row, f peer.Family) string {
	ratio := r.ratio(row, r.best(row, f)).Median
	if ratio == 0 {
		return ""
	}
	target, has := row.Targets[f]
	if !has {
		return fmt.Sprintf("%.2f", ratio)
	}
	s := fmt.Sprintf("%.2f", ratio)
	switch verdict(ratio, target) {
	case "MISS":
		s = "**" + s + "**"
	case "++":
		s += "+"
	}
	return fmt.Sprintf("%s (%.2g)", s, target.Must)
}

// writeFigures writes the median and spread of every server that was run.
func (r *Results) writeFigures(w io.Writer) {
	var names []string
	for _, k := range peer.Kinds(peer.Tools{}) {
		if slices.ContainsFunc(r.Samples, func(s Sample) bool { return s.Server == k.Name }) {
			names = append(names, k.Name)
		}
	}
	fmt.Fprint(w, "## Every server\n\nMedians, and the range of the rounds.\n\n")
	fmt.Fprintf(w, "| | %s |\n|---%s|\n", strings.Join(names, " | "), strings.Repeat("|---", len(names)))
	for _, row := range rows() {
		if figureOf(r.figures(&row, "cowdev")).Median == 0 {
			continue
		}
		fmt.Fprintf(w, "| %s", row.Title)
		for _, name := range names {
			fmt.Fprint(w, " | ")
			if f := figureOf(r.figures(&row, name)); f.Median > 0 {
				fmt.Fprintf(w, "%s (%s to %s)", row.show(f.Median), row.show(f.Min), row.show(f.Max))
			}
		}
		fmt.Fprintln(w, " |")
	}
	fmt.Fprintln(w)
}

// writeExtras writes the figures that are not rates.
func (r *Results) writeExtras(w io.Writer) {
	if len(r.Extras) == 0 {
		return
	}
	servers := []string{"cowdev", "qemu", "qemu-ext-uring", string(peer.Disk)}
	fmt.Fprint(w, "## Merge, space, memory, size\n\n| | cowdev | qemu | qemu-ext-uring | the disk alone |\n|---|---|---|---|---|\n")
	seen := make(map[string]bool)
	for _, e := range r.Extras {
		if seen[e.Name] {
			continue
		}
		seen[e.Name] = true
		fmt.Fprintf(w, "| %s, %s", e.Name, e.Unit)
		for _, s := range servers {
			fmt.Fprint(w, " | ")
			if f := figureOf(r.extra(e.Name, s)); f.Median > 0 {
				fmt.Fprintf(w, "%.4g (%.4g to %.4g)", f.Median, f.Min, f.Max)
			}
		}
		fmt.Fprintln(w, " |")
	}
	fmt.Fprintln(w)
}

// extra returns a server's figures of one name, by round.
func (r *Results) extra(name, server string) map[int]float64 {
	all := make(map[int]float64)
	for _, e := range r.Extras {
		if e.Name == name && e.Server == server {
			all[e.Round] = e.Value
		}
	}
	return all
}
