package ext4_test

// Bytes from nowhere: images changed at random are opened and everything is
// read from them. Any answer will do but a panic, an endless loop or memory
// without bound.

import (
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cowdev/cowdev/files/ext4"
)

// memory is an image in memory.
type memory []byte

func (m memory) Size() int64 { return int64(len(m)) }

func (m memory) ReadAt(p []byte, off int64) (int, error) {
	if off >= int64(len(m)) {
		return 0, io.EOF
	}
	n := copy(p, m[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// smallImages returns small file systems of different features, made by mke2fs
// and debugfs without mounting. Most have no checksums, so that a change is
// not refused at once.
func smallImages(t testing.TB) []memory {
	t.Helper()
	tree := t.TempDir()
	write := func(name string, n int) {
		if err := os.WriteFile(filepath.Join(tree, name), []byte(strings.Repeat(name, n/len(name)+1)), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(tree, "dir"), 0o755); err != nil {
		t.Fatal(err)
	}
	for i := range 80 {
		write(fmt.Sprintf("dir/%060d", i), 10)
	}
	write("large", 30000)
	for _, n := range []int{30, 100} {
		if err := os.Symlink(strings.Repeat("t", n), filepath.Join(tree, fmt.Sprintf("link%d", n))); err != nil {
			t.Fatal(err)
		}
	}
	sparse := filepath.Join(tree, "sparse")
	write("sparse", 10)
	if err := os.Truncate(sparse, 100<<20); err != nil {
		t.Fatal(err)
	}
	var images []memory
	for _, options := range []string{
		"ext2 1024 none",
		"ext4 1024 ^has_journal,^metadata_csum,inline_data",
		"ext4 1024 ^has_journal,^metadata_csum,^resize_inode,bigalloc,ea_inode",
		"ext4 1024 ^has_journal,metadata_csum,meta_bg,^resize_inode",
		"ext4 4096 ^has_journal,^metadata_csum,uninit_bg",
	} {
		o := strings.Fields(options)
		images = append(images, imageOf(t, tree, 2<<20, "-t", o[0], "-b", o[1], "-O", o[2], "-N", "128"))
	}
	journal := imageOf(t, tree, 4<<20, "-t", "ext4", "-b", "1024", "-O", "^metadata_csum", "-J", "size=1", "-N", "128")
	return append(images, withJournal(t, journal))
}

// imageOf returns a file system that holds tree.
func imageOf(t testing.TB, tree string, size int64, mkfs ...string) memory {
	t.Helper()
	path := makeImage(t, size, append(mkfs, "-d", tree)...)
	p, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// withJournal returns the image with transactions in its journal that must be
// replayed: two blocks written, one of them revoked, then written again.
func withJournal(t testing.TB, image memory) memory {
	t.Helper()
	data := filepath.Join(t.TempDir(), "data")
	if err := os.WriteFile(data, []byte(strings.Repeat("journaled", 1000)), 0o644); err != nil {
		t.Fatal(err)
	}
	return debugfs(t, image, "jo", "jw -b 3000,3001 "+data, "jw -r 3000", "jw -b 3001 "+data, "jc")
}

// debugfs returns the image after commands of debugfs.
func debugfs(t testing.TB, image memory, commands ...string) memory {
	t.Helper()
	dir := scratch(t)
	path, script := filepath.Join(dir, "image"), filepath.Join(dir, "script")
	if err := os.WriteFile(path, image, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(script, []byte(strings.Join(commands, "\n")+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	run(t, "debugfs", "-w", "-f", script, path)
	out, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// TestSmallImages shows that the images used here are sound, and that the
// journal of one is replayed, the block that was revoked left out.
func TestSmallImages(t *testing.T) {
	images := smallImages(t)
	for i, image := range images {
		fs, err := ext4.Open(image)
		if err != nil {
			t.Fatalf("image %d: %v", i, err)
		}
		n, err := fs.Resolve("dir/"+fmt.Sprintf("%060d", 7), true)
		if err != nil {
			t.Fatalf("image %d: %v", i, err)
		}
		if p, err := io.ReadAll(n.Reader()); err != nil || !strings.HasPrefix(string(p), "dir/0000") {
			t.Errorf("image %d: read %q, %v", i, p, err)
		}
	}
	fs, err := ext4.Open(images[len(images)-1])
	if err != nil {
		t.Fatal(err)
	}
	if r := fs.Info().Recovery; !r.Needed || r.Transactions != 3 || r.Blocks != 1 {
		t.Errorf("recovery %+v, expected 3 transactions and 1 block", r)
	}
}

// readEverything asks for all that can be asked, and does not care for the
// answers.
func readEverything(image memory, other *ext4.FS) {
	if fs, err := ext4.Open(image); err == nil {
		askEverything(fs, image.Size(), other)
	}
}

func askEverything(fs *ext4.FS, size int64, other *ext4.FS) {
	fs.Info()
	whole := []ext4.Range{{Off: 0, N: size}}
	fs.Owners(whole, nil)
	if other != nil {
		if inos, err := ext4.Changed(other, fs, whole); err == nil {
			fs.Names(inos, nil)
		}
	}
	var inos []uint32
	p := make([]byte, 8192)
	for n, err := range fs.Inodes() {
		if err != nil {
			continue
		}
		inos = append(inos, n.Ino)
		n.Extents()
		n.Xattrs()
		n.Symlink()
		n.ReadAt(p, 0)
		n.ReadAt(p, n.Size-5000)
		n.ReadAt(p, n.Size/2)
		fs.ReadDir(n, func(ext4.Dirent) error { return nil })
		fs.DirPath(n.Ino)
	}
	fs.Names(inos, nil)
	for _, path := range []string{"dir/x", "link30", "link100", "large", "dir/../sparse"} {
		fs.Resolve(path, true)
	}
	for off := int64(0); off < size; off += 50000 {
		fs.Free(off)
	}
}

// mutate changes an image as edits say, each eight bytes: where and what. An
// offset is taken among the bytes that are not zero in blocks of metadata
// about half of the time: a random one mostly hits nothing.
func mutate(image memory, edits []byte) {
	for ; len(edits) >= 8; edits = edits[8:] {
		at := int(binary.LittleEndian.Uint32(edits)) % len(image)
		for edits[4]&1 != 0 && at < len(image)-4 && binary.LittleEndian.Uint32(image[at:]) == 0 {
			at++
		}
		switch v := edits[5:8]; {
		case edits[4]&2 != 0:
			image[at] = v[0]
		case at+4 <= len(image):
			binary.LittleEndian.PutUint16(image[at:], binary.LittleEndian.Uint16(v))
			image[at+2] = v[2]
		}
	}
}

// TestHostileImages reads hundreds of changed images, the same in each run.
func TestHostileImages(t *testing.T) {
	rounds := 80
	if os.Getenv("COWDEV_LONG") != "" {
		rounds = 5000
	}
	for i, sound := range smallImages(t) {
		other, err := ext4.Open(sound)
		if err != nil {
			t.Fatal(err)
		}
		image := make(memory, len(sound))
		for round := range rounds {
			copy(image, sound)
			rnd := rand.New(rand.NewPCG(uint64(i), uint64(round)))
			edits := make([]byte, 8*(1+rnd.IntN(12)))
			for k := range edits {
				edits[k] = byte(rnd.Uint32())
			}
			if rnd.IntN(2) == 0 { // near the beginning, where most metadata lies
				for k := 0; k < len(edits); k += 8 {
					binary.LittleEndian.PutUint32(edits[k:], uint32(rnd.IntN(80<<10)))
				}
			}
			mutate(image, edits)
			readEverything(image, other)
		}
	}
}

// FuzzImage reads images changed as the fuzzer likes.
func FuzzImage(f *testing.F) {
	images := smallImages(f)
	for i := range images {
		f.Add(byte(i), []byte{0, 4, 0, 0, 1, 2, 3, 4})
	}
	f.Fuzz(func(t *testing.T, which byte, edits []byte) {
		sound := images[int(which)%len(images)]
		other, err := ext4.Open(sound)
		if err != nil {
			t.Fatal(err)
		}
		image := make(memory, len(sound))
		copy(image, sound)
		mutate(image, edits)
		readEverything(image, other)
	})
}
