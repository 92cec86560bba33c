package files

import (
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
	if skipped, err := Extract(top, root, "tree", ExtractOptions{Archive: true}); err != nil || len(skipped) > 0 {
		t.Fatalf("extract: %v, skipped %q", err, skipped)
	}
	// Times of links, and so of the directories they stand in, are not kept.
	diff := run(t, "rsync", "-naHAXc", "--modify-window=-1", "--omit-link-times", "--delete", "-i", mounted+"/", filepath.Join(out, "tree")+"/")
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
	if _, err := Extract(f, root, "a", ExtractOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := Extract(f, root, "a", ExtractOptions{}); !errors.Is(err, fs.ErrExist) {
		t.Errorf("a second time: %v, expected that it exists", err)
	}
	if _, err := Extract(f, root, "a", ExtractOptions{Replace: true}); err != nil {
		t.Errorf("replaced: %v", err)
	}
	if err := os.Symlink(outside, filepath.Join(out, "b")); err != nil {
		t.Fatal(err)
	}
	if _, err := Extract(f, root, "b", ExtractOptions{Replace: true}); err == nil {
		t.Error("a directory was extracted through a link that leads out")
	}
	if left, err := os.ReadDir(outside); err != nil || len(left) > 0 {
		t.Errorf("outside the destination there is %v (%v)", left, err)
	}
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
		if _, err := Extract(f, root, name, ExtractOptions{Replace: true}); !errors.Is(err, fs.ErrExist) {
			t.Errorf("onto %s: %v, expected that it exists", name, err)
		}
		if after, err := os.Lstat(path); err != nil || !os.SameFile(before, after) {
			t.Errorf("%s: %v, %v, expected what was there", name, after, err)
		}
	}
}
