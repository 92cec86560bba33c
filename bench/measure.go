package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cowdev/cowdev/bench/load"
	"github.com/cowdev/cowdev/bench/peer"
)

// A Sample is one server's figures for one row in one round.
type Sample struct {
	Row, Server string
	Round       int
	Result      load.Result
	CPU         float64 // seconds that the server ran
	Memory      int64   // bytes of anonymous memory of the server afterwards
	Others      float64 // part of the processors that others used
}

// A bench is a run of the matrix.
type bench struct {
	ctx     context.Context
	self    string // the program, which is the load generator too
	dir     string
	base    string
	kinds   []peer.Kind
	seconds float64
	quiet   float64 // part of the processors that others may use
	patient time.Duration
	logf    func(string, ...any)
}

// maxTries is how often a row is run until it was not disturbed.
const maxTries = 4

// round runs every row on every server, the cold ones last.
func (b *bench) round(n int, rows []Row) ([]Sample, error) {
	var samples []Sample
	for _, cold := range []bool{false, true} {
		if err := warmCache(b.base); err != nil {
			return nil, err
		}
		for i := range b.kinds {
			k := &b.kinds[(i+n)%len(b.kinds)]
			s, err := b.server(k, n, rows, cold)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", k.Name, err)
			}
			samples = append(samples, s...)
		}
	}
	if slices.ContainsFunc(rows, func(r Row) bool { return r.Synced }) {
		s, err := b.appends(n)
		if err != nil {
			return nil, err
		}
		samples = append(samples, s)
	}
	return samples, nil
}

// appends measures how many records of 8 KiB a second the disk takes when each
// is made durable by itself, the cheapest way that there is: a synchronous
// write of the page cache into a zone that was written before.
func (b *bench) appends(round int) (Sample, error) {
	const record, zone = 8 * kib, 16 * mib
	s := Sample{Row: "flush1-first-x1", Server: string(peer.Disk), Round: round}
	f, err := os.Create(filepath.Join(b.dir, "appends"))
	if err != nil {
		return s, err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	p := make([]byte, zone)
	newFiller().Read(p)
	if _, err := f.Write(p); err != nil {
		return s, err
	}
	if err := f.Sync(); err != nil {
		return s, err
	}
	awaitQuiet(b.quiet, b.patient)
	began := time.Now()
	for s.Result.Seconds < b.seconds {
		at := s.Result.Requests * record % zone
		if _, err := unix.Pwritev2(int(f.Fd()), [][]byte{p[at : at+record]}, at, unix.RWF_DSYNC); err != nil {
			return s, err
		}
		s.Result.Requests++
		s.Result.Seconds = time.Since(began).Seconds()
	}
	return s, nil
}

// server runs the rows that suit a server: those that share a state share a
// server and its overlay too, unless a row wants its own.
func (b *bench) server(k *peer.Kind, round int, rows []Row, cold bool) ([]Sample, error) {
	var samples []Sample
	shared := make(map[State][]Row)
	for _, r := range rows {
		if r.Cold != cold || !r.suits(k) {
			continue
		}
		if !r.Fresh {
			shared[r.State] = append(shared[r.State], r)
			continue
		}
		s, err := b.fresh(k, round, r)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", r.ID, err)
		}
		samples = append(samples, s)
	}
	for state := Empty; state <= Written; state++ {
		if len(shared[state]) == 0 {
			continue
		}
		s, err := b.together(k, round, state, shared[state])
		if err != nil {
			return nil, err
		}
		samples = append(samples, s...)
	}
	return samples, nil
}

// fresh runs a row on a server of its own.
func (b *bench) fresh(k *peer.Kind, round int, r Row) (best Sample, err error) {
	for try := range maxTries {
		s, err := b.once(k, round, r)
		if err != nil {
			return best, err
		}
		if try == 0 || s.Others < best.Others {
			best = s
		}
		if best.Others <= b.quiet {
			break
		}
	}
	return best, nil
}

func (b *bench) once(k *peer.Kind, round int, r Row) (s Sample, err error) {
	err = b.with(k, func(f peer.Files) error {
		if !r.Cold {
			return nil
		}
		if _, err := os.Stat(f.Overlay); err == nil {
			if err := dropCache(f.Overlay); err != nil {
				return err
			}
		}
		return dropCache(b.base)
	}, func(srv *peer.Server) error {
		if err := b.prepare(srv, r.State); err != nil {
			return err
		}
		awaitQuiet(b.quiet, b.patient)
		s, err = b.sample(srv, round, r)
		return err
	})
	return s, err
}

// together runs rows that begin with the same state on one server.
func (b *bench) together(k *peer.Kind, round int, state State, rows []Row) (samples []Sample, err error) {
	err = b.with(k, nil, func(srv *peer.Server) error {
		if err := errors.Join(b.prepare(srv, state), b.warm(srv, state)); err != nil {
			return err
		}
		for _, r := range rows {
			var best Sample
			for try := range maxTries {
				awaitQuiet(b.quiet, b.patient)
				s, err := b.sample(srv, round, r)
				if err != nil {
					return fmt.Errorf("%s: %w", r.ID, err)
				}
				if try == 0 || s.Others < best.Others {
					best = s
				}
				if best.Others <= b.quiet {
					break
				}
			}
			samples = append(samples, best)
		}
		return nil
	})
	return samples, err
}

