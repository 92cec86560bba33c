package main

import (
	"fmt"

	"github.com/cowdev/cowdev/bench/load"
	"github.com/cowdev/cowdev/bench/peer"
)

// Sizes in bytes.
const (
	kib = 1 << 10
	mib = 1 << 20
	gib = 1 << 30

	baseSize  = 2 * gib
	overSize  = 512 * mib // the part of the device that is overlaid where a row reads or overwrites an overlay
	flushSize = 64 * mib  // the part that is overwritten with flushes
)

// A State is what the overlay holds when a row begins.
type State int

// The states.
const (
	Empty   State = iota
	Full          // every block of overSize, written by 64 KiB
	Half          // a random half of the blocks of overSize
	Written       // every block of flushSize, written by 64 KiB
)

// A Row is one line of the table: a load, and what it is meant to reach.
type Row struct {
	ID, Title string
	State     State
	Job       load.Job // without server, and seconds unless it has a count
	Fresh     bool     // an overlay and a server of its own
	Cold      bool     // nothing of base and overlay is in the page cache
	Bandwidth bool     // shown in MiB/s
	Synced    bool     // servers that forget are no match
	Long      bool     // not in the quick run
	Targets   map[peer.Family]Target
}

// A Target is the ratio to the best of a family that must be reached, and the
// one that is hoped for.
type Target struct{ Must, Stretch float64 }

// rows returns the matrix.
func rows() []Row {
	var all []Row
	all = append(all, randomReads()...)
	all = append(all, sequential()...)
	all = append(all, randomWrites()...)
	all = append(all, syncedWrites()...)
	all = append(all, coldReads()...)
	return append(all, trims()...)
}

func trims() []Row {
	trim := func(id, title string, state State, size int64) Row {
		return Row{
			ID: id, Title: "TRIM of 1 MiB of " + title + ", depth 4", State: state, Fresh: true,
			Job:     load.Job{Op: load.Trim, Block: mib, Depth: 4, Conns: 1, Once: true, Range: size, Count: size / mib},
			Targets: map[peer.Family]Target{peer.Qemu: {5, 0}},
		}
	}
	return []Row{trim("trim-over", "the overlay", Full, overSize), trim("trim-base", "the base", Empty, baseSize)}
}

func randomReads() []Row {
	shapes := []struct {
		depth, conns        int
		qemu, nbdkit, limit Target
	}{
		{1, 1, Target{1.2, 1.4}, Target{1.1, 1.2}, Target{0.65, 0.75}},
		{16, 1, Target{3.8, 4.6}, Target{2.4, 3}, Target{0.7, 1}},
		{64, 1, Target{5, 6}, Target{3.2, 3.8}, Target{0.5, 0.64}},
		{16, 4, Target{6.5, 8}, Target{2.2, 2.6}, Target{0.42, 0.5}},
	}
	var all []Row
	for _, from := range []struct {
		id, title string
		state     State
		size      int64
	}{{"base", "the base", Empty, 0}, {"over", "the overlay", Full, overSize}, {"half", "half and half", Half, overSize}} {
		for _, s := range shapes {
			all = append(all, Row{
				ID:      fmt.Sprintf("read-%s-d%dx%d", from.id, s.depth, s.conns),
				Title:   fmt.Sprintf("4 KiB random read, %s, %s", from.title, shape(s.depth, s.conns)),
				State:   from.state,
				Long:    from.state == Full,
				Job:     load.Job{Op: load.Read, Block: 4 * kib, Depth: s.depth, Conns: s.conns, Range: from.size},
				Targets: map[peer.Family]Target{peer.Qemu: s.qemu, peer.Nbdkit: s.nbdkit, peer.Limit: s.limit},
			})
		}
	}
	return all
}

func shape(depth, conns int) string {
	if conns == 1 {
		return fmt.Sprintf("depth %d", depth)
	}
	return fmt.Sprintf("%d connections of depth %d", conns, depth)
}

func sequential() []Row {
	return []Row{
		{
			ID: "seqread-1m", Title: "sequential read, 1 MiB, depth 8", Bandwidth: true,
			Job:     load.Job{Op: load.Read, Block: mib, Depth: 8, Conns: 1, Sequential: true},
			Targets: map[peer.Family]Target{peer.Qemu: {2.4, 2.8}, peer.Nbdkit: {1.35, 1.5}},
		},
		{
			ID: "seqread-128k", Title: "sequential read, 128 KiB, depth 8", Bandwidth: true, Long: true,
			Job:     load.Job{Op: load.Read, Block: 128 * kib, Depth: 8, Conns: 1, Sequential: true},
			Targets: map[peer.Family]Target{peer.Qemu: {2.2, 3.3}, peer.Nbdkit: {1.2, 1.8}},
		},
		{
			ID: "seqwrite-1m", Title: "sequential write, 1 MiB, first touch, depth 8", Bandwidth: true, Fresh: true,
			Job:     load.Job{Op: load.Write, Block: mib, Depth: 8, Conns: 1, Sequential: true, Count: gib / mib},
			Targets: map[peer.Family]Target{peer.Qemu: {1.5, 1.8}, peer.Nbdkit: {1, 1.1}},
		},
	}
}

