package crash

// Every verb that changes a store or a base, in any order, by the real program:
// after each the device, the base and what is told of them are what a model
// says.

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cowdev/cowdev/block"
	"github.com/cowdev/cowdev/internal/crash"
	"github.com/cowdev/cowdev/internal/disktest"
)

func TestVerbs(t *testing.T) {
	limit := 6 * time.Second
	if long() {
		limit = campaignTime(t) / 4
	}
	var counts verbCounts
	begin, first := time.Now(), firstSeed()
	seed := first
	for ; time.Since(begin) < limit && !t.Failed(); seed++ {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			v := newVerbs(t, seed)
			v.count = &counts
			for range 12 {
				v.step()
			}
			v.session()
			v.close(v.cow)
		})
	}
	t.Logf("%d sequences: %+v in %.1fs", seed-first, counts, time.Since(begin).Seconds())
}

type verbCounts struct {
	sessions, kills, changes, merges, interrupted, images, copies, backups, diffs, checks int
}

// verbs is a base and a store, and what they must be.
type verbs struct {
	t     *testing.T
	rng   *rand.Rand
	dir   string
	base  string
	cow   string
	chunk string
	known        // what the device reads as
	under []byte // what the base does
	half  bool   // the base is half merged
	count *verbCounts
}

func newVerbs(t *testing.T, seed uint64) *verbs {
	rng := rand.New(rand.NewPCG(seed, 1))
	dir := shortDir(t)
	sizes := []int{512, 64 << 10, 1<<20 + 512, 3<<20 + 1001, 12 << 20}
	v := &verbs{
		t: t, rng: rng, dir: dir, base: filepath.Join(dir, "base"), cow: filepath.Join(dir, "cow"),
		chunk: []string{"8K", "32K", "64K", "1M"}[rng.IntN(4)], known: newKnown(sizes[rng.IntN(len(sizes))]),
	}
	for range rng.IntN(4) { // the rest are holes
		off, n := v.place(1 << 20)
		crash.Stamp(v.content[off:off+n], off, crash.BaseStamp)
	}
	v.under = bytes.Clone(v.content)
	f, err := os.Create(v.base)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(int64(len(v.under))); err != nil {
		t.Fatal(err)
	}
	for off := 0; off < len(v.under); off += 4096 {
		if p := v.under[off:min(off+4096, len(v.under))]; bytes.ContainsFunc(p, func(r rune) bool { return r != 0 }) {
			if _, err := f.WriteAt(p, int64(off)); err != nil {
				t.Fatal(err)
			}
		}
	}
	return v
}

// place returns a range of the device of at most most bytes.
func (v *verbs) place(most int64) (off, n int64) {
	size := int64(len(v.content))
	align := []int64{1, disktest.SectorSize, 4096}[v.rng.IntN(3)]
	off = v.rng.Int64N(size) / align * align
	n = min(size-off, max(align, v.rng.Int64N(min(most, size)+1)/align*align))
	return off, n
}

