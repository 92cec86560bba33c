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
	if err := d.Remove(s.Device); err != nil {
		t.Fatal(err)
	}
	if err := d.Remove(s.Device); err != nil {
		t.Errorf("again: %v", err)
	}
	if all, err := d.List(); len(all) != 0 || err != nil {
		t.Errorf("after all: %v, %v", all, err)
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
