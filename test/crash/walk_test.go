package crash

import (
	"fmt"
	"os"
	"strconv"
	"testing"
	"time"

	"github.com/cowdev/cowdev/internal/crash"
)

// TestWalks makes random walks on the real program: every operation on its
// store's file is seen, and crash states are made of it, as in internal/crash.
// Its deaths by kill -9 are real ones.
func TestWalks(t *testing.T) {
	m := newMount(t)
	walks, limit := uint64(8), 2*time.Second
	if long() {
		walks, limit = 1<<62, campaignTime(t)/4
	}
	for _, mode := range []crash.Config{
		{Clients: 1},
		{Clients: 3},
		{Clients: 1, Faults: true},
	} {
		t.Run(fmt.Sprintf("clients=%d,faults=%v", mode.Clients, mode.Faults), func(t *testing.T) {
			var sum crash.Stats
			begin := time.Now()
			for n := uint64(1); n <= walks && time.Since(begin) < limit; n++ {
				mode.Seed = firstSeed() + n
				mode.Host = newProgramHost(t, m)
				stats, err := crash.Walk(mode)
				sum.Add(stats)
				if err != nil {
					t.Fatalf("%v", err)
				}
			}
			t.Logf("%v in %.1fs", sum, time.Since(begin).Seconds())
		})
	}
}

// long reports whether this is a campaign.
func long() bool { return os.Getenv("COWDEV_LONG") != "" }

// campaignTime is how long a campaign lasts in all.
func campaignTime(t *testing.T) time.Duration {
	s := os.Getenv("COWDEV_CRASH_SECONDS")
	if s == "" {
		return time.Hour
	}
	d, err := time.ParseDuration(s + "s")
	if err != nil {
		t.Fatalf("COWDEV_CRASH_SECONDS: %v", err)
	}
	return d
}

// firstSeed is where seeds begin: a violation tells which it had.
func firstSeed() uint64 {
	if n, err := strconv.ParseUint(os.Getenv("COWDEV_CRASH_SEED"), 10, 64); err == nil {
		return n
	}
	if long() {
		return uint64(time.Now().UnixMicro())
	}
	return 0
}
