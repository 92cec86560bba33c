package crash

// Every verb that changes a store or a base, in any order, by the real program:
// after each the device, the base and what is told of them are what a model
// says.

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/cowdev/cowdev/block"
	"github.com/cowdev/cowdev/exception"
	"github.com/cowdev/cowdev/internal/crash"
	"github.com/cowdev/cowdev/internal/disk"
	"github.com/cowdev/cowdev/internal/disktest"
	"github.com/cowdev/cowdev/internal/nbd"
)

func TestVerbs(t *testing.T) {
	sequences(t, 6*time.Second, newVerbs, func(v *verbs) {
		v.session()
		v.close(v.cow)
	})
}

// sequences does sequences of verbs, each of a seed of its own, until limit, or
// as long as a campaign lasts, and ends each by end.
func sequences(t *testing.T, limit time.Duration, begin func(*testing.T, uint64) *verbs, end func(*verbs)) {
	if long() {
		limit = campaignTime(t) / 4
	}
	var counts verbCounts
	began, first := time.Now(), firstSeed()
	seed := first
	for ; time.Since(began) < limit && !t.Failed(); seed++ {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			v := begin(t, seed)
			v.count = &counts
			for range 12 {
				v.step()
			}
			end(v)
		})
	}
	t.Logf("%d sequences: %+v in %.1fs", seed-first, counts, time.Since(began).Seconds())
}

type verbCounts struct {
	sessions, kills, forgotten, cut, changes, full, merges, interrupted, images, copies, backups, diffs, checks int
}

// verbs is a base and a store, and what they must be.
type verbs struct {
	t     *testing.T
	rng   *rand.Rand
	dir   string
	base  string
	cow   string
	chunk string
	place place
	known        // what the device reads as
	under []byte // what the base does
	half  bool   // the base is half merged
	count *verbCounts

	mu      sync.Mutex // of what several connections change
	began   bool       // the server has done a change
	durable []byte     // what the device read as at the last flush
	since   []changed  // since then, in order
	doubt   []changed  // sent and not answered when the server ended
}

// changed is what a range of the device was made.
type changed struct {
	off int64
	p   []byte
	fua bool // and durable at once
}

func newVerbs(t *testing.T, seed uint64) *verbs {
	rng := rand.New(rand.NewPCG(seed, 1))
	v := newVerbsOf(t, rng, []int{512, 64 << 10, 1<<20 + 512, 3<<20 + 1001, 12 << 20}[rng.IntN(5)])
	v.makeBase()
	return v
}

// newVerbsOf returns verbs of size bytes, without their base.
func newVerbsOf(t *testing.T, rng *rand.Rand, size int) *verbs {
	dir := shortDir(t)
	v := &verbs{
		t: t, rng: rng, dir: dir, base: filepath.Join(dir, "base"), cow: filepath.Join(dir, "cow"),
		chunk: []string{"8K", "16K", "32K", "64K", "128K", "1M"}[rng.IntN(6)], known: newKnown(size),
	}
	return v
}

// makeBase writes the base, which is all zeros, or is made.
func (v *verbs) makeBase() {
	v.t.Helper()
	all := hand{v: v, rng: v.rng, to: int64(len(v.content))}
	for range v.rng.IntN(4) { // the rest are holes
		off, n := all.place(1 << 20)
		crash.Stamp(v.content[off:off+n], off, crash.BaseStamp)
	}
	v.under, v.durable = bytes.Clone(v.content), bytes.Clone(v.content)
	f, err := os.OpenFile(v.base, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		v.t.Fatal(err)
	}
	defer f.Close()
	if !v.place.baseDevice {
		if err := f.Truncate(int64(len(v.under))); err != nil {
			v.t.Fatal(err)
		}
	}
	for off := 0; off < len(v.under); off += 4096 {
		if p := v.under[off:min(off+4096, len(v.under))]; bytes.ContainsFunc(p, func(r rune) bool { return r != 0 }) {
			if _, err := f.WriteAt(p, int64(off)); err != nil {
				v.t.Fatal(err)
			}
		}
	}
}

