package crash

// One session of few changes, over and over: each time it dies at another
// step, or another of its file operations fails. The session that follows is
// looked at in each of its steps, the recovery's before all.

import (
	"testing"
)

// eachConfig is a walk of two sessions, the first with a fate.
func eachConfig(seed uint64, f fate) Config {
	return Config{Seed: seed, Sessions: 2, Steps: 12, Probes: 3, first: &f}
}

// seeds returns how many different sessions are made.
func seeds(t *testing.T) uint64 {
	c := plan(t)
	switch {
	case *huntFlag:
		return 8
	case c.walks > 1000:
		return 200
	}
	return 1
}

func TestDieAtEachStep(t *testing.T) {
	var sum Stats
	for seed := range seeds(t) {
		for _, d := range []Death{Power, Process} {
			for step := 1; ; step++ {
				w := newWorld(eachConfig(seed, fate{left: step, death: d}))
				if err := w.walk(); err != nil {
					t.Fatalf("%v at step %d: %v", d, step, err)
				}
				sum.Add(w.stats)
				if !w.died {
					break
				}
			}
		}
	}
	t.Log(sum)
}

func TestFailEachOperation(t *testing.T) {
	var sum Stats
	for seed := range seeds(t) {
		for op := 1; ; op++ {
			w := newWorld(eachConfig(seed, fate{fault: op}))
			if err := w.walk(); err != nil {
				t.Fatalf("operation %d fails: %v", op, err)
			}
			sum.Add(w.stats)
			if w.stats.Faults == 0 {
				break
			}
		}
	}
	t.Log(sum)
}
