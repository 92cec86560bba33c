package ext4_test

import (
	"os"
	"testing"
)

// A combination is a file system as mke2fs makes it and mount mounts it.
type combination struct {
	name  string
	mkfs  []string
	mount string
	long  bool // not in every run
	clean bool // without a journal, or with one that the kernel replays only after minutes
}

var combinations = []combination{
	{name: "ext4", mkfs: []string{"-t", "ext4", "-b", "4096"}},
	{name: "ext4-1k", mkfs: []string{"-t", "ext4", "-b", "1024"}},
	{name: "ext4-2k-sparse_super2", mkfs: []string{"-t", "ext4", "-b", "2048", "-O", "sparse_super2,^resize_inode"}, long: true},
	{name: "ext2", mkfs: []string{"-t", "ext2", "-I", "128"}, clean: true},
	{name: "ext2-1k-nofiletype", mkfs: []string{"-t", "ext2", "-b", "1024", "-O", "^filetype,^sparse_super,^resize_inode"}, clean: true, long: true},
	{name: "ext3-1k", mkfs: []string{"-t", "ext3", "-b", "1024"}},
	{name: "ext3-data-journal", mkfs: []string{"-t", "ext3", "-I", "128"}, mount: "data=journal", long: true},
	{name: "ext4-data-journal", mkfs: []string{"-t", "ext4", "-b", "4096"}, mount: "data=journal"},
	{name: "ext4-128", mkfs: []string{"-t", "ext4", "-b", "4096", "-I", "128"}, long: true},
	{name: "ext4-1024", mkfs: []string{"-t", "ext4", "-b", "4096", "-I", "1024", "-O", "inline_data"}, long: true},
	{name: "inline_data", mkfs: []string{"-t", "ext4", "-b", "4096", "-O", "inline_data"}},
	{name: "bigalloc", mkfs: []string{"-t", "ext4", "-b", "4096", "-O", "bigalloc", "-C", "16384"}},
	{name: "bigalloc-1k", mkfs: []string{"-t", "ext4", "-b", "1024", "-O", "bigalloc", "-C", "8192"}, long: true},
	{name: "meta_bg-1k", mkfs: []string{"-t", "ext4", "-b", "1024", "-O", "meta_bg,^resize_inode"}},
	{name: "uninit_bg", mkfs: []string{"-t", "ext4", "-O", "^metadata_csum,uninit_bg,^64bit"}},
	{name: "csum_seed-orphan_file", mkfs: []string{"-t", "ext4", "-b", "4096", "-O", "metadata_csum_seed,orphan_file"}},
	{name: "ea_inode-large_dir", mkfs: []string{"-t", "ext4", "-b", "4096", "-O", "ea_inode,large_dir"}},
	{name: "no-journal", mkfs: []string{"-t", "ext4", "-O", "^has_journal"}, clean: true, long: true},
	{name: "no-flex_bg-no-extent", mkfs: []string{"-t", "ext4", "-O", "^flex_bg,^extent,^64bit"}, long: true},
	{name: "journal_checksum", mkfs: []string{"-t", "ext4", "-O", "^metadata_csum"}, mount: "data=writeback,journal_checksum,journal_async_commit", long: true},
	{name: "journal-32bit", mkfs: []string{"-t", "ext4", "-O", "^64bit"}, long: true},
	{name: "mmp-encrypt", mkfs: []string{"-t", "ext4", "-O", "mmp,encrypt"}, clean: true, long: true},
	{name: "no-dir_index-1k", mkfs: []string{"-t", "ext4", "-b", "1024", "-O", "^dir_index"}, long: true},
}

// each runs a test on every combination, the long ones only with
// COWDEV_LONG=1.
func each(t *testing.T, fn func(t *testing.T, c combination)) {
	needMount(t)
	for _, c := range combinations {
		t.Run(c.name, func(t *testing.T) {
			if c.long && os.Getenv("COWDEV_LONG") == "" {
				t.Skip("only with COWDEV_LONG=1")
			}
			fn(t, c)
		})
	}
}

// nothing leaves no fact out of a comparison.
func nothing(facts, string) bool { return false }

// TestKernelAgrees fills a file system, compares copies of the image taken
// while it is mounted with what the kernel makes of them, and in the end the
// image itself after it was unmounted.
func TestKernelAgrees(t *testing.T) {
	each(t, func(t *testing.T, c combination) {
		image := makeImage(t, 64<<20, c.mkfs...)
		options := "noatime," + c.mount
		if !c.clean {
			options += ",commit=300" // none of its own accord while a copy is taken
		}
		dir, unmount := mountNew(t, image, options)
		p := newPopulator(t, dir, 1)
		p.special()
		p.manyNames("many", 1000)
		p.churn(300)
		p.syncFS()
		if !c.clean {
			compareUnclean(t, image, nothing)
			p.churn(300)
			p.fsyncSome(3)
			p.churn(50) // not in the journal
			compareUnclean(t, image, nothing)
		}
		unmount()
		dir, unmount = mount(t, image, "ro,noatime")
		want := kernelTree(t, dir)
		unmount()
		fs := openImage(t, image)
		if fs.Info().Recovery.Needed {
			t.Error("a clean file system needs its journal")
		}
		compareTrees(t, readTree(t, fs), want, nothing)
	})
}

// TestFastCommits does the same with fast commits, each an fsync. The kernel
// replays them by making the changes again, at the time of the mount: what it
// changes in passing, the times and space of directories and of what they
// hold, is not compared.
func TestFastCommits(t *testing.T) {
	needMount(t)
	image := makeImage(t, 64<<20, "-t", "ext4", "-J", "size=16", "-O", "fast_commit")
	dir, _ := mountNew(t, image, "noatime,commit=300")
	p := newPopulator(t, dir, 3)
	p.special()
	p.churn(100)
	fast := 0
	rounds := 5
	if os.Getenv("COWDEV_LONG") != "" {
		rounds = 30
	}
	before := copyImage(t, image)
	for range rounds {
		p.syncFS()
		for range 3 {
			p.churnSimple(30)
			p.fsyncSome(4)
		}
		fast += compareUnclean(t, image, func(f facts, key string) bool {
			switch key {
			case "ctime", "blocks":
				return true
			case "mtime", "size", "links":
				return isDir(f)
			}
			return false
		})
		after := copyImage(t, image)
		checkChanged(t, before, after)
		os.Remove(before)
		before = after
	}
	if fast == 0 {
		t.Error("there was no fast commit")
	}
}

// compareUnclean copies a mounted image and compares what this package and
// the kernel read from it. It returns how many fast commits were replayed.
func compareUnclean(t *testing.T, image string, skip func(facts, string) bool) (fastCommits int) {
	t.Helper()
	ours := copyImage(t, image)
	theirs := copyImage(t, ours)
	fs := openImage(t, ours)
	r := fs.Info().Recovery
	if r.Transactions == 0 {
		t.Errorf("nothing was replayed: %+v", r)
	}
	got := readTree(t, fs)
	dir, unmount := mount(t, theirs, "noatime")
	compareTrees(t, got, kernelTree(t, dir), skip)
	unmount()
	os.Remove(ours)
	os.Remove(theirs)
	return r.FastCommits
}