func (v *verbs) step() {
	v.t.Helper()
	if _, err := os.Stat(v.cow); err != nil {
		v.session()
		return
	}
	v.fillOrNot()
	switch v.rng.IntN(10) {
	case 8:
		v.repair()
	case 9:
		v.anew()
	case 0:
		v.copied()
	case 1:
		v.backup()
	case 2:
		v.image()
	case 3:
		v.merge()
	case 4:
		v.check()
	case 5:
		v.diff()
	default:
		v.session()
	}
	if p, err := os.ReadFile(v.base); err != nil || !v.half && !bytes.Equal(p, v.under) {
		v.t.Errorf("the base is not what it was (%v)", err)
	}
}

// run runs a verb, which ends with one of the statuses, and returns which and
// what it says.
func (v *verbs) run(statuses string, args ...string) (status, out string) {
	v.t.Helper()
	out, err := command(patience, program, append(args, "--quiet")...)
	if status = strconv.Itoa(exitStatus(err)); !slices.Contains(strings.Fields(statuses), status) {
		v.t.Fatalf("%s ended with %s, expected one of %s: %v\n%s", args, status, statuses, err, out)
	}
	return status, out
}

// serveOn serves a store, and holds what it shows against the model.
func (v *verbs) serveOn(cow string) *server {
	v.t.Helper()
	flags := append([]string{"--chunk-size", v.chunk, "--format=raw", "--detect-zeroes", []string{"on", "off"}[v.rng.IntN(2)]}, v.place.flags...)
	s, err := serve(v.dir, append(flags, v.base, cow)...)
	if err != nil {
		v.t.Fatal(err)
	}
	v.t.Cleanup(func() { // before its filesystem goes
		s.kill()
		s.wait()
	})
	if v.dev, err = s.dial(); err != nil {
		v.t.Fatal(err)
	}
	for _, c := range v.doubt {
		if err := v.either(v.dev, c.off, c.p); err != nil {
			v.t.Fatalf("what was not answered: %v", err)
		}
	}
	v.doubt, v.began = nil, false
	v.same("at the beginning")
	return s
}

// same holds the device against the model.
func (v *verbs) same(when string) {
	v.t.Helper()
	v.equal(v.all(when), when)
}

// all reads the device.
func (v *verbs) all(when string) []byte {
	v.t.Helper()
	p := make([]byte, len(v.content))
	if _, err := v.dev.ReadAt(p, 0); err != nil {
		v.t.Fatalf("%s: %v", when, err)
	}
	return p
}

func (v *verbs) equal(p []byte, what string) {
	v.t.Helper()
	for off := 0; off < len(v.content); off += disktest.SectorSize {
		end := min(off+disktest.SectorSize, len(v.content))
		if want := v.content[off:end]; !bytes.Equal(p[off:min(end, len(p))], want) {
			v.t.Fatalf("%s: at %d is %s, expected %s", what, off, crash.Describe(p[off:end]), crash.Describe(want))
		}
	}
}

// became notes that the range at off was made p.
func (v *verbs) became(off int64, p []byte, fua bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	copy(v.content[off:], p)
	v.since = append(v.since, changed{off, bytes.Clone(p), fua})
}

// flushed notes that all that was done is durable.
func (v *verbs) flushed() { v.durable, v.since = bytes.Clone(v.content), nil }

// either takes for what the device must be what it is in the range at off, each
// of whose sectors is as it was or as in p.
func (v *verbs) either(dev *nbdDevice, off int64, p []byte) error {
	got := make([]byte, len(p))
	if _, err := dev.ReadAt(got, off); err != nil {
		return err
	}
	for at := off; at < off+int64(len(p)); {
		end := min((at/disktest.SectorSize+1)*disktest.SectorSize, off+int64(len(p)))
		is, was, made := got[at-off:end-off], v.content[at:end], p[at-off:end-off]
		if !bytes.Equal(is, was) && !bytes.Equal(is, made) {
			return fmt.Errorf("at %d is %s, expected %s or %s", at, crash.Describe(is), crash.Describe(was), crash.Describe(made))
		}
		at = end
	}
	v.became(off, got, false)
	return nil
}

