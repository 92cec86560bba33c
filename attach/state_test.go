package attach

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
)

func TestStates(t *testing.T) {
	dir := t.TempDir()
	cow := filepath.Join(dir, "cow.img")
	if err := os.WriteFile(cow, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	d := States(filepath.Join(dir, "states"))
	if _, err := d.Find("/dev/nbd0"); !errors.Is(err, ErrNotAttached) {
		t.Errorf("before any: %v", err)
	}
	s := &State{Device: "/dev/nbd3", Driver: DriverNBD, PID: os.Getpid(), COW: cow, Mounts: []string{"/mnt/x"}}
	if err := d.Save(s); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(string(d), "nbd4.json"), []byte("nonsense"), 0o600); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink(cow, link); err != nil {
		t.Fatal(err)
	}
	for _, what := range []string{"/dev/nbd3", cow, link, "/mnt/x"} {
		if got, err := d.Find(what); err != nil || got.Device != s.Device || !got.Alive() {
			t.Errorf("%s: %+v, %v", what, got, err)
		}
	}
	if err := d.Remove(s); err != nil {
		t.Fatal(err)
	}
	if err := d.Remove(s); err != nil {
		t.Errorf("again: %v", err)
	}
	if all, err := d.List(); len(all) != 0 || err != nil {
		t.Errorf("after all: %v, %v", all, err)
	}
}

// A process number that is another process's now is not who held the device,
// and what another has told of a device of that name is not forgotten.
func TestStatesOfOthers(t *testing.T) {
	own := Born(os.Getpid())
	if own == 0 {
		t.Fatal("this process was never born")
	}
	d := States(t.TempDir())
	first := &State{Device: "/dev/nbd3", Driver: DriverNBD, PID: os.Getpid(), Born: own - 1}
	second := &State{Device: "/dev/nbd3", Driver: DriverNBD, PID: os.Getpid(), Born: own}
	if first.Alive() || !second.Alive() {
		t.Errorf("alive: %v and %v, expected false and true", first.Alive(), second.Alive())
	}
	if err := errors.Join(d.Save(first), d.Save(second), d.Remove(first)); err != nil {
		t.Fatal(err)
	}
	if got, err := d.Find("/dev/nbd3"); err != nil || got.Born != own {
		t.Errorf("after the first was forgotten: %+v, %v", got, err)
	}
	if err := errors.Join(d.Remove(second), d.Remove(second)); err != nil {
		t.Error(err)
	}
	if _, err := d.Find("/dev/nbd3"); !errors.Is(err, ErrNotAttached) {
		t.Errorf("after both: %v", err)
	}
}

// A store that was attached anew is found where it is now, whatever a process
// that is gone has left.
func TestStatesFindLiving(t *testing.T) {
	d := States(t.TempDir())
	own := Born(os.Getpid())
	left := &State{Device: "/dev/nbd3", Driver: DriverNBD, PID: os.Getpid(), Born: own - 1, COW: "/cow.img"}
	now := &State{Device: "/dev/nbd4", Driver: DriverNBD, PID: os.Getpid(), Born: own, COW: "/cow.img"}
	if err := errors.Join(d.Save(left), d.Save(now)); err != nil {
		t.Fatal(err)
	}
	for what, device := range map[string]string{"/cow.img": now.Device, left.Device: left.Device} {
		if got, err := d.Find(what); err != nil || got.Device != device {
			t.Errorf("%s: %+v, %v, expected %s", what, got, err, device)
		}
	}
	if err := d.Remove(now); err != nil {
		t.Fatal(err)
	}
	if got, err := d.Find("/cow.img"); err != nil || got.Device != left.Device {
		t.Errorf("with the dead alone: %+v, %v", got, err)
	}
}

func TestNBDIndex(t *testing.T) {
	if n, err := NBDIndex("/dev/nbd12"); n != 12 || err != nil {
		t.Errorf("/dev/nbd12: %d, %v", n, err)
	}
	for _, bad := range []string{"/dev/sda", "/dev/nbd", "/dev/nbd1p2", "/dev/nbd-1"} {
		if _, err := NBDIndex(bad); err == nil {
			t.Errorf("%s is taken for a device", bad)
		}
	}
}
