package vm

import (
	"context"
	"errors"
	"os"
	"testing"
	"time"
)

// Limits of a guest's life. An idle machine boots it in 5 s; one on which that
// takes bootLimit is too slow for what comes after.
const (
	prepareLimit = 90 * time.Second // fetching the kernel included
	bootLimit    = 60 * time.Second
	guestLimit   = 150 * time.Second
	cutLimit     = 90 * time.Second
)

// starved is the share of a processor below which a guest was not given the
// time to keep its own time-outs, of which the kernel has many.
const starved = 0.4

// A guest is a machine of a test.
type guest struct {
	*Machine
	ctx   context.Context // ends with its time
	began time.Time
}

// hungry reports, once the guest is gone, whether it was starved.
func (g *guest) hungry() bool {
	return g.CPU().Seconds() < starved*time.Since(g.began).Seconds()
}

// late reports whether the guest has run out of time. An idle machine needs a
// fraction of it, and a busy one stops a guest for a minute at a time.
func (g *guest) late() bool { return g.ctx.Err() != nil }

// boot starts a guest that lives for at most limit, and waits until its script
// runs. It skips the test, by name, where the machine cannot have a guest's
// kernel or is too slow for one.
func boot(t *testing.T, limit time.Duration, o Options) *guest {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), prepareLimit)
	img, err := Prepare(ctx)
	slow := ctx.Err() != nil
	cancel()
	if errors.Is(err, ErrUnavailable) || slow || err != nil && os.Geteuid() != 0 {
		t.Skipf("%v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel = context.WithTimeout(context.Background(), limit)
	t.Cleanup(cancel)
	o.Dir = t.TempDir()
	start := time.Now()
	m, err := img.Boot(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Cut)
	if !m.WaitReady(bootLimit) {
		m.Cut()
		t.Skipf("machine too slow to boot a guest: not up after %v; console:\n%s", bootLimit, m.Console())
	}
	t.Logf("guest up in %v", time.Since(start).Round(100*time.Millisecond))
	return &guest{m, ctx, start}
}
