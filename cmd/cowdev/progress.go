package main

import (
	"fmt"
	"io"
	"os"
	"time"

	"github.com/schollz/progressbar/v3"
	"github.com/urfave/cli/v2"
	"golang.org/x/term"
)

var quietFlag = &cli.BoolFlag{Name: "quiet", Aliases: []string{"q"}, Usage: "show no progress"}

// plainInterval is how often progress is told where there is no terminal.
const plainInterval = 3 * time.Second

// A progress tells how far a long step is: a bar with rate and time left on a
// terminal, a plain line every few seconds elsewhere, nothing when quiet. It
// is used by one goroutine.
type progress struct {
	what  string
	total int64
	w     io.Writer
	bar   *progressbar.ProgressBar // on a terminal
	begun time.Time
	told  time.Time // of the last plain line
}

// newProgress begins to tell of the step what, which has total bytes to deal
// with.
func newProgress(c *cli.Context, what string, total int64) *progress {
	now := time.Now()
	p := &progress{what: what, total: total, w: c.App.ErrWriter, begun: now, told: now}
	switch {
	case c.Bool(quietFlag.Name):
		p.w = nil
	case isTerminal(p.w):
		p.bar = progressbar.NewOptions64(total,
			progressbar.OptionSetDescription(what),
			progressbar.OptionSetWriter(p.w),
			progressbar.OptionShowBytes(true),
			progressbar.OptionUseIECUnits(true),
			progressbar.OptionThrottle(100*time.Millisecond),
			progressbar.OptionClearOnFinish())
	}
	return p
}

// set says that done bytes have been dealt with.
func (p *progress) set(done int64) {
	switch {
	case p.bar != nil:
		_ = p.bar.Set64(done)
	case p.w != nil && time.Since(p.told) >= plainInterval:
		p.told = time.Now()
		rate := float64(done) / time.Since(p.begun).Seconds()
		left := time.Duration(float64(p.total-done) / max(rate, 1) * float64(time.Second))
		fmt.Fprintf(p.w, "cowdev: %s: %s of %s, %s/s, %s left\n", p.what, short(done), short(p.total),
			short(int64(rate)), left.Round(time.Second))
	}
}

// end takes the bar away.
func (p *progress) end() {
	if p.bar != nil {
		_ = p.bar.Finish()
	}
}

// isTerminal reports whether w is a terminal.
func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}