// with runs f beside a new server, on a new overlay which before may look at.
func (b *bench) with(k *peer.Kind, before func(peer.Files) error, f func(*peer.Server) error) error {
	if err := b.ctx.Err(); err != nil {
		return err
	}
	files, err := k.NewFiles(b.dir, b.base)
	defer files.Remove()
	if err == nil && before != nil {
		err = before(files)
	}
	if err != nil {
		return err
	}
	srv, err := k.Start(files)
	if err != nil {
		return err
	}
	err = f(srv)
	return errors.Join(err, srv.Stop())
}

// prepare brings a new overlay into a state, by the same requests for every
// server: how large they are decides how the page cache keeps the overlay.
func (b *bench) prepare(srv *peer.Server, state State) error {
	j := load.Job{Op: load.Write, Depth: 16, Conns: 1, Seed: 99}
	switch {
	case state == Empty || srv.Kind.Fake:
		return nil
	case state == Full:
		j.Block, j.Range, j.Sequential, j.Count = 64*kib, overSize, true, overSize/(64*kib)
	case state == Half:
		j.Block, j.Range, j.Once, j.Count = 4*kib, overSize, true, overSize/(4*kib)/2
	case state == Written:
		j.Block, j.Range, j.Sequential, j.Count = 64*kib, flushSize, true, flushSize/(64*kib)
	}
	if _, err := b.load(srv, j); err != nil {
		return fmt.Errorf("prepare: %w", err)
	}
	_, err := b.load(srv, load.Job{Op: load.Flush, Block: 1, Depth: 1, Conns: 1, Count: 1})
	return err
}

// warm has a server read all that its rows will, once: what a server has to
// learn of pages that are in memory already is not what rows are about.
func (b *bench) warm(srv *peer.Server, state State) error {
	size := int64(overSize)
	switch state {
	case Empty:
		size = baseSize
	case Written:
		size = flushSize
	}
	_, err := b.load(srv, load.Job{Op: load.Read, Block: mib, Depth: 4, Conns: 1, Sequential: true, Range: size, Count: size / mib})
	return err
}

// sample runs one row once.
func (b *bench) sample(srv *peer.Server, round int, r Row) (Sample, error) {
	j := r.Job
	j.Seed = uint64(round) + 1
	if j.Count == 0 {
		j.Seconds = b.seconds
	}
	before, cpu := processorsNow(), srv.CPU()
	res, err := b.load(srv, j)
	if err != nil {
		return Sample{}, err
	}
	s := Sample{Row: r.ID, Server: srv.Kind.Name, Round: round, Result: *res, Memory: srv.Memory()}
	s.CPU = (srv.CPU() - cpu).Seconds()
	if srv.Kind.PerConn { // a process for each connection, which is gone
		s.CPU = 0
	} else {
		s.Others = before.others(time.Duration((s.CPU + res.CPU) * float64(time.Second)))
	}
	return s, nil
}

// load runs a job in a process of its own.
func (b *bench) load(srv *peer.Server, j load.Job) (*load.Result, error) {
	j.Socket, j.Export = srv.Files.Socket, srv.Kind.Export()
	in, err := json.Marshal(j)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(b.ctx, 5*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, b.self, "load")
	var stderr bytes.Buffer
	cmd.Stdin, cmd.Stderr = bytes.NewReader(in), &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("load %s: %w: %s", in, err, bytes.TrimSpace(stderr.Bytes()))
	}
	var res load.Result
	if err := json.Unmarshal(out, &res); err != nil {
		return nil, err
	}
	if res.Errors > 0 || res.Wrong > 0 {
		return nil, fmt.Errorf("load %s: %d errors, %d replies with wrong data", in, res.Errors, res.Wrong)
	}
	return &res, nil
}

// verify checks that a server returns the base's bytes, and what was written.
func (b *bench) verify(k *peer.Kind) error {
	if k.Fake {
		return nil
	}
	const count = 5000
	return b.with(k, nil, func(srv *peer.Server) error {
		jobs := []load.Job{{Op: load.Read, Block: 4 * kib, Count: count, Like: b.base}}
		if !k.ReadOnly && !k.PerConn {
			write := load.Job{Op: load.Write, Block: 4 * kib, Once: true, Count: count, Seed: 5}
			read := write
			read.Op, read.Written = load.Read, true
			jobs = append(jobs, write, read)
		}
		for _, j := range jobs {
			j.Depth, j.Conns = 16, 1
			if _, err := b.load(srv, j); err != nil {
				return err
			}
		}
		return nil
	})
}

// makeBase writes a base of random bytes.
func makeBase(dir string, size int64) (string, error) {
	path := filepath.Join(dir, "base.img")
	f, err := os.Create(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	p := make([]byte, mib)
	fill := newFiller()
	for off := int64(0); off < size; off += int64(len(p)) {
		fill.Read(p)
		if _, err := f.Write(p); err != nil {
			return "", err
		}
	}
	return path, f.Sync()
}
