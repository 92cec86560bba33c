package files

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// toolTimeout is far more than any tool of these tests needs.
const toolTimeout = 60 * time.Second

// run runs a tool to its end and returns what it printed. A tool that is
// absent or fails, or that takes too long, ends the test.
func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := command(name, args...)
	if errors.Is(err, exec.ErrNotFound) && os.Geteuid() != 0 {
		t.Skipf("%s is not installed", name)
	}
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return out
}

// command runs a tool, at most for toolTimeout.
func command(name string, args ...string) (output string, err error) {
	path, err := exec.LookPath(name)
	if err != nil {
		if path, err = exec.LookPath(filepath.Join("/usr/sbin", name)); err != nil {
			return "", fmt.Errorf("%s: %w", name, exec.ErrNotFound)
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), toolTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = time.Second
	cmd.Env = append(os.Environ(), "LC_ALL=C.UTF-8", "MTOOLS_SKIP_CHECK=1")
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// imageFile is a file as an image.
type imageFile struct{ *os.File }

func (f imageFile) Size() int64 {
	info, err := f.Stat()
	if err != nil {
		panic(err)
	}
	return info.Size()
}

// openImage opens the file system in the file of that name.
func openImage(t testing.TB, name string) FS {
	t.Helper()
	fsys, err := Open(openReader(t, name))
	if err != nil {
		t.Fatalf("open %s: %v", name, err)
	}
	return fsys
}

func openReader(t testing.TB, name string) imageFile {
	t.Helper()
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return imageFile{f}
}

// blank makes a sparse file of size bytes.
func blank(t testing.TB, size int64) string {
	t.Helper()
	f, err := os.CreateTemp(t.TempDir(), "*.img")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	return f.Name()
}

// plainTree fills a new directory with what every file system can hold:
// directories and files, empty ones too, some with long names.
func plainTree(t testing.TB, rng *rand.Rand, n int) string {
	t.Helper()
	top := t.TempDir()
	dirs := []string{top}
	for i := range n {
		parent := dirs[rng.IntN(len(dirs))]
		name := fmt.Sprintf("f%d", i)
		switch rng.IntN(6) {
		case 0:
			name = fmt.Sprintf("a longer name with spaces and ümläuts %d.text", i)
		case 1:
			name = fmt.Sprintf("%s-%d", strings.Repeat("x", 60), i)
		case 2:
			if strings.Count(parent, "/") < strings.Count(top, "/")+5 {
				dir := filepath.Join(parent, fmt.Sprintf("dir%d", i))
				if err := os.Mkdir(dir, 0o755); err != nil {
					t.Fatal(err)
				}
				dirs = append(dirs, dir)
				continue
			}
		}
		size := []int{0, 1, 511, 1516, 4096, 5000, 140_000}[rng.IntN(7)]
		if err := os.WriteFile(filepath.Join(parent, name), randomBytes(rng, size), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return top
}

func randomBytes(rng *rand.Rand, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(rng.Uint32())
	}
	return b
}

// content reads all of f.
func content(f File) ([]byte, error) {
	return io.ReadAll(io.NewSectionReader(f, 0, f.Attr().Size))
}

// compareTree requires the names, kinds and contents of fsys to be those
// below dir, and lets more compare each pair.
func compareTree(t *testing.T, fsys FS, dir string, more func(name string, f File, info fs.FileInfo) error) {
	t.Helper()
	want := map[string]fs.FileInfo{}
	err := filepath.Walk(dir, func(p string, info fs.FileInfo, err error) error {
		rel, _ := filepath.Rel(dir, p)
		want[filepath.Join("/", rel)] = info
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	root, err := fsys.Root()
	if err != nil {
		t.Fatal(err)
	}
	err = Walk("/", root, func(name string, f File) error {
		info, ok := want[name]
		if !ok {
			return fmt.Errorf("%s: the image has it, the directory has not", name)
		}
		delete(want, name)
		if err := compareFile(f, filepath.Join(dir, name), info); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if more != nil {
			return more(name, f, info)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	for name := range want {
		t.Errorf("%s is missing", name)
	}
}

func compareFile(f File, name string, info fs.FileInfo) error {
	a := f.Attr()
	if a.Mode.Type() != info.Mode().Type() {
		return fmt.Errorf("is a %s, expected a %s", TypeName(a.Mode), TypeName(info.Mode()))
	}
	switch {
	case info.Mode()&fs.ModeSymlink != 0:
		want, err := os.Readlink(name)
		if err != nil {
			return err
		}
		if got, err := f.Link(); err != nil || got != want {
			return fmt.Errorf("leads to %q (%v), expected %q", got, err, want)
		}
	case info.Mode().IsRegular():
		want, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		got, err := content(f)
		if err != nil {
			return err
		}
		if a.Size != info.Size() || !bytes.Equal(got, want) {
			return fmt.Errorf("%d bytes that differ from %d expected ones", len(got), len(want))
		}
	}
	return nil
}
