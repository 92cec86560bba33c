package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/cowdev/cowdev/bench/load"
	"github.com/cowdev/cowdev/bench/peer"
)

// An Extra is a figure that is not a rate of requests.
type Extra struct {
	Name, Server string
	Round        int
	Value        float64
	Unit         string
}

// Trials take long: they are run in fewer rounds, and not by the quick run.
const trialRounds = 3

// trialServers have overlays that outlast them, and can be merged.
var trialServers = map[string]bool{"cowdev": true, "qemu": true, "qemu-ext-uring": true}

// trials runs one round of everything but rates.
func (b *bench) trials(round int) ([]Extra, error) {
	var all []Extra
	for i := range b.kinds {
		k := &b.kinds[(i+round)%len(b.kinds)]
		if !trialServers[k.Name] {
			continue
		}
		for _, t := range []func(*peer.Kind) ([]Extra, error){b.mergeScattered, b.mergeSequential, b.mergeOnXFS, b.space, b.synchronousSpace, b.large} {
			if err := b.ctx.Err(); err != nil {
				return nil, err
			}
			extras, err := t(k)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", k.Name, err)
			}
			for _, e := range extras {
				e.Server, e.Round = k.Name, round
				all = append(all, e)
				b.logf("%s: %s: %.4g %s", e.Server, e.Name, e.Value, e.Unit)
			}
		}
	}
	e, err := b.sequentialWrite()
	e.Round = round
	return append(all, e), err
}

const (
	scattered   = "merge of 512 MiB of scattered 4 KiB changes, with sync"
	sequential4 = "merge of a 4 GiB sequential change, with sync"
	onXFS       = "the same on a filesystem with reflinks (XFS on a loop device)"
)

// mergeScattered merges an eighth of a million of blocks into a base.
func (b *bench) mergeScattered(k *peer.Kind) ([]Extra, error) {
	base := filepath.Join(b.dir, "merged.img")
	defer os.Remove(base)
	if err := copyFile(base, b.base); err != nil {
		return nil, err
	}
	s, err := b.merge(k, base, load.Job{Op: load.Write, Block: 4 * kib, Once: true, Count: 512 * mib / (4 * kib)})
	return []Extra{{Name: scattered, Value: s, Unit: "s"}}, err
}

// mergeSequential merges a change of all of a base that is one hole.
func (b *bench) mergeSequential(k *peer.Kind) ([]Extra, error) {
	s, err := b.mergeAll(k, b.dir)
	return []Extra{{Name: sequential4, Value: s, Unit: "s"}}, err
}

// mergeOnXFS is mergeSequential on a filesystem that knows reflinks; nothing
// where that cannot be had.
func (b *bench) mergeOnXFS(k *peer.Kind) (all []Extra, err error) {
	img, at := filepath.Join(b.dir, "xfs.img"), filepath.Join(b.dir, "xfs")
	defer os.Remove(img)
	if err := errors.Join(sparse(img, 12*gib), os.MkdirAll(at, 0o755)); err != nil {
		return nil, err
	}
	defer os.Remove(at)
	if err := errors.Join(peer.Run("mkfs.xfs", "-q", img), peer.Run("mount", "-o", "loop", img, at)); err != nil {
		b.logf("no XFS on a loop device: %v", err)
		return nil, nil
	}
	defer func() { err = errors.Join(err, peer.Run("umount", at)) }()
	s, err := b.mergeAll(k, at)
	return []Extra{{Name: onXFS, Value: s, Unit: "s"}}, err
}

// mergeAll merges a change of all of a base in dir that is one hole.
func (b *bench) mergeAll(k *peer.Kind, dir string) (float64, error) {
	base := filepath.Join(dir, "merged.img")
	defer os.Remove(base)
	if err := sparse(base, 4*gib); err != nil {
		return 0, err
	}
	return b.merge(k, base, load.Job{Op: load.Write, Block: mib, Sequential: true, Count: 4 * gib / mib})
}

// merge makes a change by a server, and returns how long it takes, in seconds,
// to have it in the base for good.
func (b *bench) merge(k *peer.Kind, base string, change load.Job) (float64, error) {
	change.Depth, change.Conns, change.Seed = 16, 1, 7
	f, err := k.NewFiles(filepath.Dir(base), base)
	defer f.Remove()
	if err != nil {
		return 0, err
	}
	srv, err := k.Start(f)
	if err != nil {
		return 0, err
	}
	_, err = b.load(srv, change)
	if err := errors.Join(err, srv.Stop()); err != nil {
		return 0, err
	}
	if err := errors.Join(syncFile(f.Overlay), syncFile(base)); err != nil {
		return 0, err
	}
	awaitQuiet(b.quiet, b.patient)
	began := time.Now()
	if err := peer.Run(k.Merge(f)...); err != nil {
		return 0, err
	}
	err = syncFile(base)
	return time.Since(began).Seconds(), err
}

