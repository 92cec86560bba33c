package ext4

import (
	"fmt"
	"strings"
)

// Features of the superblock that this package acts on, with the kernel's
// names.
const (
	compatHasJournal   = 0x4
	compatSparseSuper2 = 0x200

	incompatFiletype = 0x2
	incompatRecover  = 0x4
	incompatMetaBG   = 0x10
	incompat64bit    = 0x80
	incompatMMP      = 0x100
	incompatCsumSeed = 0x2000
	incompatLargeDir = 0x4000

	roCompatSparseSuper  = 0x1
	roCompatHugeFile     = 0x8
	roCompatGDTCsum      = 0x10
	roCompatBigalloc     = 0x200
	roCompatMetadataCsum = 0x400
	roCompatSharedBlocks = 0x4000
)

// incompatKnown are the features that change the format and are understood.
const incompatKnown = incompatFiletype | incompatRecover | incompatMetaBG |
	0x40 /* extents */ | incompat64bit | incompatMMP | 0x200 /* flex_bg */ |
	0x400 /* ea_inode */ | incompatCsumSeed | incompatLargeDir |
	0x8000 /* inline_data */ | 0x10000 /* encrypt */ | 0x20000 /* casefold */

// featureNames are the names that mke2fs and dumpe2fs use, by bit.
var (
	compatNames = []string{"dir_prealloc", "imagic_inodes", "has_journal", "ext_attr", "resize_inode", "dir_index",
		"lazy_bg", "exclude_inode", "exclude_bitmap", "sparse_super2", "fast_commit", "stable_inodes", "orphan_file"}
	incompatNames = []string{"compression", "filetype", "needs_recovery", "journal_dev", "meta_bg", "", "extent", "64bit",
		"mmp", "flex_bg", "ea_inode", "", "dirdata", "metadata_csum_seed", "large_dir", "inline_data", "encrypt", "casefold"}
	roCompatNames = []string{"sparse_super", "large_file", "btree_dir", "huge_file", "uninit_bg", "dir_nlink", "extra_isize",
		"snapshot", "quota", "bigalloc", "metadata_csum", "replica", "read-only", "project", "shared_blocks", "verity",
		"orphan_present"}
)

// appendFeatures appends the names of the bits set in v; a bit without a name
// is told by its set and number.
func appendFeatures(to []string, v uint32, set string, names []string) []string {
	for bit := range 32 {
		switch {
		case v>>bit&1 == 0:
		case bit < len(names) && names[bit] != "":
			to = append(to, names[bit])
		default:
			to = append(to, fmt.Sprintf("%s_%#x", set, uint32(1)<<bit))
		}
	}
	return to
}

// featureError names the features of sb that cannot be read, or is nil.
func (sb *super) featureError() error {
	unknown := sb.incompat &^ incompatKnown
	if unknown == 0 {
		return nil
	}
	names := appendFeatures(nil, unknown, "incompat", incompatNames)
	return fmt.Errorf("ext4 with the feature %s: %w", strings.Join(names, ", "), ErrUnsupported)
}
