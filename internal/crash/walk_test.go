package crash

// Random walks on the device in memory. `go test ./internal/crash` takes some
// seconds for it; COWDEV_LONG=1 makes a campaign of COWDEV_CRASH_SECONDS (an
// hour unless set) on all processors, with seeds of its own. A violation tells
// its seed and how to walk it again.

import (
	"flag"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

var (
	seedFlag    = flag.Uint64("seed", 0, "walk this seed only (with -clients and -faults)")
	clientsFlag = flag.Int("clients", 1, "clients of the walk of -seed")
	faultsFlag  = flag.Bool("faults", false, "let operations fail in the walk of -seed")
	huntFlag    = flag.Bool("hunt", false, "walk for a minute, or until a violation is found")
)

func TestMain(m *testing.M) {
	// Walks make much garbage and hold little.
	debug.SetGCPercent(1000)
	runtime.MemProfileRate = 0
	os.Exit(m.Run())
}

func TestWalks(t *testing.T) {
	if *seedFlag != 0 {
		stats, err := Walk(Config{Seed: *seedFlag, Clients: *clientsFlag, Faults: *faultsFlag})
		t.Log(stats)
		if err != nil {
			t.Fatal(err)
		}
		return
	}
	c := plan(t)
	for _, mode := range []Config{
		{Clients: 1},
		{Clients: 1, Faults: true},
		{Clients: 3},
		{Clients: 3, Faults: true},
	} {
		t.Run(fmt.Sprintf("clients=%d,faults=%v", mode.Clients, mode.Faults), func(t *testing.T) {
			c.run(t, mode)
		})
	}
}

// A campaign is how much is walked.
type campaign struct {
	first   uint64        // seed
	walks   uint64        // at most, of a mode
	limit   time.Duration // of a mode: no walk begins after it
	workers int
}

func plan(t *testing.T) campaign {
	switch {
	case *huntFlag:
		return campaign{1, 1 << 62, time.Minute, 2}
	case os.Getenv("COWDEV_LONG") != "":
		seconds := 3600
		if s := os.Getenv("COWDEV_CRASH_SECONDS"); s != "" {
			var err error
			if seconds, err = strconv.Atoi(s); err != nil {
				t.Fatalf("COWDEV_CRASH_SECONDS: %v", err)
			}
		}
		return campaign{uint64(time.Now().UnixMicro()), 1 << 62, time.Duration(seconds) * time.Second / 4, runtime.NumCPU()}
	case testing.Short():
		return campaign{1, 20, time.Second, 1}
	}
	return campaign{1, 150, 1500 * time.Millisecond, 2}
}

// run walks seeds until enough is done or a violation is found.
func (c campaign) run(t *testing.T, mode Config) {
	begin := time.Now()
	var (
		done, failed atomic.Uint64
		mu           sync.Mutex
		sum          Stats
		workers      sync.WaitGroup
	)
	for range c.workers {
		workers.Go(func() {
			for failed.Load() == 0 && time.Since(begin) < c.limit {
				n := done.Add(1)
				if n > c.walks {
					return
				}
				cfg := mode
				cfg.Seed = c.first + n - 1
				stats, err := Walk(cfg)
				mu.Lock()
				sum.Add(stats)
				mu.Unlock()
				if err != nil && failed.Swap(1) == 0 {
					t.Errorf("%v\n\nagain: go test ./internal/crash -run TestWalks -seed %d -clients %d -faults=%v", err, cfg.Seed, cfg.Clients, cfg.Faults)
				}
			}
		})
	}
	workers.Wait()
	t.Logf("from seed %d: %v in %.1fs", c.first, sum, time.Since(begin).Seconds())
}