// sequentialWrite measures what the disk itself needs for 4 GiB.
func (b *bench) sequentialWrite() (Extra, error) {
	e := Extra{Name: sequential4, Server: string(peer.Disk), Unit: "s"}
	f, err := os.Create(filepath.Join(b.dir, "written"))
	if err != nil {
		return e, err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	p := make([]byte, mib)
	newFiller().Read(p)
	began := time.Now()
	for range 4 * gib / mib {
		if _, err := f.Write(p); err != nil {
			return e, err
		}
	}
	err = f.Sync()
	e.Value = time.Since(began).Seconds()
	return e, err
}

// space measures what scattered writes take, without flushes.
func (b *bench) space(k *peer.Kind) ([]Extra, error) {
	return b.spaceOf(k, "4 KiB random writes", load.Job{Count: 20000})
}

// synchronousSpace measures the same with a flush after each.
func (b *bench) synchronousSpace(k *peer.Kind) ([]Extra, error) {
	return b.spaceOf(k, "4 KiB random writes, FLUSH after each", load.Job{Count: 20000, FlushEvery: 1})
}

func (b *bench) spaceOf(k *peer.Kind, what string, j load.Job) ([]Extra, error) {
	j.Op, j.Block, j.Depth, j.Conns, j.Once, j.Seed = load.Write, 4*kib, 1, 1, true, 3
	f, err := k.NewFiles(b.dir, b.base)
	defer f.Remove()
	if err != nil {
		return nil, err
	}
	before, err := allocated(f.Overlay)
	if err != nil {
		return nil, err
	}
	srv, err := k.Start(f)
	if err != nil {
		return nil, err
	}
	awaitQuiet(b.quiet, b.patient)
	disk := diskWritten()
	_, err = b.load(srv, j)
	memory := srv.Memory()
	if err := errors.Join(err, srv.Stop(), syncFile(f.Overlay)); err != nil {
		return nil, err
	}
	written := diskWritten() - disk
	after, err := allocated(f.Overlay)
	bytes := float64(j.Count * j.Block)
	return []Extra{
		{Name: what + ": bytes taken at rest for each byte", Value: float64(after-before) / bytes, Unit: "x"},
		{Name: what + ": bytes written to disks for each byte", Value: float64(written) / bytes, Unit: "x"},
		{Name: what + ": anonymous memory", Value: float64(memory) / mib, Unit: "MiB"},
	}, err
}

// large makes exceptions for more and more chunks of a device of 1 TiB, and
// looks how soon it is ready and how fast a part is read that has some blocks
// stored. All other exceptions are zeroed chunks, which take no data.
func (b *bench) large(k *peer.Kind) ([]Extra, error) {
	base := filepath.Join(b.dir, "large.img")
	defer os.Remove(base)
	if err := sparse(base, 1<<40); err != nil {
		return nil, err
	}
	f, err := k.NewFiles(b.dir, base)
	defer f.Remove()
	if err != nil {
		return nil, err
	}
	trim := func(from, to int64) load.Job {
		const piece = 32 * mib
		return load.Job{Op: load.Trim, Block: piece, Depth: 4, Sequential: true, Start: from, Range: to - from, Count: (to - from) / piece}
	}
	var all []Extra
	for _, stage := range []struct {
		title  string
		change load.Job
	}{
		{"16 thousand", load.Job{Op: load.Write, Block: 4 * kib, Depth: 16, Once: true, Start: hotStart, Range: gib, Count: 64 * kib}},
		{"1 million", trim(hotStart+8*gib, hotStart+72*gib)},
		{"16 million", trim(hotStart+72*gib, 1024*gib)},
	} {
		extras, err := b.stage(k, f, stage.title, stage.change)
		if err != nil {
			return nil, fmt.Errorf("1 TiB, %s exceptions: %w", stage.title, err)
		}
		all = append(all, extras...)
	}
	return all, nil
}

// hotStart is where the gibibyte of a large device begins that is read.
const hotStart = 32 * gib

// stage makes a change to a large device, and then measures it opened anew.
func (b *bench) stage(k *peer.Kind, f peer.Files, title string, change load.Job) ([]Extra, error) {
	change.Conns, change.Seed = 1, 11
	srv, err := k.Start(f)
	if err != nil {
		return nil, err
	}
	_, err = b.load(srv, change)
	if err := errors.Join(err, srv.Stop()); err != nil {
		return nil, err
	}
	awaitQuiet(b.quiet, b.patient)
	if srv, err = k.Start(f); err != nil {
		return nil, err
	}
	ready := srv.Ready
	hot := load.Job{Op: load.Read, Block: 4 * kib, Depth: 64, Conns: 1, Seed: 2, Start: hotStart, Range: gib, Seconds: b.seconds}
	if _, err = b.load(srv, hot); err == nil { // once to warm up
		var res *load.Result
		if res, err = b.load(srv, hot); err == nil {
			name := "1 TiB, " + title + " exceptions: "
			memory := srv.Memory()
			return []Extra{
				{Name: name + "ready", Value: float64(ready.Microseconds()) / 1000, Unit: "ms"},
				{Name: name + "random read, depth 64", Value: res.PerSecond(), Unit: "/s"},
				{Name: name + "anonymous memory", Value: float64(memory) / mib, Unit: "MiB"},
			}, srv.Stop()
		}
	}
	return nil, errors.Join(err, srv.Stop())
}

// sparse makes a file that is one hole.
func sparse(path string, size int64) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Truncate(size)
}

func copyFile(to, from string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.Create(to)
	if err != nil {
		return err
	}
	defer out.Close()
	// Not by ReadFrom, which may share the blocks.
	if _, err := io.CopyBuffer(struct{ io.Writer }{out}, struct{ io.Reader }{in}, make([]byte, mib)); err != nil {
		return err
	}
	return out.Sync()
}

func syncFile(path string) error {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}

// allocated returns the bytes that a file takes.
func allocated(path string) (int64, error) {
	info, err := os.Stat(path)
	if err != nil {
		return 0, err
	}
	return info.Sys().(*syscall.Stat_t).Blocks * 512, nil
}
