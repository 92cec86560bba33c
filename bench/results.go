package main

import (
	"bytes"
	"fmt"
	"io"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/cowdev/cowdev/bench/peer"
)

// Results are all that a run measured.
type Results struct {
	Began    time.Time
	Machine  []string
	Versions []string
	Commands []string
	Seconds  float64 // of each row
	Samples  []Sample
	Extras   []Extra
}

// versions asks every program for its version.
func versions(cowdev string) []string {
	var all []string
	for _, cmd := range [][]string{{cowdev, "--version"}, {"qemu-nbd", "--version"}, {"nbdkit", "--version"}, {"nbd-server", "-V"}} {
		all = append(all, firstLine(cmd...))
	}
	return all
}

// firstLine returns the first line that a command prints.
func firstLine(cmd ...string) string {
	out, _ := exec.Command(cmd[0], cmd[1:]...).CombinedOutput()
	line, _, _ := bytes.Cut(out, []byte("\n"))
	return string(line)
}

// commands returns how each server was run.
func commands(kinds []peer.Kind) []string {
	f := peer.Files{Dir: "DIR", Base: "base.img", Overlay: "overlay", Socket: "SOCKET"}
	var all []string
	for _, k := range kinds {
		line := k.Name + ": "
		if k.Create != nil {
			line += commandLine(k.Create(f)) + " && "
		}
		all = append(all, line+commandLine(k.Serve(f)))
	}
	return all
}

// commandLine is args as they would be typed.
func commandLine(args []string) string {
	return strings.Join(append([]string{filepath.Base(args[0])}, args[1:]...), " ")
}

// figures returns a server's requests a second (or MiB) for a row, by round.
func (r *Results) figures(row *Row, server string) map[int]float64 {
	all := make(map[int]float64)
	for i := range r.Samples {
		s := &r.Samples[i]
		if s.Row == row.ID && s.Server == server {
			all[s.Round] = s.Result.PerSecond()
			if row.Bandwidth {
				all[s.Round] *= float64(row.Job.Block) / mib
			}
		}
	}
	return all
}

// A Figure is the median of some rounds and the range that they lie in.
type Figure struct{ Median, Min, Max float64 }

func figureOf(rounds map[int]float64) Figure {
	var all []float64
	for _, v := range rounds {
		all = append(all, v)
	}
	if len(all) == 0 {
		return Figure{}
	}
	slices.Sort(all)
	n := len(all)
	return Figure{(all[(n-1)/2] + all[n/2]) / 2, all[0], all[n-1]}
}

// best returns the member of a family that does a row best, or "".
func (r *Results) best(row *Row, f peer.Family) string {
	if f == peer.Disk {
		return string(f)
	}
	name, best := "", 0.0
	for _, k := range peer.Kinds(peer.Tools{}) {
		if k.Family != f {
			continue
		}
		if v := figureOf(r.figures(row, k.Name)).Median; v > best {
			name, best = k.Name, v
		}
	}
	return name
}

// ratio returns the median of the rounds' ratios of cowdev to a server.
func (r *Results) ratio(row *Row, server string) Figure {
	ours, theirs := r.figures(row, "cowdev"), r.figures(row, server)
	ratios := make(map[int]float64)
	for n, v := range ours {
		if theirs[n] > 0 {
			ratios[n] = v / theirs[n]
		}
	}
	return figureOf(ratios)
}

// families are those that targets are set against, in the order of the tables.
var families = []peer.Family{peer.Qemu, peer.Nbdkit, peer.Limit, peer.Disk}

// printRatios prints a line for each row: the figure, and the ratios with
// their targets.
func (r *Results) printRatios(w io.Writer) error {
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintln(t, "row\tcowdev\tCPU us\tp99 us\tagainst qemu-nbd\tagainst nbdkit cow\tof the limit\tof the disk")
	for _, row := range rows() {
		ours := figureOf(r.figures(&row, "cowdev"))
		if ours.Median == 0 {
			continue
		}
		cpu, p99 := r.costs(&row)
		fmt.Fprintf(t, "%s\t%s\t%.2f\t%.0f", row.ID, row.show(ours.Median), cpu, p99)
		for _, f := range families {
			fmt.Fprintf(t, "\t%s", r.against(&row, f))
		}
		fmt.Fprintln(t)
	}
	return t.Flush()
}

// costs returns cowdev's processor time a request and its 99th percentile of
// latency, in microseconds, as medians.
func (r *Results) costs(row *Row) (cpu, p99 float64) {
	cpus, p99s := make(map[int]float64), make(map[int]float64)
	for i := range r.Samples {
		s := &r.Samples[i]
		if s.Row == row.ID && s.Server == "cowdev" {
			cpus[s.Round] = s.CPU * 1e6 / float64(max(1, s.Result.Requests))
			p99s[s.Round] = s.Result.Latency.P99
		}
	}
	return figureOf(cpus).Median, figureOf(p99s).Median
}

// against tells the ratio to the best of a family, with its target.
func (r *Results) against(row *Row, f peer.Family) string {
	best := r.best(row, f)
	if best == "" {
		return ""
	}
	ratio := r.ratio(row, best).Median
	if ratio == 0 {
		return ""
	}
	target, has := row.Targets[f]
	if !has {
		return fmt.Sprintf("%.2fx", ratio)
	}
	return fmt.Sprintf("%.2fx %s %.2g", ratio, verdict(ratio, target), target.Must)
}

// verdict says how a ratio stands to its target.
func verdict(ratio float64, t Target) string {
	switch {
	case t.Stretch > 0 && ratio >= t.Stretch:
		return "++"
	case ratio >= t.Must:
		return "ok"
	}
	return "MISS"
}

// show prints a figure in the row's unit.
func (r *Row) show(v float64) string {
	switch {
	case r.Bandwidth:
		return fmt.Sprintf("%.0f MiB/s", v)
	case v >= 100e3:
		return fmt.Sprintf("%.0fk/s", v/1e3)
	case v >= 1e3:
		return fmt.Sprintf("%.1fk/s", v/1e3)
	}
	return fmt.Sprintf("%.0f/s", v)
}
