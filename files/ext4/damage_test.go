package ext4_test

// What is damaged, encrypted or of an unknown kind is refused by name, with an
// error that can be told apart.

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cowdev/cowdev/files/ext4"
)

// checksummed returns a small image with checksums, a directory of many
// blocks, a file of many extents and one with an attribute block.
func checksummed(t *testing.T) memory {
	t.Helper()
	tree := t.TempDir()
	for i := range 100 {
		if err := os.WriteFile(filepath.Join(tree, fmt.Sprintf("%060d", i)), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	f, err := os.Create(filepath.Join(tree, "fragmented"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for i := range int64(20) {
		if _, err := f.WriteAt([]byte("x"), i*2*65536); err != nil {
			t.Fatal(err)
		}
	}
	image := imageOf(t, tree, 4<<20, "-t", "ext4", "-b", "1024", "-O", "metadata_csum,^resize_inode", "-N", "128")
	value := filepath.Join(tree, "value")
	if err := os.WriteFile(value, []byte(strings.Repeat("v", 500)), 0o600); err != nil {
		t.Fatal(err)
	}
	return debugfs(t, image, "ea_set -f "+value+" fragmented user.large")
}

// firstError asks for everything that has a checksum, and returns the first
// error.
func firstError(image memory) error {
	f, err := ext4.Open(image)
	if err != nil {
		return err
	}
	for n, err := range f.Inodes() {
		if err != nil {
			return err
		}
		_, err := n.Extents()
		if err == nil {
			_, err = n.Xattrs()
		}
		if err == nil && n.IsDir() {
			err = f.ReadDir(n, func(ext4.Dirent) error { return nil })
		}
		if err != nil {
			return err
		}
	}
	_, err = f.Owners([]ext4.Range{{Off: 0, N: image.Size()}}, nil)
	return err
}

// TestChecksums changes one byte of each kind of metadata, and is told.
func TestChecksums(t *testing.T) {
	sound := checksummed(t)
	if err := firstError(sound); err != nil {
		t.Fatal(err)
	}
	f, err := ext4.Open(sound)
	if err != nil {
		t.Fatal(err)
	}
	owners, err := f.Owners([]ext4.Range{{Off: 0, N: sound.Size()}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	for kind, message := range map[ext4.Kind]string{
		ext4.KindSuperblock:  "superblock",
		ext4.KindDescriptors: "descriptor",
		ext4.KindBlockBitmap: "block bitmap",
		ext4.KindInodeBitmap: "inode bitmap",
		ext4.KindInodeTable:  "inode ",
		ext4.KindDirectory:   "directory ",
		ext4.KindMap:         "extent block ",
		ext4.KindXattr:       "attribute block ",
	} {
		t.Run(kind.String(), func(t *testing.T) {
			i := slices.IndexFunc(owners, func(o ext4.Owner) bool { return o.Kind == kind })
			if i < 0 {
				t.Fatal("the image has none")
			}
			image := slices.Clone(sound)
			at := max(owners[i].Off, 1024) + 4
			for image[at] == 0 { // to a byte in use
				at++
			}
			image[at] ^= 0x10
			err := firstError(image)
			if !errors.Is(err, ext4.ErrCorrupt) || !strings.Contains(err.Error(), message) {
				t.Errorf("error is %v, expected one of a damaged %s", err, message)
			}
		})
	}
}

// TestJournalChecksums damages the journal: a block that a transaction wrote is
// an error, a torn commit block ends the log before its transaction.
func TestJournalChecksums(t *testing.T) {
	data := filepath.Join(t.TempDir(), "data")
	if err := os.WriteFile(data, []byte(strings.Repeat("journaled", 1000)), 0o600); err != nil {
		t.Fatal(err)
	}
	for version := 2; version <= 3; version++ {
		t.Run(fmt.Sprintf("v%d", version), func(t *testing.T) {
			sound := debugfs(t, checksummed(t), fmt.Sprintf("jo -c -v %d", version), "jw -b 3000 "+data, "jw -b 3001 "+data, "jc")
			wantRecovery(t, sound, 2)
			first, last := -1, -1 // the content of one, the second commit block
			for off := 0; off < len(sound); off += 1024 {
				if first < 0 && strings.HasPrefix(string(sound[off:]), "journaled") {
					first = off
				}
				if binary.BigEndian.Uint32(sound[off:]) == 0xC03B3998 && binary.BigEndian.Uint32(sound[off+4:]) == 2 {
					last = off
				}
			}
			image := slices.Clone(sound)
			image[first]++
			if _, err := ext4.Open(image); !errors.Is(err, ext4.ErrCorrupt) || !strings.Contains(err.Error(), "journal: transaction") {
				t.Errorf("error is %v, expected one of a damaged journal", err)
			}
			image = slices.Clone(sound)
			image[last+20]++
			wantRecovery(t, image, 1)
		})
	}
}

// wantRecovery opens an image and expects that so many transactions of one
// block each were replayed.
func wantRecovery(t *testing.T, image memory, transactions int) {
	t.Helper()
	f, err := ext4.Open(image)
	if err != nil {
		t.Fatal(err)
	}
	if r := f.Info().Recovery; r.Transactions != transactions || r.Blocks != transactions {
		t.Errorf("recovery %+v, expected %d transactions and blocks", r, transactions)
	}
}

// TestRefused shows the errors of what is not read.
func TestRefused(t *testing.T) {
	sound := smallImages(t)[1]
	if _, err := ext4.Open(make(memory, 1<<20)); !errors.Is(err, ext4.ErrNotExt) {
		t.Errorf("zeros: %v, expected %v", err, ext4.ErrNotExt)
	}
	if ext4.Probe(make([]byte, ext4.ProbeSize)) || !ext4.Probe(sound[:ext4.ProbeSize]) {
		t.Error("Probe is wrong")
	}
	if _, err := ext4.Open(sound[:len(sound)/2]); !errors.Is(err, ext4.ErrCorrupt) {
		t.Errorf("half an image: %v, expected %v", err, ext4.ErrCorrupt)
	}
	image := slices.Clone(sound)
	image[1024+0x61] |= 0x10 // dirdata
	if _, err := ext4.Open(image); !errors.Is(err, ext4.ErrUnsupported) || !strings.Contains(err.Error(), "dirdata") {
		t.Errorf("unknown feature: %v, expected its name", err)
	}
	f, err := ext4.Open(debugfs(t, sound, "set_inode_field large flags 0x80800", "set_inode_field dir flags 0x80800"))
	if err != nil {
		t.Fatal(err)
	}
	n, err := f.Resolve("large", true)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadAll(n.Reader()); !errors.Is(err, ext4.ErrEncrypted) {
		t.Errorf("encrypted file: %v, expected %v", err, ext4.ErrEncrypted)
	}
	if _, err := f.Resolve("dir/x", true); !errors.Is(err, ext4.ErrEncrypted) {
		t.Errorf("encrypted directory: %v, expected %v", err, ext4.ErrEncrypted)
	}
}

// TestResolve walks paths with links, dots and slashes.
func TestResolve(t *testing.T) {
	tree := t.TempDir()
	for _, dir := range []string{"a/b/c", "d"} {
		if err := os.MkdirAll(filepath.Join(tree, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(tree, "a/b/file"), []byte("file"), 0o644); err != nil {
		t.Fatal(err)
	}
	for name, target := range map[string]string{"a/up": "../d", "abs": "/a/b", "d/out": "../../../../a", "loop": "loop2", "loop2": "loop", "gone": "nothing"} {
		if err := os.Symlink(target, filepath.Join(tree, name)); err != nil {
			t.Fatal(err)
		}
	}
	f, err := ext4.Open(imageOf(t, tree, 1<<20, "-t", "ext4", "-O", "^has_journal"))
	if err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		"": "", "/": "", "..": "", "a/./b//c/": "a/b/c", "a/up": "d", "abs/c": "a/b/c", "a/up/out/b": "a/b", "abs/../up/..": "",
	} {
		n, err := f.Resolve(path, true)
		if err != nil {
			t.Errorf("%q: %v", path, err)
			continue
		}
		if got, err := f.DirPath(n.Ino); err != nil || got != want {
			t.Errorf("%q leads to %q, %v; expected %q", path, got, err, want)
		}
	}
	for path, want := range map[string]error{
		"a/b/file/": ext4.ErrNotDir, "a/b/file/x": ext4.ErrNotDir, "a/nothing": fs.ErrNotExist, "gone": fs.ErrNotExist, "loop/x": ext4.ErrLoop,
	} {
		if _, err := f.Resolve(path, true); !errors.Is(err, want) {
			t.Errorf("%q: %v, expected %v", path, err, want)
		}
	}
	if n, err := f.Resolve("loop", false); err != nil || !n.IsSymlink() {
		t.Errorf("a link that is not followed: %v", err)
	}
}
