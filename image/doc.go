// Package image opens base images: a raw regular file of any size, or a block
// device. A Base is a block.Reader with mapped views; nothing in this package
// writes to it, and only merge opens one that can be written. Its holes, once
// known, are shown and read as zeros without asking the kernel again.
//
// # Identity
//
// A store is good only over the base it was made for: over any other one the
// device is a mixture of two, and the first fsck destroys it. An Identity says
// which base that is, as far as was found out:
//
//   - its size, and a stamp: a file's modification time, a device's serial;
//   - a sample: digests of 16 pieces, the first and the last MiB, where
//     superblocks lie, and blocks spread over the rest;
//   - the full digest: a tree of BLAKE3 over every 4 MiB, of which the root
//     and 64 intermediate digests are kept.
//
// Size, stamp and sample are looked at whenever a store is opened, as rsync's
// quick check does; the full digest only where the stamp differs. The pieces
// and the intermediate digests are there to name the first range that
// differs.
//
// A digest depends on the bytes alone, not on where a file has holes; holes
// are not read.
package image
