// Package files looks into the file systems of images: without root, without
// mounting, and without writing a byte.
//
// An FS is a file system found in a block.Reader by Open: ext2, ext3 and ext4
// by the project's own reader (files/ext4), FAT, ISO 9660 and squashfs through
// go-diskfs behind guards (diskfs.go says which), and nothing else; XFS, btrfs
// and others are recognised, and refused with their name. An image with a
// partition table is cut by Partitions and Part.In first.
//
// A File is one file of any kind: a directory, a link, a device. Its name is
// no part of it; Lookup finds a file by its path, and Walk visits a tree.
//
// # Differences
//
// Compare takes two file systems, usually a base and the same device seen
// through its overlay, and says which files were added, removed, modified or
// renamed. It knows two ways, which give the same answer:
//
//   - everything is compared (Options.All, and always for other than ext);
//   - or only what the changed byte ranges of the device can have touched. For
//     ext the ranges are turned into blocks, the blocks into inodes and the
//     inodes into paths, and all other directories are passed over. The cost
//     follows the change. (affected.go)
//
// WriteTar makes a layer in OCI's convention of the result, WriteContent a
// unified diff of the text files.
//
// # Space
//
// Why says for what files, directories and kinds of metadata an overlay keeps
// the blocks it has stored; Kinds colours a map.
//
// # Caveats
//
// What is read is the device as it would be found after a power cut at that
// moment: the journal of an ext file system is replayed in memory first. Files
// whose writes the guest still holds in its page cache are seen without them.
//
// Bytes of an image are not trusted: sizes are checked before memory is taken
// for them, loops of directories and links end with an error, and names that
// no file can have are refused.
package files
