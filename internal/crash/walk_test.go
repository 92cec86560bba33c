package crash

import (
	"flag"
	"os"
	"runtime"
	"runtime/debug"
	"testing"
)

var seedFlag = flag.Uint64("seed", 0, "")
var walksFlag = flag.Uint64("walks", 200, "")
var clientsFlag = flag.Int("clients", 1, "")
var faultsFlag = flag.Bool("faults", false, "")

func TestMain(m *testing.M) {
	// Walks make much garbage and hold little.
	debug.SetGCPercent(1000)
	runtime.MemProfileRate = 0
	os.Exit(m.Run())
}

func TestWalk(t *testing.T) {
	var sum Stats
	for seed := range *walksFlag {
		s, err := Walk(Config{Seed: seed + *seedFlag, Clients: *clientsFlag, Faults: *faultsFlag})
		sum.Add(s)
		if err != nil {
			t.Fatal(err)
		}
	}
	t.Log(sum)
}
