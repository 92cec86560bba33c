package crash

// Random walks on the device in memory. `go test ./internal/crash` takes some
// seconds for it. COWDEV_LONG=1 makes a campaign on all processors, until
// COWDEV_CRASH_SECONDS are over (an hour unless set) or COWDEV_CRASH_STATES
// states were looked at, from the seed COWDEV_CRASH_SEED on (the time unless
// set). It tells each minute what it has done and which seed is next, so that
// another run can go on from there and the counts be added. A violation tells
// its seed and how to walk it again.

import (
	"flag"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"sync"
	"testing"
	"time"
)

var (
	seedFlag    = flag.Uint64("seed", 0, "walk this seed only (with -clients and -faults)")
	clientsFlag = flag.Int("clients", 1, "clients of the walk of -seed")
	faultsFlag  = flag.Bool("faults", false, "let operations fail in the walk of -seed")
	huntFlag    = flag.Bool("hunt", false, "walk for three minutes, or until a violation is found")
)

func TestMain(m *testing.M) {
	// Walks make much garbage and hold little.
	debug.SetGCPercent(200)
	runtime.MemProfileRate = 0
	os.Exit(m.Run())
}

// modes are the kinds of walk, of each as many as of the others.
var modes = []Config{
	{Clients: 1},
	{Clients: 1, Faults: true},
	{Clients: 3},
	{Clients: 3, Faults: true},
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
	if long() {
		c.run(t, modes)
		return
	}
	for i, mode := range modes {
		t.Run(fmt.Sprintf("clients=%d,faults=%v", mode.Clients, mode.Faults), func(t *testing.T) {
			c.run(t, modes[i:i+1])
		})
	}
}

// long reports whether this is a campaign.
func long() bool { return os.Getenv("COWDEV_LONG") != "" }

// A campaign is how much is walked.
type campaign struct {
	first   uint64        // seed
	walks   uint64        // at most
	states  uint64        // no walk begins after so many
	limit   time.Duration // or after it
	workers int
}

const unlimited = 1 << 62

func plan(t *testing.T) campaign {
	switch {
	case *huntFlag:
		return campaign{1, unlimited, unlimited, 3 * time.Minute, 2}
	case long():
		return campaign{
			first:   setting(t, "COWDEV_CRASH_SEED", uint64(time.Now().UnixMicro())),
			walks:   unlimited,
			states:  setting(t, "COWDEV_CRASH_STATES", unlimited),
			limit:   time.Duration(setting(t, "COWDEV_CRASH_SECONDS", 3600)) * time.Second,
			workers: runtime.GOMAXPROCS(0),
		}
	case testing.Short():
		return campaign{1, 20, unlimited, time.Second, 1}
	}
	return campaign{1, 150, unlimited, 1500 * time.Millisecond, 2}
}

// setting returns the number in an environment variable.
func setting(t *testing.T, name string, otherwise uint64) uint64 {
	s := os.Getenv(name)
	if s == "" {
		return otherwise
	}
	n, err := strconv.ParseUint(s, 10, 62)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return n
}

// A march is a campaign under way.
type march struct {
	campaign
	t     *testing.T
	modes []Config
	begin time.Time

	mu    sync.Mutex
	begun uint64 // walks
	sum   Stats
	ended bool // a violation was found
}

// run walks seeds until enough is done or a violation is found.
func (c campaign) run(t *testing.T, modes []Config) {
	m := &march{campaign: c, t: t, modes: modes, begin: time.Now()}
	var workers sync.WaitGroup
	for range c.workers {
		workers.Go(m.walk)
	}
	over := make(chan struct{})
	go func() {
		workers.Wait()
		close(over)
	}()
	minute := time.NewTicker(time.Minute)
	defer minute.Stop()
	for {
		select {
		case <-minute.C:
			m.tell("so far")
		case <-over:
			m.tell("in all")
			return
		}
	}
}

// walk makes walks until the campaign is over.
func (m *march) walk() {
	for {
		cfg, ok := m.next()
		if !ok {
			return
		}
		stats, err := Walk(cfg)
		m.done(cfg, stats, err)
	}
}

// next returns the walk that is to begin, if there is to be another.
func (m *march) next() (Config, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.ended || m.begun >= m.walks || uint64(m.sum.States) >= m.states || time.Since(m.begin) >= m.limit {
		return Config{}, false
	}
	cfg := m.modes[m.begun%uint64(len(m.modes))]
	cfg.Seed = m.first + m.begun
	m.begun++
	return cfg, true
}

// done takes what came of a walk.
func (m *march) done(cfg Config, stats Stats, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.sum.Add(stats)
	if err == nil || m.ended {
		return
	}
	m.ended = true
	m.t.Errorf("%v\n\nagain: go test ./internal/crash -run TestWalks -seed %d -clients %d -faults=%v", err, cfg.Seed, cfg.Clients, cfg.Faults)
}

// tell says how far the campaign has come, and what it costs.
func (m *march) tell(when string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	elapsed := time.Since(m.begin)
	m.t.Logf("%s, seeds %d to %d: %v; %.1fs, %.0f states a second", when, m.first, m.first+m.begun-1, m.sum,
		elapsed.Seconds(), float64(m.sum.States)/elapsed.Seconds())
}
