package ext4_test

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/cowdev/cowdev/block"
	"github.com/cowdev/cowdev/files/ext4"
)

// counting is an image that counts the bytes read from it.
type counting struct {
	block.Reader
	n int64
}

func (c *counting) ReadAt(p []byte, off int64) (int, error) {
	c.n += int64(len(p))
	return c.Reader.ReadAt(p, off)
}

// listing makes an image with a directory of n files.
func listing(b *testing.B, n int) string {
	b.Helper()
	tree := b.TempDir()
	for i := range n {
		if err := os.WriteFile(filepath.Join(tree, fmt.Sprintf("some-entry-%d", i)), nil, 0o644); err != nil {
			b.Fatal(err)
		}
	}
	return makeImage(b, 64<<20, "-t", "ext4", "-b", "4096", "-d", tree)
}

// BenchmarkList opens a file system and lists a directory of 12,000 entries
// with all attributes, nothing cached but by the system.
func BenchmarkList(b *testing.B) {
	image := imageReader(b, listing(b, 12000))
	for b.Loop() {
		r := &counting{Reader: image}
		fs, err := ext4.Open(r)
		if err != nil {
			b.Fatal(err)
		}
		root, err := fs.Resolve("/", true)
		if err != nil {
			b.Fatal(err)
		}
		n := 0
		err = fs.ReadDir(root, func(e ext4.Dirent) error {
			n++
			_, err := fs.Inode(e.Ino)
			return err
		})
		if err != nil || n < 12000 {
			b.Fatalf("%d entries, %v", n, err)
		}
		b.ReportMetric(float64(r.n)/1e6, "MB-read")
	}
}

// BenchmarkLookup resolves each name of a directory of 12,000 entries.
func BenchmarkLookup(b *testing.B) {
	fs := openImage(b, listing(b, 12000))
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		if _, err := fs.Resolve(fmt.Sprintf("some-entry-%d", i%12000), true); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkInodes walks all inodes and their extents.
func BenchmarkInodes(b *testing.B) {
	fs := openImage(b, listing(b, 12000))
	b.ReportAllocs()
	for b.Loop() {
		for n, err := range fs.Inodes() {
			if err != nil {
				b.Fatal(err)
			}
			if _, err := n.Extents(); err != nil {
				b.Fatal(err)
			}
		}
	}
}

// BenchmarkOwners asks for the owners of a whole image of 100 GiB, most of it
// free.
func BenchmarkOwners(b *testing.B) {
	const size = 100 << 30
	tree := b.TempDir()
	for i := range 300 {
		if err := os.WriteFile(filepath.Join(tree, fmt.Sprint(i)), make([]byte, 1000), 0o644); err != nil {
			b.Fatal(err)
		}
	}
	fs := openImage(b, makeImage(b, size, "-t", "ext4", "-d", tree))
	for b.Loop() {
		if _, err := fs.Owners([]ext4.Range{{Off: 0, N: size}}, nil); err != nil {
			b.Fatal(err)
		}
	}
}
