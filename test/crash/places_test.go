package crash

// The verbs against their model (verbs_test.go) where there is little room and
// where there are no files: a filesystem that is full now and then has the
// store, and perhaps the base; or one of them is a block device, or both.

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestVerbsElsewhere(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("small filesystems and loop devices: need root")
	}
	sequences(t, 7*time.Second, newVerbsElsewhere, func(v *verbs) {
		v.makeRoom()
		v.session()
		v.merge()
		v.close(v.cow)
		v.run("0", "check", v.cow, v.base, "--deep")
	})
}

// A place is where the store and the base of verbs lie.
type place struct {
	name       string
	small      bool        // the store's may be full
	disk       string      // a filesystem that can be filled; empty where there is none
	device     bool        // the store is a block device
	baseDevice bool        // the base is one
	flags      []string    // of serve
	soon       *time.Timer // makes room
}

// newVerbsElsewhere returns verbs of any size in any place.
func newVerbsElsewhere(t *testing.T, seed uint64) *verbs {
	rng := rand.New(rand.NewPCG(seed, 3))
	sizes := []int{1, 4095, 5000, 64<<10 + 1, 1<<20 + 512, 1<<20 - 513, 2<<20 + 4096, 3<<20 + 1001}
	size := sizes[rng.IntN(len(sizes))]
	name := []string{"ext4", "tmpfs", "store on a device", "base on a device", "devices"}[rng.IntN(5)]
	sector := []int{512, 4096}[rng.IntN(2)]
	if name == "base on a device" || name == "devices" {
		size = (size + sector - 1) / sector * sector
	}
	v := newVerbsOf(t, rng, size)
	v.place.name = name
	switch name {
	case "ext4", "tmpfs":
		v.place.small = true
		if name == "ext4" {
			v.place.disk = newDisk(t, 40<<20, "mkfs.ext4", "-q", "-m", "0", "-b", []string{"1024", "4096"}[rng.IntN(2)], "-O", "^has_journal", "-E", "nodiscard")
		} else {
			v.place.disk = newTmpfs(t, 28<<20)
		}
		v.cow = filepath.Join(v.place.disk, "cow")
		if rng.IntN(2) == 0 {
			v.base = filepath.Join(v.place.disk, "base")
		}
	case "base on a device", "devices":
		v.base = newLoop(t, int64(size), sector)
		v.place.baseDevice = true
	}
	switch rng.IntN(4) {
	case 0:
		v.place.flags = []string{"--on-full=park=20ms"}
	case 1:
		if v.place.disk != "" {
			v.place.flags = []string{"--on-full=park"}
		}
	}
	v.makeBase()
	if name == "store on a device" || name == "devices" {
		v.place.small, v.place.device = true, true
		v.cow = newLoop(t, 18<<20+rng.Int64N(int64(2*size)+1)/4096*4096, sector)
		v.run("0", "create", "--format=raw", "--chunk-size", v.chunk, v.base, v.cow)
	}
	t.Logf("%s: %d bytes in chunks of %s, sectors of %d, %s", name, size, v.chunk, sector, v.place.flags)
	return v
}

// newTmpfs mounts a tmpfs of n bytes until the test ends.
func newTmpfs(t *testing.T, n int64) string {
	t.Helper()
	at := t.TempDir()
	if out, err := command(patience, "mount", "-t", "tmpfs", "-o", fmt.Sprint("size=", n), "tmpfs", at); err != nil {
		t.Skipf("mounting a tmpfs: %v: %s", err, out)
	}
	t.Cleanup(func() {
		if out, err := command(patience, "umount", at); err != nil {
			t.Errorf("umount: %v\n%s", err, out)
			command(patience, "umount", "-l", at)
		}
	})
	return at
}

// newLoop returns a loop device of n zeros, with sectors of so many bytes, until
// the test ends.
func newLoop(t *testing.T, n int64, sector int) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "device")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	err = f.Truncate(n)
	if f.Close(); err != nil {
		t.Fatal(err)
	}
	out, err := command(patience, "losetup", "--find", "--show", "--sector-size", fmt.Sprint(sector), path)
	if err != nil {
		t.Skipf("a loop device: %v: %s", err, out)
	}
	device := strings.TrimSpace(out)
	t.Cleanup(func() {
		if out, err := command(patience, "losetup", "--detach", device); err != nil {
			t.Errorf("losetup --detach %s: %v: %s", device, err, out)
		}
	})
	return device
}

// fillOrNot fills the small disk, but for a little perhaps, or makes room on it.
func (v *verbs) fillOrNot() {
	v.t.Helper()
	if v.place.disk == "" {
		return
	}
	v.makeRoom()
	if v.rng.IntN(3) == 0 {
		return
	}
	path := fill(v.t, v.place.disk)
	left := v.rng.Int64N(100) * v.rng.Int64N(3) * 4096
	info, err := os.Stat(path)
	if err == nil {
		err = os.Truncate(path, max(0, info.Size()-left))
	}
	if err != nil && !os.IsNotExist(err) { // the last session's end of waiting came late
		v.t.Fatal(err)
	}
}

// makeRoom empties the small disk but for the store and the base.
func (v *verbs) makeRoom() {
	v.t.Helper()
	if v.place.disk == "" {
		return
	}
	if v.place.soon != nil {
		v.place.soon.Stop()
	}
	if err := os.Remove(filepath.Join(v.place.disk, "ballast")); err != nil && !os.IsNotExist(err) {
		v.t.Fatal(err)
	}
}

// roomSoon makes room a little later where writes wait for it without end.
func (v *verbs) roomSoon() {
	if len(v.place.flags) == 0 || v.place.flags[0] != "--on-full=park" {
		return
	}
	ballast := filepath.Join(v.place.disk, "ballast")
	v.place.soon = time.AfterFunc(time.Duration(v.rng.IntN(100))*time.Millisecond, func() { os.Remove(ballast) })
}
