// Package exception is the exception store: one sparse file that holds what a
// device has that its origin has not.
//
// An exception is the fact that a block's bytes are in the store, or are zero.
// Each chunk of the device has one Entry of 64 bits: its slot (a place in the
// file as large as a chunk), which of its blocks are stored there, each at its
// own offset, and which read as zeros. A block in neither mask is the
// origin's.
//
// # The file
//
//	0        superblock A (4 KiB)
//	64 KiB   superblock B
//	128 KiB  table: 512-byte sectors of 63 entries, each with its checksum
//	         log: a ring of checksummed records, each one commit
//	         slots, numbered from 1
//
// docs/format.md has every field. The table lies behind the log: what was
// committed since the last checkpoint is in the log alone.
//
// # The contract
//
// The numbers are those of docs/architecture.md; code and tests cite them.
//
//  1. A base is written by nothing but merge.
//  2. A mapping becomes durable only after the data it names is durable, or
//     together with it in one checksummed record.
//  3. After Flush every change that was acknowledged before is found again
//     after any crash; and when only the process dies, every acknowledged
//     change is found again, flushed or not.
//  4. A change that was not flushed may be lost, wholly or by sector of 512
//     bytes, but nothing else is ever read: no other chunk's bytes, no stale
//     slot's, no zeros that nobody wrote.
//  5. A slot belongs to at most one chunk. A freed one is reused or punched
//     only after the record without it is durable and no reader can see it.
//  6. Opening changes nothing that a second open would see differently. A
//     damaged store is refused, never repaired in silence.
//  7. A store opens only over the base it was made for (package image).
//  8. During a merge both routes to a chunk give the same bytes.
//  9. An error in one request harms that request only, but for a failed sync:
//     then the store is broken, and says so.
//  10. Memory is bounded: 24 bytes a chunk, taken by the page where chunks are
//     touched (8 of them in memory that outlives the process), and the log's
//     length once.
//
// # Who may do what when
//
// Entry and the reads that rest on it take no lock: an entry is one atomic
// word. A reader holds a Pin from before it loads the entry until it has done
// with the bytes. Whoever changes a chunk holds its claim (Claim, Release)
// across the I/O; chunks never wait for one another. Commits are serial;
// any number of Flush calls share one, and only a checkpoint runs beside it.
//
// The lock order is: a chunk's claim, then one of the store's mutexes, of
// which nobody holds two but superMu and logMu, in this order.
package exception