func (v *verbs) step() {
	v.t.Helper()
	if _, err := os.Stat(v.cow); err != nil {
		v.session()
		return
	}
	switch v.rng.IntN(8) {
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

// run runs a verb, which ends with one of the statuses, and returns what it says.
func (v *verbs) run(statuses string, args ...string) string {
	v.t.Helper()
	out, err := command(patience, program, append(args, "--quiet")...)
	if status := strconv.Itoa(exitStatus(err)); !strings.Contains(statuses, status) {
		v.t.Fatalf("%s ended with %s, expected one of %s: %v\n%s", args, status, statuses, err, out)
	}
	return out
}

// serveOn serves a store, and holds what it shows against the model.
func (v *verbs) serveOn(cow string) *server {
	v.t.Helper()
	flags := []string{"--chunk-size", v.chunk, "--format=raw", "--detect-zeroes", []string{"on", "off"}[v.rng.IntN(2)], v.base, cow}
	s, err := serve(v.dir, flags...)
	if err != nil {
		v.t.Fatal(err)
	}
	v.t.Cleanup(s.kill)
	if v.dev, err = s.dial(); err != nil {
		v.t.Fatal(err)
	}
	v.same("at the beginning")
	return s
}

// same holds the device against the model.
func (v *verbs) same(when string) {
	v.t.Helper()
	p := make([]byte, len(v.content))
	if _, err := v.dev.ReadAt(p, 0); err != nil {
		v.t.Fatalf("%s: %v", when, err)
	}
	v.equal(p, when)
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

// end ends a server, in order or by kill -9.
func (v *verbs) end(s *server) {
	v.t.Helper()
	var err error
	v.dev.c.Close()
	if v.rng.IntN(2) == 0 {
		v.count.kills++
		s.kill()
		err = s.wait()
	} else {
		err = s.close()
	}
	if err != nil {
		v.t.Fatal(err)
	}
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
}

// session serves the store and changes it.
func (v *verbs) session() {
	v.t.Helper()
	v.count.sessions++
	s := v.serveOn(v.cow)
	v.change()
	v.same("at the end")
	v.end(s)
}

// change does some changes of every kind.
func (v *verbs) change() {
	v.t.Helper()
	for range v.rng.IntN(30) {
		v.count.changes++
		off, n := v.place(200 << 10)
		var err error
		switch v.rng.IntN(6) {
		case 0:
			if err = v.dev.Trim(off, n); err == nil {
				clear(v.content[off : off+n])
			}
		case 1:
			flags := []block.ZeroFlags{0, block.NoHole}[v.rng.IntN(2)]
			if err = v.dev.WriteZeroes(off, n, flags); err == nil {
				clear(v.content[off : off+n])
			}
		case 2:
			err = v.dev.Flush()
		case 3:
			err = v.together()
		default:
			err = v.write(off, int(n))
		}
		if err != nil {
			v.t.Fatal(err)
		}
	}
}

// together sends short writes at once that do not meet.
func (v *verbs) together() error {
	const n = 4096
	var w []block.Write
	for _, i := range v.rng.Perm(len(v.content) / n) {
		if len(w) == 40 {
			break
		}
		v.stamp++
		p := make([]byte, n)
		crash.Stamp(p, int64(i*n), v.stamp)
		w = append(w, block.Write{Data: p, Off: int64(i * n)})
	}
	v.dev.WriteBatch(w)
	for _, w := range w {
		if w.Err != nil {
			return w.Err
		}
		copy(v.content[w.Off:], w.Data)
	}
	return nil
}

// copied serves a copy that was made beside the store's server, which goes on
// and ends or is killed: neither has anything of the other's.
func (v *verbs) copied() {
	v.t.Helper()
	v.count.copies++
	twin := filepath.Join(v.dir, "twin")
	s := v.serveOn(v.cow)
	if err := v.dev.Flush(); err != nil {
		v.t.Fatal(err)
	}
	copyTo(v.t, twin, v.cow)
	was := bytes.Clone(v.content)
	v.change()
	now := v.content
	v.end(s)
	v.content = was
	s = v.serveOn(twin)
	v.change()
	v.same("a copy")
	v.end(s)
	v.close(twin)
	v.content = now
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
	copyTo(v.t, v.cow, kept)
	v.content = was
}

// copyTo makes to, which may be there, read as from.
func copyTo(t *testing.T, to, from string) {
	t.Helper()
	if out, err := command(patience, "cp", "--sparse=always", from, to); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}

// image merges into a new image.
func (v *verbs) image() {
	v.t.Helper()
	v.count.images++
	img := filepath.Join(v.dir, "new")
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
		v.interrupt()
		if v.half = true; v.rng.IntN(2) == 0 {
			v.session()
		}
	}
	v.count.merges++
	v.run("0", "merge", v.base, v.cow)
	v.half, v.under = false, bytes.Clone(v.content)
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
}

// check finds no damage; space may be lost after a kill.
func (v *verbs) check() {
	v.t.Helper()
	v.count.checks++
	v.run("01", "check", v.cow, v.base, "--deep")
	v.session()
	v.close(v.cow)
	v.run("0", "check", v.cow, v.base)
}

// diff names all that differs, and nothing but what the store has.
func (v *verbs) diff() {
	v.t.Helper()
	v.count.diffs++
	found := make([]bool, len(v.content))
	for line := range strings.Lines(v.run("01", "diff", v.base, v.cow)) {
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