// end ends a server, in order or by kill -9, or as the machine's death does, but
// that all writes have reached the disk.
func (v *verbs) end(s *server) {
	v.t.Helper()
	var err error
	switch v.dev.c.Close(); v.rng.IntN(6) {
	case 0, 1:
		v.count.kills++
		s.kill()
		err = s.wait()
	case 2:
		v.count.forgotten++
		s.kill()
		if err = s.wait(); err == nil {
			v.forget()
		}
	default:
		if err = s.close(); err == nil && len(v.doubt) == 0 {
			v.flushed()
		}
	}
	if err != nil {
		v.t.Fatal(err)
	}
}

// forget takes away the memory that a dead server left: what was not flushed is
// there or not, sector by sector, and stays so.
func (v *verbs) forget() {
	v.t.Helper()
	if err := os.Remove(memoryOf(v.t, v.cow)); err != nil && !errors.Is(err, os.ErrNotExist) {
		v.t.Fatal(err)
	}
	since := append(v.since, v.doubt...)
	v.content, v.doubt = v.durable, nil
	s, err := serve(v.dir, "--format=raw", "--read-only", v.base, v.cow)
	if err != nil {
		v.t.Fatal(err)
	}
	defer s.kill()
	if v.dev, err = s.dial(); err != nil {
		v.t.Fatal(err)
	}
	defer v.dev.c.Close()
	got := v.all("without memory")
	const sector = disktest.SectorSize
	known := make([]bool, len(got)/sector+1)
	look := func(from, to int) {
		for at := from / sector * sector; at < to; at += sector {
			end := min(at+sector, len(got))
			known[at/sector] = known[at/sector] || bytes.Equal(got[at:end], v.content[at:end])
		}
	}
	look(0, len(got))
	for _, c := range since {
		from, to := int(c.off), int(c.off)+len(c.p)
		copy(v.content[from:], c.p)
		for at := (from + sector - 1) / sector * sector; c.fua && at < to && (at+sector <= to || to == len(got)); at += sector {
			known[at/sector] = false
		}
		look(from, to)
	}
	for at := 0; at < len(got); at += sector {
		if !known[at/sector] {
			v.t.Fatalf("without memory: at %d is %s, which it was not since the last flush; expected at last %s",
				at, crash.Describe(got[at:min(at+sector, len(got))]), crash.Describe(v.content[at:min(at+sector, len(got))]))
		}
	}
	v.content = got
	v.flushed()
	s.kill()
	if err := s.wait(); err != nil {
		v.t.Fatal(err)
	}
}

// memoryOf returns the path of the live table of a store.
func memoryOf(t *testing.T, cow string) string {
	t.Helper()
	f, err := disk.OpenOS(cow, os.O_RDONLY)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	id, err := f.Identity()
	if err != nil {
		t.Fatal(err)
	}
	var u exception.UUID
	if _, err := f.ReadAt(u[:], 40); err != nil { // docs/format.md
		t.Fatal(err)
	}
	return exception.Shared{File: id}.Path(u)
}

// close serves a store once more, and ends that in order: nothing of it is left
// in memory.
func (v *verbs) close(cow string) {
	v.t.Helper()
	s := v.serveOn(cow)
	v.dev.c.Close()
	if err := s.close(); err != nil {
		v.t.Fatal(err)
	}
	v.flushed()
}

// session serves the store and changes it.
func (v *verbs) session() {
	v.t.Helper()
	v.count.sessions++
	s := v.serveOn(v.cow)
	v.change(s)
	v.same("at the end")
	if v.rng.IntN(4) == 0 {
		v.dev.c.Close()
		v.cutOff(s)
		return
	}
	v.end(s)
}

