// Package cow is the device that a server exports: a read-only origin, usually
// the base image, seen through an exception store that takes every change.
//
// A read looks at each chunk's entry and takes each run of blocks from the
// store, from nowhere (zeros) or from the origin. A write goes over the blocks
// that are stored, each in its slot, and takes new slots for the others, which
// lie one behind the other wherever the blocks do; blocks that it covers in part
// and that are not stored yet are filled up from the origin first (copy-up), so
// that a write aligned to blocks copies nothing. A block written as zeros is
// recorded, not stored.
//
// # Concurrency
//
// Reads take no lock. They hold a pin of the store from before an entry is
// loaded until the bytes are done with, so that a slot that is given up
// meanwhile keeps its bytes (5). A write, trim or zero holds the claim of one
// chunk at a time, across its I/O; it waits for nothing while it holds one, so
// chunks never wait for each other, and there is no lock order to keep.
// WriteBatch holds the claims of several chunks, but only such as nobody had,
// and gives them up before it does anything that may wait for a claim or for
// room. A request over several chunks is not atomic, as none is on a disk: each sector
// is old or new (4).
//
// A write that finds the store full holds nothing while it waits (R23): one
// commit is run to get back what was given up, then, if the device was told to
// park writes, it waits for room as long as it was told, and only then says
// ENOSPC.
package cow
