package files

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// A tree copied out with everything is what rsync sees in the mounted image.
func TestExtract(t *testing.T) {
	rng := newRand(t)
	p := makePair(t, rng, 32<<20, 150, 60, false, "-t", "ext4")
	mounted, _ := mount(t, scratch(t, p.new), "ro")
	out := t.TempDir()
	if err := unix.Setxattr(out, "user.probe", nil, 0); err != nil {
		t.Skipf("%s keeps no extended attributes: %v", out, err)
	}
	root, err := os.OpenRoot(out)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	top, err := openImage(t, p.new).Root()
	if err != nil {
		t.Fatal(err)
	}
	if skipped, err := Extract(t.Context(), top, root, "tree", ExtractOptions{Archive: true}); err != nil || len(skipped) > 0 {
		t.Fatalf("extract: %v, skipped %q", err, skipped)
	}
	diff := run(t, "rsync", "-naHAXc", "--modify-window=-1", "--delete", "-i", mounted+"/", filepath.Join(out, "tree")+"/")
	if diff != "" {
		t.Errorf("rsync finds:\n%s", diff)
	}
}

// What exists is replaced only when asked, and a link that leads out of the
// destination is not followed.
func TestExtractOver(t *testing.T) {
	source := t.TempDir()
	if err := os.MkdirAll(filepath.Join(source, "dir"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(source, "dir", "file"), []byte(strings.Repeat("x", 5000)), 0o644); err != nil {
		t.Fatal(err)
	}
	image := filepath.Join(t.TempDir(), "image")
	run(t, "mksquashfs", source, image, "-no-progress")
	f, err := Lookup(openImage(t, image), "/dir", false)
	if err != nil {
		t.Fatal(err)
	}
	out, outside := t.TempDir(), t.TempDir()
	root, err := os.OpenRoot(out)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	if _, err := Extract(t.Context(), f, root, "a", ExtractOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := Extract(t.Context(), f, root, "a", ExtractOptions{}); !errors.Is(err, fs.ErrExist) {
		t.Errorf("a second time: %v, expected that it exists", err)
	}
	if _, err := Extract(t.Context(), f, root, "a", ExtractOptions{Replace: true}); err != nil {
		t.Errorf("replaced: %v", err)
	}
	for path, want := range map[string]error{filepath.Join(out, "a", "file"): fs.ErrExist, image: nil} {
		kept, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Extract(t.Context(), f, root, "a", ExtractOptions{Replace: true, Keep: []fs.FileInfo{kept}}); !errors.Is(err, want) {
			t.Errorf("with %s to be kept: %v, expected %v", path, err, want)
		}
	}
	if err := os.Symlink(outside, filepath.Join(out, "b")); err != nil {
		t.Fatal(err)
	}
	if _, err := Extract(t.Context(), f, root, "b", ExtractOptions{Replace: true}); err == nil {
		t.Error("a directory was extracted through a link that leads out")
	}
	if left, err := os.ReadDir(outside); err != nil || len(left) > 0 {
		t.Errorf("outside the destination there is %v (%v)", left, err)
	}
}

// Times beyond 2262, those of links and the attributes of links and devices are
// kept; holes take no time; and a file that was interrupted is not left in part.
func TestExtractOdd(t *testing.T) {
	image := filepath.Join(t.TempDir(), "image")
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.WriteFile(image, nil, 0o644))
	must(os.Truncate(image, 32<<20))
	run(t, "mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", image)
	mounted, unmount := mount(t, image, "")
	late := []unix.Timespec{{}, {Sec: 14e9, Nsec: 123456789}} // in 2413
	const huge = 8 << 40
	in := func(name string) string { return filepath.Join(mounted, name) }
	must(os.WriteFile(in("late"), []byte("x"), 0o644))
	must(os.Symlink("late", in("link")))
	must(unix.Mknod(in("node"), unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3))))
	for _, name := range []string{"late", "link", "node"} {
		must(unix.UtimesNanoAt(unix.AT_FDCWD, in(name), late, unix.AT_SYMLINK_NOFOLLOW))
		must(unix.Lsetxattr(in(name), "trusted.probe", []byte(name), 0))
	}
	must(os.WriteFile(in("sparse"), nil, 0o644))
	must(os.Truncate(in("sparse"), huge))
	sparse, err := os.OpenFile(in("sparse"), os.O_WRONLY, 0)
	must(err)
	_, err = sparse.WriteAt([]byte("end"), huge-3)
	must(errors.Join(err, sparse.Close()))
	unmount()

	out := t.TempDir()
	if err := os.WriteFile(filepath.Join(out, "probe"), nil, 0o600); err != nil || os.Truncate(filepath.Join(out, "probe"), huge) != nil {
		t.Skipf("%s has no files of %d bytes", out, int64(huge))
	}
	if err := unix.Setxattr(out, "trusted.probe", nil, 0); err != nil {
		t.Skipf("%s keeps no extended attributes: %v", out, err)
	}
	root, err := os.OpenRoot(out)
	must(err)
	defer root.Close()
	top, err := openImage(t, image).Root()
	must(err)
	_, err = Extract(t.Context(), top, root, "tree", ExtractOptions{Archive: true})
	must(err)
	for _, name := range []string{"late", "link", "node"} {
		var st unix.Stat_t
		must(unix.Lstat(filepath.Join(out, "tree", name), &st))
		if st.Mtim != late[1] {
			t.Errorf("%s: changed at %v, expected %v", name, st.Mtim, late[1])
		}
		value := make([]byte, 100)
		n, err := unix.Lgetxattr(filepath.Join(out, "tree", name), "trusted.probe", value)
		if err != nil || string(value[:n]) != name {
			t.Errorf("%s: attribute %q, %v", name, value[:max(n, 0)], err)
		}
	}
	f, err := os.Open(filepath.Join(out, "tree", "sparse"))
	must(err)
	defer f.Close()
	end := make([]byte, 4)
	if _, err := f.ReadAt(end, huge-4); err != nil || string(end) != "\x00end" {
		t.Errorf("the sparse file ends with %q, %v", end, err)
	}

	ctx, cancel := context.WithCancel(t.Context())
	file, err := top.Child("sparse")
	must(err)
	if _, err := Extract(ctx, interrupting{file, cancel}, root, "part", ExtractOptions{}); !errors.Is(err, context.Canceled) {
		t.Errorf("interrupted: %v", err)
	}
	if _, err := root.Lstat("part"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("what was interrupted: %v, expected that nothing is left", err)
	}
}