// change does some changes of every kind.
func (v *verbs) change(s *server) {
	v.t.Helper()
	v.roomSoon()
	h := hand{v: v, dev: v.dev, rng: v.rng, to: int64(len(v.content))}
	for range v.rng.IntN(30) {
		var err error
		switch v.rng.IntN(12) {
		case 0:
			if err = v.dev.Flush(); err == nil {
				v.flushed()
			} else if v.noRoom(err) && !v.began {
				err = nil // a copy with holes that was not closed in order, on a full disk
			}
		case 1:
			err = v.together()
		case 2:
			err = v.abreast(s)
		default:
			err = h.change()
		}
		if err != nil {
			v.t.Fatalf("%v\n%s", err, s.stderr())
		}
	}
}

// A hand changes a part of the device by a connection.
type hand struct {
	v        *verbs
	dev      *nbdDevice
	rng      *rand.Rand
	from, to int64
}

// place returns a range of at most most bytes.
func (h *hand) place(most int64) (off, n int64) {
	size := h.to - h.from
	align := []int64{1, disktest.SectorSize, 4096}[h.rng.IntN(3)]
	off = h.rng.Int64N(size) / align * align
	n = min(size-off, max(align, h.rng.Int64N(min(most, size)+1)/align*align))
	return h.from + off, n
}

// change does one change. One that finds no room may have been done in part.
func (h *hand) change() error {
	v := h.v
	off, n := h.place(200 << 10)
	p := make([]byte, n)
	var fua uint16
	if h.rng.IntN(4) == 0 {
		fua = nbd.CmdFlagFUA
	}
	var err error
	switch h.rng.IntN(6) {
	case 0:
		err = h.dev.c.Trim(off, n, fua)
	case 1:
		how := []uint16{0, nbd.CmdFlagNoHole, nbd.CmdFlagFastZero}[h.rng.IntN(3)]
		err = h.dev.c.WriteZeroes(off, n, how|fua)
	case 2: // zeros round a few bytes
		at := h.rng.Int64N(n)
		crash.Stamp(p[at:min(n, at+h.rng.Int64N(5000))], off+at, v.newStamp())
		_, err = h.dev.c.WriteFlags(p, off, fua)
	default:
		crash.Stamp(p, off, v.newStamp())
		_, err = h.dev.c.WriteFlags(p, off, fua)
	}
	err = deviceError(err)
	switch {
	case v.noRoom(err):
		return v.either(h.dev, off, p)
	case err != nil:
		return fmt.Errorf("%d bytes at %d: %w", n, off, err)
	}
	v.did(off, p, fua != 0)
	return nil
}

// noRoom reports whether err is that of a full disk, where there may be one.
func (v *verbs) noRoom(err error) bool {
	is := v.place.small && errors.Is(err, syscall.ENOSPC)
	if is {
		v.mu.Lock()
		v.count.full++
		v.mu.Unlock()
	}
	return is
}

// did notes a change that was answered well.
func (v *verbs) did(off int64, p []byte, fua bool) {
	v.mu.Lock()
	v.began = true
	v.mu.Unlock()
	v.became(off, p, fua)
}

// newStamp returns what tells one write from all others.
func (v *verbs) newStamp() uint64 {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.count.changes++
	v.stamp++
	return v.stamp
}

// together sends short writes at once that do not meet.
func (v *verbs) together() error {
	const n = 4096
	var w []block.Write
	for _, i := range v.rng.Perm(len(v.content) / n) {
		if len(w) == 40 {
			break
		}
		p := make([]byte, n)
		crash.Stamp(p, int64(i*n), v.newStamp())
		w = append(w, block.Write{Data: p, Off: int64(i * n)})
	}
	v.dev.WriteBatch(w)
	for _, w := range w {
		switch {
		case w.Err == nil:
			v.did(w.Off, w.Data, false)
		case !v.noRoom(w.Err):
			return w.Err
		default:
			if err := v.either(v.dev, w.Off, w.Data); err != nil {
				return err
			}
		}
	}
	return nil
}

