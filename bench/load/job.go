package load

import (
	"fmt"
	"math/bits"
	"time"
)

// An Op is what the requests of a job ask for.
type Op string

// The operations.
const (
	Read  Op = "read"
	Write Op = "write"
	Trim  Op = "trim"
	Flush Op = "flush"
)

// A Job is a load on one server. Sizes and offsets are in bytes.
type Job struct {
	Socket string
	Export string `json:",omitempty"`

	Op         Op
	Block      int64 // of a request, and what its offset is a multiple of
	Part       int64 `json:",omitempty"` // bytes of a request where they are fewer
	Depth      int   // requests under way on each connection
	Conns      int
	Sequential bool  `json:",omitempty"` // each connection goes through a part of its own, again and again
	Once       bool  `json:",omitempty"` // random offsets, none twice before all were once
	Start      int64 `json:",omitempty"` // the part of the device that is used; all of it where Range is 0
	Range      int64 `json:",omitempty"`
	FlushEvery int   `json:",omitempty"` // a FLUSH after so many requests of a connection
	Seed       uint64

	// The job ends after Seconds, or once Count requests are answered.
	Seconds float64 `json:",omitempty"`
	Count   int64   `json:",omitempty"`

	// Reads are compared with this file, or with what Write writes there.
	Like    string `json:",omitempty"`
	Written bool   `json:",omitempty"`
}

func (j *Job) check() error {
	switch {
	case j.Block <= 0 || j.Depth <= 0 || j.Conns <= 0:
		return fmt.Errorf("block of %d bytes, depth %d, %d connections: expected more than nothing", j.Block, j.Depth, j.Conns)
	case j.Seconds <= 0 && j.Count <= 0:
		return fmt.Errorf("expected seconds or a count")
	}
	if j.Part == 0 {
		j.Part = j.Block
	}
	return nil
}

// A Result is what came of a job.
type Result struct {
	Requests int64 // without the flushes between them
	Flushes  int64
	Errors   int64 // replies that were errors
	Wrong    int64 // replies whose bytes were not those expected
	Seconds  float64

	Latency      Latency // of all requests
	FlushLatency Latency
	CPU          float64 // seconds that the connections' threads ran
}

// PerSecond returns the requests a second.
func (r *Result) PerSecond() float64 { return float64(r.Requests) / r.Seconds }

// Latency is a distribution, in microseconds.
type Latency struct{ P50, P99, P999, Max float64 }

// A histogram counts durations in classes of 3 %.
type histogram struct {
	count [64 * 32]int64
	total int64
	max   time.Duration
}

func (h *histogram) add(d time.Duration) {
	h.count[class(d)]++
	h.total++
	h.max = max(h.max, d)
}

func (h *histogram) addAll(o *histogram) {
	for i, n := range o.count {
		h.count[i] += n
	}
	h.total += o.total
	h.max = max(h.max, o.max)
}

// class returns which 32nd of which power of two d lies in.
func class(d time.Duration) int {
	n := uint64(max(d, 0))
	if n < 32 {
		return int(n)
	}
	shift := bits.Len64(n) - 6
	return (shift+1)*32 + int(n>>shift)&31
}

// floor returns the shortest duration of a class.
func floor(class int) time.Duration {
	if class < 32 {
		return time.Duration(class)
	}
	return time.Duration(32+class%32) << (class/32 - 1)
}

func (h *histogram) latency() Latency {
	return Latency{h.quantile(0.5), h.quantile(0.99), h.quantile(0.999), micros(h.max)}
}

// quantile returns the microseconds that the part q of all took at most.
func (h *histogram) quantile(q float64) float64 {
	need := int64(q * float64(h.total))
	for i, n := range h.count {
		if need -= n; n > 0 && need <= 0 {
			return micros(floor(i))
		}
	}
	return 0
}

func micros(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }

// offsets yields where the requests of one connection go.
type offsets struct {
	job    *Job
	blocks uint64 // in the range
	next   uint64
	random uint64
}

func newOffsets(j *Job, conn int, size int64) (offsets, error) {
	length := j.Range
	if length == 0 {
		length = size - j.Start
	}
	o := offsets{job: j, blocks: uint64(length / j.Block), random: mix(j.Seed + uint64(conn) + 1)}
	if o.blocks == 0 || j.Start+length > size {
		return o, fmt.Errorf("%d bytes at %d of a device of %d, in blocks of %d", length, j.Start, size, j.Block)
	}
	o.next = uint64(conn)
	if j.Sequential {
		o.next = o.blocks / uint64(j.Conns) * uint64(conn)
	}
	return o, nil
}

func (o *offsets) take() int64 {
	var n uint64
	switch {
	case o.job.Sequential:
		n = o.next % o.blocks
		o.next++
	case o.job.Once:
		n = permuted(o.next%o.blocks, o.blocks, o.job.Seed)
		o.next += uint64(o.job.Conns)
	default:
		o.random ^= o.random << 13
		o.random ^= o.random >> 7
		o.random ^= o.random << 17
		n, _ = bits.Mul64(o.random, o.blocks)
	}
	return o.job.Start + int64(n)*o.job.Block
}

// permuted returns the i-th of a random order of the numbers below n: a
// Feistel network over the smallest even number of bits that holds them,
// walked until it is among them.
func permuted(i, n, seed uint64) uint64 {
	half := max(1, (bits.Len64(n-1)+1)/2)
	mask := uint64(1)<<half - 1
	for {
		left, right := i>>half, i&mask
		for round := range uint64(4) {
			left, right = right, left^mix(right+seed*31+round<<40)&mask
		}
		if i = left<<half | right; i < n {
			return i
		}
	}
}

// mix spreads the bits of x (the finaliser of splitmix64), and is never 0 for
// small ones.
func mix(x uint64) uint64 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}
