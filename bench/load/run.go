package load

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"runtime"
	"runtime/debug"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Main is the whole of a process that runs one job: it reads it from r as JSON
// and writes its result to w.
func Main(r io.Reader, w io.Writer) error {
	var j Job
	if err := json.NewDecoder(r).Decode(&j); err != nil {
		return fmt.Errorf("job: %w", err)
	}
	// A thread in one of our system calls cannot be stopped for a collection
	// of garbage, and keeps its processor from other goroutines.
	debug.SetGCPercent(-1)
	runtime.GOMAXPROCS(j.Conns + 2)
	res, err := Run(j)
	if err != nil {
		return err
	}
	return json.NewEncoder(w).Encode(res)
}

// Run runs a job in this process, in which nothing else happens.
func Run(j Job) (*Result, error) {
	if err := j.check(); err != nil {
		return nil, err
	}
	like, err := mapFile(j.Like)
	if err != nil {
		return nil, err
	}
	var stop atomic.Bool
	conns := make([]*conn, j.Conns)
	for i := range conns {
		if conns[i], err = dial(&j, i, &stop); err != nil {
			return nil, fmt.Errorf("connection %d: %w", i, err)
		}
		conns[i].like = like
	}
	began := time.Now()
	ended := make(chan error, len(conns))
	for _, c := range conns {
		c.began = began
		go func() { ended <- c.run() }()
	}
	if j.Seconds > 0 {
		time.AfterFunc(time.Duration(j.Seconds*float64(time.Second)), func() { stop.Store(true) })
	}
	for range conns {
		if e := <-ended; e != nil {
			return nil, e
		}
	}
	return sum(conns, time.Since(began)), nil
}

// sum adds up what the connections counted.
func sum(conns []*conn, took time.Duration) *Result {
	res := &Result{Seconds: took.Seconds()}
	var latency, flushes histogram
	for _, c := range conns {
		c.close()
		res.Requests += c.result.Requests
		res.Flushes += c.result.Flushes
		res.Errors += c.result.Errors
		res.Wrong += c.result.Wrong
		res.CPU += c.cpu.Seconds()
		latency.addAll(&c.latency)
		flushes.addAll(&c.flushes)
	}
	res.Latency, res.FlushLatency = latency.latency(), flushes.latency()
	return res
}

func mapFile(path string) ([]byte, error) {
	if path == "" {
		return nil, nil
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	return unix.Mmap(int(f.Fd()), 0, int(info.Size()), unix.PROT_READ, unix.MAP_SHARED)
}
