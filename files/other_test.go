package files

import (
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// FAT, ISO 9660 and squashfs as the usual tools write them, read back: every
// name, kind and content; and what is refused is refused by its name.

func TestFAT(t *testing.T) {
	for _, c := range []struct {
		bits string
		size int64
		args []string
	}{
		{"12", 4 << 20, []string{"-s", "8"}},
		{"16", 40 << 20, nil},
		{"32", 80 << 20, []string{"-s", "1"}},
		{"32", 300 << 20, []string{"-S", "4096"}},
	} {
		t.Run("FAT"+c.bits, func(t *testing.T) {
			dir := plainTree(t, rand.New(rand.NewPCG(1, 2)), 60)
			image := blank(t, c.size)
			run(t, "mkfs.vfat", append([]string{"-F", c.bits, "-n", "LABEL", image}, c.args...)...)
			entries, err := filepath.Glob(filepath.Join(dir, "*"))
			if err != nil {
				t.Fatal(err)
			}
			run(t, "mcopy", append(append([]string{"-s", "-Q", "-m", "-i", image}, entries...), "::/")...)
			fsys := openImage(t, image)
			if got := fsys.Info(); got.Type != "vfat" || got.Label != "LABEL" {
				t.Errorf("info %+v", got)
			}
			compareTree(t, fsys, dir, func(name string, f File, info fs.FileInfo) error {
				if !info.IsDir() && f.Attr().Modified.Year() != info.ModTime().Year() {
					return fmt.Errorf("modified %v, expected about %v", f.Attr().Modified, info.ModTime())
				}
				return nil
			})
		})
	}
}

// A chain that leads into itself ends where the file does.
func TestFATLoop(t *testing.T) {
	image := blank(t, 4<<20)
	run(t, "mkfs.vfat", "-F", "16", "-s", "1", image)
	data := filepath.Join(t.TempDir(), "data")
	if err := os.WriteFile(data, make([]byte, 3*512), 0o644); err != nil {
		t.Fatal(err)
	}
	run(t, "mcopy", "-i", image, data, "::/data")
	f := openImage(t, image).(*fatFS)
	raw, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	if _, err := raw.WriteAt([]byte{2, 0}, f.g.table+4); err != nil { // cluster 2 follows itself
		t.Fatal(err)
	}
	file, err := Lookup(openImage(t, image), "data", false)
	if err != nil {
		t.Fatal(err)
	}
	if b, err := content(file); len(b) != 3*512 || err != nil {
		t.Errorf("read %d bytes (%v), expected %d", len(b), err, 3*512)
	}
}

func TestSquashfs(t *testing.T) {
	dir := unixTree(t, rand.New(rand.NewPCG(3, 4)))
	for _, comp := range []string{"gzip", "xz", "zstd"} {
		t.Run(comp, func(t *testing.T) {
			image := filepath.Join(t.TempDir(), "image")
			run(t, "mksquashfs", dir, image, "-comp", comp, "-no-progress")
			compareTree(t, openImage(t, image), dir, compareOwner)
		})
	}
	for _, comp := range []string{"lz4", "lzo"} {
		image := filepath.Join(t.TempDir(), "image")
		run(t, "mksquashfs", dir, image, "-comp", comp, "-no-progress")
		_, err := Open(openReader(t, image))
		if !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), comp) {
			t.Errorf("squashfs with %s: %v, expected it refused by name", comp, err)
		}
	}
}

func TestISO(t *testing.T) {
	dir := unixTree(t, rand.New(rand.NewPCG(5, 6)))
	image := filepath.Join(t.TempDir(), "image")
	run(t, "genisoimage", "-quiet", "-R", "-V", "DISC", "-o", image, dir)
	fsys := openImage(t, image)
	if got := fsys.Info(); got.Type != "iso9660" || got.Label != "DISC" {
		t.Errorf("info %+v", got)
	}
	compareTree(t, fsys, dir, compareOwner)

	run(t, "genisoimage", "-quiet", "-J", "-joliet-long", "-o", image, plainTree(t, rand.New(rand.NewPCG(7, 8)), 20))
	if _, err := Open(openReader(t, image)); !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), "Joliet") {
		t.Errorf("Joliet alone: %v, expected it refused by name", err)
	}
}

// unixTree is a plain tree with links and modes.
func unixTree(t *testing.T, rng *rand.Rand) string {
	dir := plainTree(t, rng, 60)
	for name, target := range map[string]string{"link": "nowhere", "up": "../x/y"} {
		if err := os.Symlink(target, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "script"), []byte("#!/bin/sh\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}

func compareOwner(_ string, f File, info fs.FileInfo) error {
	if a := f.Attr(); a.Mode.Perm() != info.Mode().Perm() && a.Mode&fs.ModeSymlink == 0 {
		return fmt.Errorf("mode %v, expected %v", a.Mode, info.Mode())
	}
	if a := f.Attr(); a.Modified.Unix() != info.ModTime().Unix() && !info.IsDir() && a.Mode.IsRegular() {
		return fmt.Errorf("modified %v, expected %v", a.Modified, info.ModTime())
	}
	return nil
}

func TestLookup(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"a/b/c", "top"} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(name), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for name, target := range map[string]string{"a/abs": "/a/b", "a/up": "../../../top", "loop": "loop", "a/b/out": "/../../../etc/passwd"} {
		if err := os.Symlink(target, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	image := filepath.Join(t.TempDir(), "image")
	run(t, "mksquashfs", dir, image, "-no-progress")
	fsys := openImage(t, image)
	for _, c := range []struct{ name, want string }{
		{"/a/b/c", "a/b/c"}, {"a//b/./c", "a/b/c"}, {"a/abs/c", "a/b/c"}, {"a/up", "top"}, {"a/abs/../up", "top"}, {"../top", "top"},
	} {
		f, err := Lookup(fsys, c.name, true)
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		if b, err := content(f); string(b) != c.want || err != nil {
			t.Errorf("%s holds %q (%v), expected %q", c.name, b, err, c.want)
		}
	}
	for _, name := range []string{"nothing", "a/nothing/x", "top/x", "a/b/out", "loop"} {
		if _, err := Lookup(fsys, name, true); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v, expected an error with the name", name, err)
		}
	}
	if f, err := Lookup(fsys, "loop", false); err != nil || f.Attr().Mode&fs.ModeSymlink == 0 {
		t.Errorf("the link itself: %v, %v", f, err)
	}
}

func TestProbe(t *testing.T) {
	for name, at := range map[string]magic{
		"XFS": {0, "XFSB"}, "btrfs": {65600, "_BHRfS_M"}, "NTFS": {3, "NTFS    "}, "LUKS": {0, "LUKS\xba\xbe"}, "swap": {4086, "SWAPSPACE2"},
	} {
		image := blank(t, 1<<20)
		f, err := os.OpenFile(image, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt([]byte(at.bytes), int64(at.off)); err != nil {
			t.Fatal(err)
		}
		f.Close()
		if _, err := Open(openReader(t, image)); !errors.Is(err, ErrNoFS) || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v, expected it refused by name", name, err)
		}
	}
	for _, size := range []int64{0, 1, 511, 4096, 1 << 20} {
		if _, err := Open(openReader(t, blank(t, size))); !errors.Is(err, ErrNoFS) {
			t.Errorf("%d zero bytes: %v, expected no file system", size, err)
		}
	}
}
