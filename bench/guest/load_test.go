package guest

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// Every load, on a file instead of a device: what it writes is what compare
// expects then, and one byte that is not is found.
func TestLoadsWriteWhatIsCompared(t *testing.T) {
	path := filepath.Join(t.TempDir(), "device")
	if err := MakeOrigin(path); err != nil {
		t.Fatal(err)
	}
	for _, group := range Groups {
		if err := MakeOrigin(path); err != nil {
			t.Fatal(err)
		}
		c := new(contents)
		for _, l := range group {
			_, err := l.run(path, 7, c)
			if errors.Is(err, unix.EINVAL) {
				t.Skipf("no O_DIRECT here: %v", err)
			}
			if err != nil {
				t.Fatalf("%s: %v", l.ID, err)
			}
			written := 0
			for _, n := range c {
				written += min(int(n), 1)
			}
			if first := group[0]; first.Write && written != first.Count*int(first.Block/block) {
				t.Errorf("%s: %d blocks of the store are written, expected those of its first load", l.ID, written)
			}
		}
		if err := c.compare(path, unix.O_RDONLY); err != nil {
			t.Errorf("%s: %v", group[0].ID, err)
		}
		if changed := CompareOrigin(path) != nil; changed != group[0].Write {
			t.Errorf("%s: differs from the origin: %v", group[0].ID, changed)
		}
	}
}

func TestCompareFindsOneByte(t *testing.T) {
	path := filepath.Join(t.TempDir(), "device")
	if err := MakeOrigin(path); err != nil {
		t.Fatal(err)
	}
	if err := CompareOrigin(path); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	p := make([]byte, 1)
	if _, err := f.ReadAt(p, OriginSize-1); err != nil {
		t.Fatal(err)
	}
	p[0] ^= 1
	if _, err := f.WriteAt(p, OriginSize-1); err != nil {
		t.Fatal(err)
	}
	if err := CompareOrigin(path); err == nil {
		t.Error("a changed byte was not found")
	}
}
