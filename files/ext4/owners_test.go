package ext4_test

// What blocks are used for, what a change touched and where its files are
// named, compared with the trees that kernel_test.go shows to be right.

import (
	"bytes"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/cowdev/cowdev/files/ext4"
	"golang.org/x/sys/unix"
)

// TestOwners asks for the owners of a whole image: every allocated block has
// one, the free ones are as many as the superblock says, and each file's
// extents are its own.
func TestOwners(t *testing.T) {
	each(t, func(t *testing.T, c combination) {
		image := makeImage(t, 64<<20, c.mkfs...)
		dir, unmount := mountNew(t, image, "noatime,"+c.mount)
		p := newPopulator(t, dir, 4)
		p.special()
		p.churn(100)
		unmount()
		fs := openImage(t, image)
		size := imageReader(t, image).size
		owners, err := fs.Owners([]ext4.Range{{Off: 0, N: size}}, nil)
		if err != nil {
			t.Fatal(err)
		}
		checkCover(t, owners, size)
		sum := map[ext4.Kind]int64{}
		for _, o := range owners {
			sum[o.Kind] += o.N
			if free, err := fs.Free(o.Off + o.N - 1); err != nil || free != (o.Kind == ext4.KindFree) {
				t.Errorf("owner %+v, but free is %v, %v", o, free, err)
			}
		}
		info := fs.Info()
		if sum[ext4.KindFree] != info.Free {
			t.Errorf("%d bytes are free, the superblock says %d", sum[ext4.KindFree], info.Free)
		}
		if sum[ext4.KindUnknown] != 0 {
			t.Errorf("%d bytes have no owner: %v", sum[ext4.KindUnknown], sum)
		}
		checkExtentOwners(t, fs, owners)
	})
}

// checkCover fails the test unless owners cover [0, size) without gap.
func checkCover(t *testing.T, owners []ext4.Owner, size int64) {
	t.Helper()
	at := int64(0)
	for _, o := range owners {
		if o.Off != at || o.N <= 0 {
			t.Fatalf("owner %+v, expected at %d", o, at)
		}
		at += o.N
	}
	if at != size {
		t.Fatalf("owners end at %d, expected %d", at, size)
	}
}

// checkExtentOwners asks for the owners of each file's extents, and finds the
// file.
func checkExtentOwners(t *testing.T, fs *ext4.FS, owners []ext4.Owner) {
	t.Helper()
	for n, err := range fs.Inodes() {
		if err != nil {
			t.Fatal(err)
		}
		if !n.IsRegular() || n.Ino < 11 || n.Flags&ext4.FlagEAInode != 0 {
			continue
		}
		extents, err := n.Extents()
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range extents {
			i, _ := slices.BinarySearchFunc(owners, e.Phys, func(o ext4.Owner, at int64) int {
				if o.Off+o.N <= at {
					return -1
				}
				return 1
			})
			o := owners[i]
			if o.Kind == ext4.KindReserved {
				continue // the file of orphans
			}
			if o.Kind != ext4.KindData || o.Ino != n.Ino || o.FileOff+e.Phys-o.Off != e.Off || o.Off+o.N < e.Phys+e.N {
				t.Fatalf("inode %d, extent %+v: owner is %+v", n.Ino, e, o)
			}
		}
	}
}

// differing returns the blocks of 1 KiB that differ between two images.
func differing(t *testing.T, a, b string) []ext4.Range {
	t.Helper()
	p, err := os.ReadFile(a)
	if err != nil {
		t.Fatal(err)
	}
	q, err := os.ReadFile(b)
	if err != nil {
		t.Fatal(err)
	}
	const size = 1024
	var out []ext4.Range
	for off := 0; off < len(p); off += size {
		if !bytes.Equal(p[off:off+size], q[off:off+size]) {
			out = append(out, ext4.Range{Off: int64(off), N: size})
		}
	}
	return out
}

// inoOf returns the inode's number out of a file's facts.
func inoOf(f facts) uint32 {
	n, _ := strconv.ParseUint(strings.Fields(f["stat"])[1], 10, 32)
	return uint32(n)
}

// byInode returns the facts of each inode, the names in a directory among
// them.
func byInode(tree map[string]facts) map[uint32]facts {
	out := map[uint32]facts{}
	for _, f := range tree {
		out[inoOf(f)] = maps.Clone(f)
	}
	for path, f := range tree {
		if path != "" {
			dir, name := filepath.Split(path)
			out[inoOf(tree[strings.TrimSuffix(dir, "/")])].set("name "+name, "%d", inoOf(f))
		}
	}
	return out
}

// TestChanged copies a mounted image before and after random changes: every
// file that differs is among the inodes that Changed returns, and Names gives
// the names that the tree has.
func TestChanged(t *testing.T) {
	each(t, func(t *testing.T, c combination) {
		if c.clean {
			t.Skip("cannot be copied while mounted")
		}
		image := makeImage(t, 64<<20, c.mkfs...)
		dir, _ := mountNew(t, image, "noatime,commit=300,"+c.mount)
		p := newPopulator(t, dir, 5)
		p.special()
		p.churn(200)
		p.syncFS()
		before := copyImage(t, image)
		p.churn(30)
		p.syncFS()
		after := copyImage(t, image)
		checkChanged(t, before, after)
	})
}

