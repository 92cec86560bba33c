package load

// The parts of the generator that results rest on: where requests go, how
// latencies are counted, and that all of it is counted against a real server.

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/cowdev/cowdev/bench/limit"
)

func TestPermutedIsAPermutation(t *testing.T) {
	for _, n := range []uint64{1, 2, 3, 100, 1 << 10, 1<<10 + 1, 5000} {
		seen := make([]bool, n)
		for i := range n {
			at := permuted(i, n, 7)
			if at >= n || seen[at] {
				t.Fatalf("of %d: %d goes to %d, beyond the end or a second time", n, i, at)
			}
			seen[at] = true
		}
	}
}

func TestHistogram(t *testing.T) {
	for _, d := range []time.Duration{0, 1, 31, 32, 33, 1000, 123456, time.Second, time.Hour} {
		low := floor(class(d))
		if low > d || float64(d-low) > 0.032*float64(d) {
			t.Errorf("%v counts as %v", d, low)
		}
	}
	var h histogram
	for i := range 1000 {
		h.add(time.Duration(i+1) * time.Microsecond)
	}
	if l := h.latency(); l.P50 < 480 || l.P50 > 500 || l.P99 < 960 || l.P99 > 990 || l.Max != 1000 {
		t.Errorf("of 1 to 1000 us: %+v", l)
	}
}

func TestJobs(t *testing.T) {
	dir := t.TempDir()
	base, socket := filepath.Join(dir, "base"), filepath.Join(dir, "s")
	if err := os.WriteFile(base, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	go limit.Main(socket, base)
	for began := time.Now(); ; time.Sleep(time.Millisecond) {
		if _, err := os.Stat(socket); err == nil {
			break
		}
		if time.Since(began) > time.Minute {
			t.Fatal("the limit server does not listen after a minute")
		}
	}
	for _, j := range []Job{
		{Op: Read, Block: 4096, Depth: 16, Conns: 2, Count: 1000},
		{Op: Read, Block: 1 << 19, Depth: 8, Conns: 1, Sequential: true, Count: 100},
		{Op: Write, Block: 4096, Depth: 64, Conns: 1, Once: true, Count: 1000, FlushEvery: 8},
		{Op: Write, Block: 1 << 20, Depth: 4, Conns: 1, Count: 64},
		{Op: Trim, Block: 1 << 16, Depth: 1, Conns: 1, Count: 10},
	} {
		j.Socket, j.Seed = socket, 1
		res, err := Run(j)
		if err != nil {
			t.Fatalf("%+v: %v", j, err)
		}
		if res.Requests != j.Count || res.Errors != 0 || j.FlushEvery > 0 && res.Flushes < j.Count/int64(j.FlushEvery)-1 {
			t.Errorf("%+v: %+v", j, res)
		}
	}
	// A server that answers with something else is found out.
	res, err := Run(Job{Socket: socket, Op: Read, Block: 4096, Depth: 4, Conns: 1, Count: 100, Seed: 1, Like: base})
	if err != nil || res.Wrong != 100 {
		t.Errorf("wrong bytes: %+v, %v", res, err)
	}
}
