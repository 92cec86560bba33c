package files

import (
	"bytes"
	"errors"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/cowdev/cowdev/files/ext4"
)

// memImage is bytes as an image.
type memImage struct{ *bytes.Reader }

func (m memImage) Size() int64 { return m.Reader.Size() }

// smallImages makes an image of every kind that can be opened, and partition
// tables.
func smallImages(t testing.TB) map[string][]byte {
	t.Helper()
	images := smallFileSystems(t)
	for _, label := range []string{"gpt", "dos"} {
		disk := blank(t, 4<<20)
		run(t, "sh", "-c", "PATH=$PATH:/sbin:/usr/sbin; printf 'label: "+label+"\\nsize=1M\\n' | sfdisk -q "+disk)
		b, err := os.ReadFile(disk)
		if err != nil {
			t.Fatal(err)
		}
		images[label] = b
	}
	return images
}

// smallFileSystems makes an image of every kind of file system.
func smallFileSystems(t testing.TB) map[string][]byte {
	t.Helper()
	dir := plainTree(t, rand.New(rand.NewPCG(9, 9)), 20)
	images := map[string][]byte{}
	take := func(name, file string) {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		images[name] = b
	}
	for _, bits := range []string{"12", "32"} {
		fat := blank(t, map[string]int64{"12": 2 << 20, "32": 36 << 20}[bits])
		run(t, "mkfs.vfat", "-F", bits, "-s", "1", fat)
		run(t, "mcopy", "-s", "-Q", "-i", fat, dir, "::/")
		take("fat"+bits, fat)
	}
	if err := os.Symlink("f1", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(t.TempDir(), "image")
	for _, comp := range []string{"gzip", "zstd"} {
		run(t, "mksquashfs", dir, out, "-comp", comp, "-no-progress", "-noappend")
		take("squashfs "+comp, out)
	}
	run(t, "genisoimage", "-quiet", "-R", "-J", "-joliet-long", "-o", out, dir)
	take("iso", out)
	ext := blank(t, 2<<20)
	run(t, "mke2fs", "-q", "-F", "-t", "ext4", "-d", dir, ext)
	take("ext4", ext)
	return images
}

// readFiles reads every file of an image whole, as cat does.
func readFiles(image []byte, each func(name string, content []byte, err error)) error {
	fsys, err := Open(memImage{bytes.NewReader(image)})
	if err != nil {
		return err
	}
	root, err := fsys.Root()
	if err != nil {
		return err
	}
	return Walk("/", root, func(name string, f File) error {
		if f.Attr().Mode.IsRegular() {
			b, err := io.ReadAll(io.NewSectionReader(f, 0, f.Attr().Size))
			each(name, b, err)
		}
		return nil
	})
}

// An image that was cut short gives a file whole, or says that it is damaged;
// its end is not taken for the file's.
func TestCutShort(t *testing.T) {
	for kind, image := range smallFileSystems(t) {
		whole := map[string][]byte{}
		if err := readFiles(image, func(name string, b []byte, _ error) { whole[name] = b }); err != nil {
			t.Fatal(err)
		}
		for i := range 64 {
			damaged := func(err error) bool {
				return errors.Is(err, ErrDamaged) || errors.Is(err, ext4.ErrCorrupt)
			}
			err := readFiles(image[:len(image)*i/64], func(name string, b []byte, err error) {
				switch {
				case err != nil && !damaged(err):
					t.Errorf("%s, %d/64 of it: %s: %v", kind, i, name, err)
				case err == nil && !bytes.Equal(b, whole[name]):
					t.Errorf("%s, %d/64 of it: %s: %d bytes that are not those of the file, which has %d", kind, i, name, len(b), len(whole[name]))
				}
			})
			if err != nil && !damaged(err) && !errors.Is(err, ErrNoFS) {
				t.Errorf("%s, %d/64 of it: %v", kind, i, err)
			}
		}
	}
}

// explore does everything with an image that a verb would, a bounded part of
// each file.
func explore(image []byte) error {
	r := memImage{bytes.NewReader(image)}
	if _, _, err := Partitions(r); err != nil {
		return err
	}
	fsys, err := Open(r)
	if err != nil {
		return err
	}
	root, err := fsys.Root()
	if err != nil {
		return err
	}
	buf := make([]byte, 64<<10)
	left := 2000 // files: an image of damage can have many
	err = Walk("/", root, func(_ string, f File) error {
		if left--; left < 0 {
			return io.EOF
		}
		_, _ = f.Link()
		_, _ = f.Xattrs()
		size := f.Attr().Size
		for _, off := range []int64{0, size / 2, size - 100} {
			if _, err := f.ReadAt(buf, max(0, off)); err != nil && !errors.Is(err, io.EOF) {
				return nil // this file is damaged, others may not be
			}
		}
		return nil
	})
	return err
}

// Damaged images end in errors: no panic, no endless loop, no memory beyond
// what a whole image can need.
func TestHostile(t *testing.T) {
	rounds := 60
	if os.Getenv("COWDEV_LONG") != "" {
		rounds = 3000
	}
	rng := newRand(t)
	for name, image := range smallImages(t) {
		t.Run(name, func(t *testing.T) {
			// The beginning, where the numbers are that others hang on.
			for _, reach := range []int{1024, 64 << 10, len(image)} {
				for range rounds {
					was := edit(image, randomEdits(rng, min(reach, len(image))))
					exploreBounded(t, image)
					restore(image, was)
				}
			}
		})
	}
}

// randomEdits makes edits, as edit takes them, of the first n bytes.
func randomEdits(rng *rand.Rand, n int) (edits []byte) {
	for range 1 + rng.IntN(20) {
		at := rng.IntN(n)
		value := []byte{0, 1, 0x7f, 0x80, 0xff, byte(rng.Uint32())}[rng.IntN(6)]
		edits = append(edits, byte(at), byte(at>>8), byte(at>>16), value)
	}
	return edits
}

// exploreBounded explores an image within bounds of time and memory.
func exploreBounded(t *testing.T, image []byte) {
	t.Helper()
	const patience, memory = 60 * time.Second, 1 << 30
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	done := make(chan error, 1)
	go func() { done <- explore(image) }()
	select {
	case <-done:
	case <-time.After(patience):
		name := filepath.Join(os.TempDir(), "hostile.img")
		_ = os.WriteFile(name, image, 0o600)
		t.Fatalf("no end after %v; the image is %s", patience, name)
	}
	runtime.ReadMemStats(&after)
	if n := after.TotalAlloc - before.TotalAlloc; n > memory {
		name := filepath.Join(os.TempDir(), "hostile.img")
		_ = os.WriteFile(name, image, 0o600)
		t.Errorf("%d bytes of memory taken; the image is %s", n, name)
	}
}

// FuzzOpen explores small images in which the fuzzer sets bytes: of each four,
// three say where and one what. Whole images would be too large for it.
func FuzzOpen(f *testing.F) {
	var images [][]byte
	all := smallImages(f)
	for _, name := range slices.Sorted(maps.Keys(all)) {
		f.Add(byte(len(images)), []byte{56, 4, 0, 0xff})
		images = append(images, all[name])
	}
	f.Fuzz(func(_ *testing.T, n byte, edits []byte) {
		image := images[int(n)%len(images)]
		defer restore(image, edit(image, edits))
		_ = explore(image)
	})
}

// edit sets bytes, and returns what they were.
func edit(image, edits []byte) map[int]byte {
	was := map[int]byte{}
	for ; len(edits) >= 4; edits = edits[4:] {
		at := (int(edits[0]) | int(edits[1])<<8 | int(edits[2])<<16) % len(image)
		if _, again := was[at]; !again {
			was[at] = image[at]
		}
		image[at] = edits[3]
	}
	return was
}

// restore puts the bytes back.
func restore(image []byte, was map[int]byte) {
	for at, b := range was {
		image[at] = b
	}
}
