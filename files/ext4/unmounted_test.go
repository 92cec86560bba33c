package ext4_test

// File systems that most kernels do not mount, and machines where nothing can
// be mounted: mke2fs fills images from a tree, which must be found in them.

import (
	"bytes"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/cowdev/cowdev/files/ext4"
)

// makeTree fills a directory with files of many sizes, links, long names and
// more names than fit a block.
func makeTree(t *testing.T) string {
	t.Helper()
	tree := t.TempDir()
	rnd := rand.New(rand.NewPCG(1, 1))
	for _, dir := range []string{"a/b/c", "many", strings.Repeat("d", 255)} {
		if err := os.MkdirAll(filepath.Join(tree, dir), 0o750); err != nil {
			t.Fatal(err)
		}
	}
	for _, size := range []int{0, 1, 60, 61, 150, 1023, 4096, 65535, 65537, 300000} {
		p := make([]byte, size)
		for i := range p {
			p[i] = byte(rnd.Uint32() | 1) // mke2fs makes holes of zeros, and mistakes of some
		}
		if err := os.WriteFile(filepath.Join(tree, "a/b/c", fmt.Sprintf("size-%d", size)), p, 0o640); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 700 {
		if err := os.Symlink(strings.Repeat("t", 1+i%120), filepath.Join(tree, "many", fmt.Sprintf("%0100d", i))); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Link(filepath.Join(tree, "a/b/c/size-61"), filepath.Join(tree, "linked")); err != nil {
		t.Fatal(err)
	}
	return tree
}

func TestUnmounted(t *testing.T) {
	tree := makeTree(t)
	for _, options := range []string{
		"ext4 1024 none",
		"ext4 8192 none",
		"ext4 65536 ^has_journal",
		"ext4 65536 ^metadata_csum,^has_journal,inline_data",
		"ext4 4096 quota,project,verity,stable_inodes",
		"ext4 4096 casefold",
		"ext2 1024 none",
		"ext3 4096 none",
	} {
		t.Run(options, func(t *testing.T) {
			o := strings.Fields(options)
			image := imageOf(t, tree, 64<<20, "-t", o[0], "-b", o[1], "-O", o[2])
			f, err := ext4.Open(image)
			if err != nil {
				t.Fatal(err)
			}
			compareWithTree(t, f, tree)
			owners, err := f.Owners([]ext4.Range{{Off: 0, N: image.Size()}}, nil)
			if err != nil {
				t.Fatal(err)
			}
			checkCover(t, owners, image.Size())
			for _, o := range owners {
				if o.Kind == ext4.KindUnknown {
					t.Errorf("owner %+v", o)
				}
			}
		})
	}
}

// compareWithTree looks for each file of the tree.
func compareWithTree(t *testing.T, f *ext4.FS, tree string) {
	t.Helper()
	err := filepath.WalkDir(tree, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		name := strings.TrimPrefix(path, tree)
		n, err := f.Resolve(name, false)
		if err != nil {
			return err
		}
		if name != "" && n.FileMode() != info.Mode() {
			t.Errorf("%s: mode %v, expected %v", name, n.FileMode(), info.Mode())
		}
		switch {
		case n.IsSymlink():
			target, err := n.Symlink()
			if want, _ := os.Readlink(path); err != nil || target != want {
				t.Errorf("%s: target %q, %v; expected %q", name, target, err, want)
			}
		case n.IsRegular():
			p, err := io.ReadAll(n.Reader())
			if want, _ := os.ReadFile(path); err != nil || !bytes.Equal(p, want) {
				t.Errorf("%s: %d bytes, %v; not as expected", name, len(p), err)
			}
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

// TestConcurrent asks one file system for everything from several goroutines
// at once; it is for the race detector.
func TestConcurrent(t *testing.T) {
	image := smallImages(t)[0]
	f, err := ext4.Open(image)
	if err != nil {
		t.Fatal(err)
	}
	n, err := f.Resolve("large", true)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			askEverything(f, image.Size(), nil)
			if p, err := io.ReadAll(n.Reader()); err != nil || !strings.HasPrefix(string(p), "largelarge") {
				t.Errorf("read %d bytes, %v", len(p), err)
			}
		})
	}
	wg.Wait()
}