func checkChanged(t *testing.T, before, after string) {
	t.Helper()
	old, updated := openImage(t, before), openImage(t, after)
	inos, err := ext4.Changed(old, updated, differing(t, before, after))
	if err != nil {
		t.Fatal(err)
	}
	was, is := readTree(t, old), readTree(t, updated)
	wasInodes, isInodes := byInode(was), byInode(is)
	want := map[uint32]bool{}
	for _, side := range []map[uint32]facts{wasInodes, isInodes} {
		for ino := range side {
			if !maps.Equal(wasInodes[ino], isInodes[ino]) {
				want[ino] = true
			}
		}
	}
	for ino := range want {
		if !slices.Contains(inos, ino) {
			t.Errorf("inode %d differs, but is not returned", ino)
		}
	}
	if len(inos) > 2*len(want)+10 {
		t.Errorf("%d inodes are returned, only %d differ", len(inos), len(want))
	}
	checkNames(t, updated, inos, is)
}

// checkNames compares the names of inodes with those in the tree.
func checkNames(t *testing.T, fs *ext4.FS, inos []uint32, tree map[string]facts) {
	t.Helper()
	names, err := fs.Names(inos, nil)
	if err != nil {
		t.Fatal(err)
	}
	got, want := map[string]uint32{}, map[string]uint32{}
	for ino, list := range names {
		for _, n := range list {
			path, err := fs.DirPath(n.Dir)
			if err != nil {
				t.Fatal(err)
			}
			if path != "" {
				path = "/" + path
			}
			got[path+"/"+n.Name] = ino
		}
	}
	for path, f := range tree {
		if path != "" && slices.Contains(inos, inoOf(f)) {
			want[path] = inoOf(f)
		}
	}
	if !maps.Equal(got, want) {
		t.Errorf("names are\n%v\nexpected\n%v", got, want)
	}
}

// TestChangedBehindTheInode writes into a file's block and nowhere else, as a
// program that maps the file does before its times are written: the file is
// found although its inode is the same.
func TestChangedBehindTheInode(t *testing.T) {
	needMount(t)
	image := makeImage(t, 16<<20, "-t", "ext4")
	dir, unmount := mount(t, image, "noatime")
	p := newPopulator(t, dir, 6)
	p.special()
	unmount()
	old := openImage(t, image)
	n, err := old.Resolve("special/fragmented", true)
	if err != nil {
		t.Fatal(err)
	}
	extents, err := n.Extents()
	if err != nil {
		t.Fatal(err)
	}
	inos, err := ext4.Changed(old, openImage(t, image), []ext4.Range{{Off: extents[100].Phys + 17, N: 1}})
	if err != nil || !slices.Equal(inos, []uint32{n.Ino}) {
		t.Errorf("changed are %v, %v; expected %d", inos, err, n.Ino)
	}
	other := openImage(t, makeImage(t, 16<<20, "-t", "ext4"))
	if _, err := ext4.Changed(old, other, nil); !errors.Is(err, ext4.ErrDifferent) {
		t.Errorf("changed from another file system: %v, expected %v", err, ext4.ErrDifferent)
	}
}

// TestSharedAttributes changes the attribute block that two files share, and
// gets both.
func TestSharedAttributes(t *testing.T) {
	needMount(t)
	image := makeImage(t, 16<<20, "-t", "ext4", "-I", "128", "-O", "^metadata_csum,^has_journal")
	dir, unmount := mount(t, image, "noatime")
	p := newPopulator(t, dir, 7)
	value := []byte("the value of both files")
	for _, name := range []string{"a", "b"} {
		p.must(os.WriteFile(filepath.Join(dir, name), nil, 0o644))
		p.must(unix.Setxattr(filepath.Join(dir, name), "user.shared", value, 0))
	}
	unmount()
	before, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	at := bytes.Index(before, value)
	if at < 0 || bytes.Contains(before[at+1:], value) {
		t.Skip("the kernel does not share attribute blocks")
	}
	after := slices.Clone(before)
	after[at]++
	old, err := ext4.Open(memory(before))
	if err != nil {
		t.Fatal(err)
	}
	updated, err := ext4.Open(memory(after))
	if err != nil {
		t.Fatal(err)
	}
	var want []uint32
	for _, name := range []string{"a", "b"} {
		n, err := old.Resolve(name, true)
		if err != nil {
			t.Fatal(err)
		}
		want = append(want, n.Ino)
	}
	slices.Sort(want)
	inos, err := ext4.Changed(old, updated, []ext4.Range{{Off: int64(at), N: 1}})
	if err != nil || !slices.Equal(inos, want) {
		t.Errorf("changed are %v, %v; expected %v", inos, err, want)
	}
}