// abreast changes parts of the device by several connections at once. The parts
// meet inside of blocks.
func (v *verbs) abreast(s *server) error {
	const hands = 3
	var all sync.WaitGroup
	errs := make([]error, hands)
	size := int64(len(v.content))
	for i := range int64(hands) {
		h := hand{v: v, rng: rand.New(rand.NewPCG(v.rng.Uint64(), 2))}
		h.from, h.to = i*size/hands/disktest.SectorSize*disktest.SectorSize, (i+1)*size/hands/disktest.SectorSize*disktest.SectorSize
		if i == hands-1 {
			h.to = size
		}
		if h.from == h.to {
			continue
		}
		var err error
		if h.dev, err = s.dial(); err != nil {
			return err
		}
		all.Go(func() {
			defer h.dev.c.Close()
			for range 6 {
				if errs[i] = h.change(); errs[i] != nil {
					return
				}
			}
		})
	}
	all.Wait()
	return errors.Join(errs...)
}

// cutOff ends a server in the middle of a write.
func (v *verbs) cutOff(s *server) {
	v.t.Helper()
	dev, err := s.dial()
	if err != nil {
		v.t.Fatal(err)
	}
	defer dev.c.Close()
	v.count.cut++
	h := hand{v: v, rng: v.rng, to: int64(len(v.content))}
	off, n := h.place(2 << 20)
	p := make([]byte, n)
	crash.Stamp(p, off, v.newStamp())
	answer := make(chan error, 1)
	go func() {
		_, err := dev.WriteAt(p, off)
		answer <- err
	}()
	time.Sleep(time.Duration(v.rng.IntN(4)) * time.Millisecond)
	if v.rng.IntN(2) == 0 {
		s.kill()
	} else {
		s.cmd.Process.Signal(syscall.SIGTERM)
	}
	if <-answer == nil {
		v.became(off, p, false)
	} else {
		v.doubt = append(v.doubt, changed{off: off, p: p})
	}
	if err := s.wait(); err != nil {
		v.t.Fatal(err)
	}
}

// copied serves a copy that was made beside the store's server, which goes on
// and ends or is killed: neither has anything of the other's.
func (v *verbs) copied() {
	v.t.Helper()
	v.count.copies++
	twin := filepath.Join(v.dir, "twin")
	s := v.serveOn(v.cow)
	if err := v.dev.Flush(); v.noRoom(err) {
		v.end(s)
		return
	} else if err != nil {
		v.t.Fatal(err)
	}
	v.flushed()
	copyTo(v.t, twin, v.cow)
	was := bytes.Clone(v.content)
	v.change(s)
	v.end(s)
	now, durable, since, cow := v.content, v.durable, v.since, v.cow
	v.content, v.durable, v.since, v.cow = was, bytes.Clone(was), nil, twin
	s = v.serveOn(twin)
	v.change(s)
	v.same("a copy")
	v.end(s)
	v.close(twin)
	v.content, v.durable, v.since, v.cow = now, durable, since, cow
	os.Remove(twin)
}

// backup writes an older state over the store.
func (v *verbs) backup() {
	v.t.Helper()
	v.close(v.cow)
	v.count.backups++
	kept := filepath.Join(v.dir, "kept")
	copyTo(v.t, kept, v.cow)
	was := bytes.Clone(v.content)
	v.session()
	v.makeRoom()
	copyTo(v.t, v.cow, kept)
	os.Remove(kept)
	v.content, v.doubt = was, nil
	v.flushed()
}

// copyTo makes to, which may be there, read as from.
func copyTo(t *testing.T, to, from string) {
	t.Helper()
	sparse := "--sparse=always"
	if info, err := os.Stat(to); err == nil && info.Mode()&os.ModeDevice != 0 {
		sparse = "--sparse=never"
	}
	if out, err := command(patience, "cp", sparse, from, to); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}

// image merges into a new image.
func (v *verbs) image() {
	v.t.Helper()
	v.count.images++
	img := filepath.Join(v.dir, "new")
	v.settle()
	v.run("0", "merge", v.base, v.cow, "--output", img)
	p, err := os.ReadFile(img)
	if err != nil {
		v.t.Fatal(err)
	}
	v.equal(p, "a new image")
	os.Remove(img)
}