// interrupting is a file that is interrupted when it is read.
type interrupting struct {
	File
	cancel func()
}

func (i interrupting) ReadAt(p []byte, off int64) (int, error) {
	i.cancel()
	copy(p, "some")
	return len(p), nil
}

// Nothing but files and links gives way, when that is asked for.
func TestExtractInTheWay(t *testing.T) {
	source := t.TempDir()
	if err := os.WriteFile(filepath.Join(source, "file"), []byte("new"), 0o644); err != nil {
		t.Fatal(err)
	}
	image := filepath.Join(t.TempDir(), "image")
	run(t, "mksquashfs", source, image, "-no-progress")
	f, err := Lookup(openImage(t, image), "/file", false)
	if err != nil {
		t.Fatal(err)
	}
	out := t.TempDir()
	root, err := os.OpenRoot(out)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	for name, mode := range map[string]uint32{"pipe": unix.S_IFIFO, "socket": unix.S_IFSOCK, "node": unix.S_IFCHR, "dir": unix.S_IFDIR} {
		path := filepath.Join(out, name)
		if mode == unix.S_IFDIR {
			err = os.Mkdir(path, 0o700)
		} else {
			err = unix.Mknod(path, mode|0o600, int(unix.Mkdev(1, 3)))
		}
		if errors.Is(err, unix.EPERM) {
			continue // making devices needs root
		}
		if err != nil {
			t.Fatal(err)
		}
		before, err := os.Lstat(path)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Extract(t.Context(), f, root, name, ExtractOptions{Replace: true}); !errors.Is(err, fs.ErrExist) {
			t.Errorf("onto %s: %v, expected that it exists", name, err)
		}
		if after, err := os.Lstat(path); err != nil || !os.SameFile(before, after) {
			t.Errorf("%s: %v, %v, expected what was there", name, after, err)
		}
	}
}

// A tree with files of every kind can be copied twice to one place.
func TestExtractReplaces(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("making devices needs root")
	}
	source := t.TempDir()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.WriteFile(filepath.Join(source, "file"), []byte("new"), 0o644))
	must(os.Link(filepath.Join(source, "file"), filepath.Join(source, "hard")))
	must(os.Symlink("file", filepath.Join(source, "link")))
	must(unix.Mkfifo(filepath.Join(source, "pipe"), 0o600))
	must(unix.Mknod(filepath.Join(source, "node"), unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3))))
	image := filepath.Join(t.TempDir(), "image")
	must(os.WriteFile(image, nil, 0o644))
	must(os.Truncate(image, 8<<20))
	run(t, "mke2fs", "-q", "-F", "-t", "ext4", "-d", source, image)
	fsys := openImage(t, image)
	top, err := fsys.Root()
	must(err)
	out, outside := t.TempDir(), t.TempDir()
	root, err := os.OpenRoot(out)
	must(err)
	defer root.Close()
	extract := func(f File, name string) error {
		_, err := Extract(t.Context(), f, root, name, ExtractOptions{Archive: true, Replace: true})
		return err
	}
	must(extract(top, "a"))
	// A link that leads out stands where a file belongs.
	kept := filepath.Join(outside, "kept")
	must(os.WriteFile(kept, []byte("kept"), 0o644))
	must(os.Remove(filepath.Join(out, "a/hard")))
	must(os.Symlink(kept, filepath.Join(out, "a/hard")))
	must(extract(top, "a"))
	if got, err := os.ReadFile(kept); string(got) != "kept" {
		t.Errorf("outside the destination: %q, %v", got, err)
	}
	file, err := os.Lstat(filepath.Join(out, "a/file"))
	must(err)
	hard, err := os.Lstat(filepath.Join(out, "a/hard"))
	must(err)
	if !os.SameFile(file, hard) {
		t.Error("the hard link became a file of its own")
	}

	link, err := Lookup(fsys, "/link", false)
	must(err)
	if err := extract(link, "a/pipe"); !errors.Is(err, fs.ErrExist) {
		t.Errorf("a link onto a fifo: %v, expected that it exists", err)
	}
}