func randomWrites() []Row {
	first := func(depth int, qemu, nbdkit Target) Row {
		return Row{
			ID: fmt.Sprintf("write-first-d%d", depth), Title: fmt.Sprintf("4 KiB random write, first touch, depth %d", depth), Fresh: true,
			Job:     load.Job{Op: load.Write, Block: 4 * kib, Depth: depth, Conns: 1, Once: true},
			Targets: map[peer.Family]Target{peer.Qemu: qemu, peer.Nbdkit: nbdkit},
		}
	}
	over := func(depth int, qemu, nbdkit Target) Row {
		return Row{
			ID: fmt.Sprintf("write-over-d%d", depth), Title: fmt.Sprintf("4 KiB random overwrite, depth %d", depth), State: Full,
			Job:     load.Job{Op: load.Write, Block: 4 * kib, Depth: depth, Conns: 1, Range: overSize},
			Targets: map[peer.Family]Target{peer.Qemu: qemu, peer.Nbdkit: nbdkit},
		}
	}
	return []Row{
		first(16, Target{4.5, 5.5}, Target{2.5, 3.2}), first(64, Target{4, 5.5}, Target{2.2, 3}),
		over(16, Target{3.5, 5}, Target{1.5, 2}), over(64, Target{4, 6}, Target{1.6, 2.5}),
	}
}

func syncedWrites() []Row {
	first := func(every, conns int, t Target) Row {
		return Row{
			ID: fmt.Sprintf("flush%d-first-x%d", every, conns), Title: fmt.Sprintf("4 KiB random write, first touch, FLUSH after %s", flushes(every, conns)),
			Synced: true, Fresh: true, Long: every > 1,
			Job:     load.Job{Op: load.Write, Block: 4 * kib, Depth: 1, Conns: conns, Once: true, FlushEvery: every},
			Targets: map[peer.Family]Target{peer.Qemu: t},
		}
	}
	over := func(every int, t Target) Row {
		return Row{
			ID: fmt.Sprintf("flush%d-over-x1", every), Title: fmt.Sprintf("4 KiB random overwrite, FLUSH after %s", flushes(every, 1)),
			Synced: true, State: Written, Long: every > 1,
			Job:     load.Job{Op: load.Write, Block: 4 * kib, Depth: 1, Conns: 1, Range: flushSize, FlushEvery: every},
			Targets: map[peer.Family]Target{peer.Qemu: t},
		}
	}
	each := first(1, 1, Target{4, 7})
	each.Targets[peer.Disk] = Target{0.8, 0}
	return []Row{
		each, first(1, 4, Target{4, 6}), first(8, 1, Target{3.2, 5}),
		over(1, Target{1.3, 1.8}), over(8, Target{1.3, 1.6}),
	}
}

func flushes(every, conns int) string {
	s := "each"
	if every > 1 {
		s = fmt.Sprintf("every %d", every)
	}
	if conns > 1 {
		s += fmt.Sprintf(", %d connections", conns)
	}
	return s
}

func coldReads() []Row {
	cold := func(depth int, qemu, nbdkit Target) Row {
		return Row{
			ID: fmt.Sprintf("cold-d%d", depth), Title: fmt.Sprintf("cold cache, 4 KiB random read, depth %d", depth), Fresh: true, Cold: true,
			Job:     load.Job{Op: load.Read, Block: 4 * kib, Depth: depth, Conns: 1, Once: true},
			Targets: map[peer.Family]Target{peer.Qemu: qemu, peer.Nbdkit: nbdkit},
		}
	}
	return []Row{cold(1, Target{1, 1.1}, Target{1.8, 2.5}), cold(64, Target{1.8, 2.5}, Target{4, 5})}
}

// suits reports whether a server can do what the row asks.
func (r *Row) suits(k *peer.Kind) bool {
	prepared := r.State != Empty
	switch k.Family {
	case peer.Limit:
		return r.Targets[peer.Limit] != Target{} || r.Job.Op == load.Read && !r.Cold
	case peer.NoOverlay:
		return r.Job.Op == load.Read && !prepared
	case peer.NbdServer:
		return !prepared && !r.Synced && r.Job.Op != load.Trim
	case peer.Nbdkit:
		return !r.Synced
	}
	return true
}