// merge merges into the base, and may be interrupted.
func (v *verbs) merge() {
	v.t.Helper()
	for v.rng.IntN(3) == 0 {
		v.count.interrupted++
		v.settle()
		v.interrupt()
		if v.rng.IntN(2) == 0 {
			v.session()
		}
	}
	v.count.merges++
	v.settle()
	if status, _ := v.run(v.orFull("0"), "merge", v.base, v.cow); status == "9" {
		v.half = true
		v.makeRoom()
		v.run("0", "merge", v.base, v.cow)
	}
	v.half, v.under = false, bytes.Clone(v.content)
	v.flushed()
}

// orFull adds the status that tells of a full disk, where there may be one.
func (v *verbs) orFull(statuses string) string {
	if v.place.small {
		statuses += " 9"
	}
	return statuses
}

// settle finds out what became of what was not answered.
func (v *verbs) settle() {
	v.t.Helper()
	if len(v.doubt) > 0 {
		v.close(v.cow)
	}
}

// interrupt begins a merge, and ends it soon.
func (v *verbs) interrupt() {
	v.t.Helper()
	m, err := os.StartProcess(program, []string{program, "merge", "--quiet", v.base, v.cow}, &os.ProcAttr{})
	if err != nil {
		v.t.Fatal(err)
	}
	time.Sleep(time.Duration(v.rng.IntN(30)) * time.Millisecond)
	m.Signal([]os.Signal{syscall.SIGINT, syscall.SIGKILL}[v.rng.IntN(2)])
	if _, err := m.Wait(); err != nil {
		v.t.Fatal(err)
	}
	if v.half = true; v.rng.IntN(2) == 0 {
		v.forget()
	}
}

// check finds no damage; space may be lost after a kill.
func (v *verbs) check() {
	v.t.Helper()
	v.count.checks++
	if status, _ := v.run(v.orFull("0 1"), "check", v.cow, v.base, "--deep"); status == "9" {
		v.makeRoom() // the digest could not be noted
		v.run("0 1", "check", v.cow, v.base, "--deep")
	}
	v.session()
	v.close(v.cow)
	v.run("0", "check", v.cow, v.base)
}

// repair finds no damage, and gives back what a kill left; nothing else changes.
func (v *verbs) repair() {
	v.t.Helper()
	if v.place.device {
		return // what is overwritten is kept beside it, in /dev
	}
	v.settle()
	v.makeRoom()
	v.run("0 10", "check", v.cow, v.base, "--repair")
	kept, err := filepath.Glob(v.cow + ".repair-*")
	if err != nil {
		v.t.Fatal(err)
	}
	for _, path := range kept {
		os.Remove(path)
	}
	v.close(v.cow)
	v.run("0", "check", v.cow, v.base)
}

// anew makes another store: where the one before was merged and deleted, or on
// its block device.
func (v *verbs) anew() {
	v.t.Helper()
	v.settle()
	v.makeRoom()
	switch {
	case !v.place.device:
		v.run("0", "merge", v.base, v.cow, "--delete")
		v.half, v.under = false, bytes.Clone(v.content)
	case v.half:
		return
	default:
		v.run("0", "create", "--force", "--format=raw", "--chunk-size", v.chunk, v.base, v.cow)
		v.content = bytes.Clone(v.under)
	}
	v.flushed()
	v.session()
}

// diff names all that differs, and nothing but what the store has.
func (v *verbs) diff() {
	v.t.Helper()
	v.count.diffs++
	v.settle()
	found := make([]bool, len(v.content))
	_, out := v.run("0 1", "diff", v.base, v.cow)
	for line := range strings.Lines(out) {
		var off, n int
		if _, err := fmt.Sscan(line, &off, &n); err != nil {
			continue
		}
		for i := off; i < off+n; i++ {
			found[i] = true
		}
	}
	for i := range found {
		if !found[i] && v.content[i] != v.under[i] {
			v.t.Fatalf("diff does not name %d, where the device differs from the base", i)
		}
	}
}
