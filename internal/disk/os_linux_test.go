package disk

// The file on Linux against a real filesystem: what is written is read, holes
// are told and made, locks exclude and name who holds them, and what is not a
// file is refused.

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func openTest(t *testing.T, path string, flags int) *OS {
	t.Helper()
	o, err := OpenOS(path, flags)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { o.Close() })
	return o
}

func TestReadWrite(t *testing.T) {
	o := openTest(t, filepath.Join(t.TempDir(), "f"), os.O_RDWR|os.O_CREATE)
	want := bytes.Repeat([]byte("cowdev"), 5000)
	for _, write := range []struct {
		name string
		to   func([]byte, int64) error
	}{
		{"WriteSync", o.WriteSync},
		{"WriteAt", func(p []byte, off int64) error { _, err := o.WriteAt(p, off); return err }},
		{"WriteSync without RWF_DSYNC", func(p []byte, off int64) error { o.noDsync.Store(true); return o.WriteSync(p, off) }},
	} {
		if err := o.Truncate(0); err != nil {
			t.Fatal(err)
		}
		if err := write.to(want, 777); err != nil {
			t.Fatalf("%s: %v", write.name, err)
		}
		got := make([]byte, len(want))
		if _, err := o.ReadAt(got, 777); err != nil || !bytes.Equal(got, want) {
			t.Fatalf("%s: read back: %v, equal %v", write.name, err, bytes.Equal(got, want))
		}
		if size, err := o.Size(); err != nil || size != int64(777+len(want)) {
			t.Fatalf("%s: size %d, %v", write.name, size, err)
		}
	}
	if err := o.Sync(); err != nil {
		t.Fatal(err)
	}
	if n, err := o.ReadAt(make([]byte, 10), 1<<20); n != 0 || err != io.EOF {
		t.Fatalf("beyond the end: %d, %v, expected io.EOF", n, err)
	}
}

func TestHoles(t *testing.T) {
	o := openTest(t, filepath.Join(t.TempDir(), "f"), os.O_RDWR|os.O_CREATE)
	const mib = 1 << 20
	if err := o.Truncate(8 * mib); err != nil {
		t.Fatal(err)
	}
	if _, err := o.WriteAt(bytes.Repeat([]byte{1}, mib), 2*mib); err != nil {
		t.Fatal(err)
	}
	if at, err := o.NextData(0); err != nil || at != 2*mib {
		t.Skipf("no holes are told here: data from %d on, %v", at, err)
	}
	if at, err := o.NextHole(2 * mib); err != nil || at != 3*mib {
		t.Fatalf("hole at %d, %v, expected %d", at, err, 3*mib)
	}
	if at, err := o.NextData(3 * mib); err != nil || at != 8*mib {
		t.Fatalf("data at %d, %v, expected the end", at, err)
	}
	if err := o.PunchHole(2*mib, mib); err != nil {
		t.Fatal(err)
	}
	if at, err := o.NextData(0); err != nil || at != 8*mib {
		t.Fatalf("after punching: data at %d, %v, expected none", at, err)
	}
	got := make([]byte, mib)
	if _, err := o.ReadAt(got, 2*mib); err != nil || !bytes.Equal(got, make([]byte, mib)) {
		t.Fatalf("a punched hole reads as something else than zeros: %v", err)
	}
}

func TestWriteZeros(t *testing.T) {
	o := openTest(t, filepath.Join(t.TempDir(), "f"), os.O_RDWR|os.O_CREATE)
	if _, err := o.WriteAt(bytes.Repeat([]byte{1}, 200<<10), 0); err != nil {
		t.Fatal(err)
	}
	if err := o.writeZeros(1000, 1<<30); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 200<<10)
	if _, err := o.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	want := append(bytes.Repeat([]byte{1}, 1000), make([]byte, 200<<10-1000)...)
	if size, _ := o.Size(); !bytes.Equal(got, want) || size != 200<<10 {
		t.Fatalf("zeroed bytes differ, or the file grew (size %d)", size)
	}
}

func TestLock(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	a := openTest(t, path, os.O_RDWR|os.O_CREATE)
	b := openTest(t, path, os.O_RDONLY)
	for _, shared := range []bool{true, true} {
		if err := a.Lock(shared); err != nil {
			t.Fatal(err)
		}
	}
	if err := b.Lock(true); err != nil {
		t.Fatalf("two shared locks: %v", err)
	}
	err := a.Lock(false)
	if !errors.Is(err, ErrLocked) {
		t.Fatalf("exclusive beside shared: %v, expected ErrLocked", err)
	}
	if _, e := os.Stat("/proc/locks"); e == nil && !strings.Contains(err.Error(), "pid ") {
		t.Errorf("the holder is not named: %v", err)
	}
	if err := b.Unlock(); err != nil {
		t.Fatal(err)
	}
	if err := a.Lock(false); err != nil {
		t.Fatalf("exclusive alone: %v", err)
	}
}

func TestHolders(t *testing.T) {
	const locks = `1: POSIX  ADVISORY  WRITE 5 fe:00:42 0 EOF
2: FLOCK  ADVISORY  READ  812 fe:00:42 0 EOF
2: -> FLOCK  ADVISORY  WRITE 9 fe:00:42 0 EOF
3: FLOCK  ADVISORY  READ  812 fe:00:42 0 EOF
4: FLOCK  ADVISORY  READ  813 00:2a:42 0 EOF
5: FLOCK  ADVISORY  WRITE 814 fe:00:43 0 EOF
`
	got := holders([]byte(locks), 42)
	if len(got) != 2 || got[0] != 812 || got[1] != 813 {
		t.Fatalf("holders %v, expected 812 and 813", got)
	}
}

func TestNotAFile(t *testing.T) {
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{dir, fifo, "/dev/null"} {
		if _, err := OpenOS(path, os.O_RDONLY); !errors.Is(err, ErrKind) {
			t.Errorf("%s: %v, expected ErrKind", path, err)
		}
	}
	if _, err := OpenOS(filepath.Join(dir, "none"), os.O_RDONLY); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a missing file: %v", err)
	}
}

func TestTemp(t *testing.T) {
	dir := t.TempDir()
	o, err := OpenTemp(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer o.Close()
	if _, err := o.WriteAt([]byte("x"), 0); err != nil {
		t.Fatal(err)
	}
	if names, _ := os.ReadDir(dir); len(names) != 0 {
		t.Fatalf("a temporary file left %v", names)
	}
}

// A file that is made is found by its name when it is whole, and not before;
// another that has the name by then is left as it is.
func TestCreate(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	first, err := CreateOS(path)
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	if first.Named() {
		t.Skip("this filesystem gives files their names at once")
	}
	second, err := CreateOS(path)
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("before it is published: %v", err)
	}
	if _, err := first.WriteAt([]byte("first"), 0); err != nil {
		t.Fatal(err)
	}
	if err := first.Publish(); err != nil {
		t.Fatal(err)
	}
	if err := second.Publish(); !errors.Is(err, fs.ErrExist) || second.Named() {
		t.Errorf("the second of that name: %v", err)
	}
	if got, err := os.ReadFile(path); string(got) != "first" {
		t.Errorf("%q, %v", got, err)
	}
}
