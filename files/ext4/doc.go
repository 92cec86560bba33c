// Package ext4 reads ext2, ext3 and ext4 file systems out of any
// block.Reader, without root, without mounting and without writing.
//
// Open looks at a file system as the kernel would find it after mounting: when
// it was not unmounted cleanly, its journal is replayed in memory (jbd2 with
// revoke records, 64-bit numbers, checksums of all versions, and ext4's fast
// commits). A journal replayed here costs an index of the journal's blocks,
// not a copy of them.
//
// # Nouns
//
// An FS is an open file system, an Inode a file of it, an Extent a run of a
// file's bytes and where they lie, an Owner what a run of the image's bytes is
// used for. Offsets and lengths are bytes everywhere in the exported API.
//
//	fs, err := ext4.Open(r)
//	n, err := fs.Resolve("/etc/passwd", true)
//	_, err = io.Copy(os.Stdout, n.Reader())
//
// # What is read
//
// Block sizes from 1 to 64 KiB, inodes of 128 bytes and more, extents and
// indirect maps, holes and unwritten extents (zeros), inline data in files and
// directories, linear and hashed directories, extended attributes in the
// inode, in a block and in inodes of their own, 64bit, flex_bg, meta_bg,
// bigalloc, sparse_super2, metadata_csum (with and without seed), gdt_csum,
// orphan_file, large_dir, project quotas. Names of casefolded directories are
// listed and looked up byte by byte. Encrypted files and directories are
// refused with ErrEncrypted; a file system with a feature that changes the
// format in a way not known here is refused with ErrUnsupported, which names
// it.
//
// Checksums are verified where the file system has them: superblock, group
// descriptors, bitmaps, inodes, extent blocks, directory blocks, attribute
// blocks and the journal. What does not match is an error that wraps
// ErrCorrupt and names the object; nothing is guessed.
//
// Not read are a journal on a device of its own when it is needed, copies of
// the superblock when the first is damaged, and names by their casefolded form.
//
// # Changed files at the cost of the change
//
// Changed names the inodes that may differ between two file systems, one of
// which came from the other by writing to known ranges. It reads the changed
// blocks of inode tables and asks whether the inodes found there explain the
// other changed blocks; only when some block stays unexplained are further
// inode tables read, nearest first. Names finds the names of inodes the same
// way, DirPath the path of a directory, and Owners tells what any range is used
// for. ChangedRanges says where the bytes shown may differ, which with a
// journal to replay is not only where the image does.
//
// # Hostile images
//
// Every number from the image is checked against the image's own size before
// it is used. Memory is bounded by what the image really holds: trees are
// walked with the set of blocks already seen, so that a loop or a block used
// twice ends in an error, and the limits in limits.go hold for everything
// else. No method panics or loops for ever on any bytes.
//
// # Concurrency
//
// An FS and its Inodes may be used by several goroutines at once. The image
// must not change meanwhile: a view of a running device is a snapshot of it.
package ext4
