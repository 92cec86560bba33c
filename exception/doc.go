// Package exception is the exception store: one sparse file that holds what a
// device has that its origin has not.
//
// An exception is the fact that a block's bytes are in the store, or are zero.
// Each chunk of the device has one Entry of 64 bits: which of its blocks are
// stored, which read as zeros, and the home of the stored ones. A block in
// neither mask is the origin's. A stored block has a slot, a place in the file as
// large as a block. The home is straight, if the slots follow one another as
// the blocks do, or it is the number of a row of the table, which names a slot
// for each block.
//
// New slots are taken in order, so that first writes that lie anywhere are
// appended one behind the other. A Batch appends several by one system call.
//
// # The file
//
//	0        superblock A (4 KiB)
//	64 KiB   superblock B
//	128 KiB  table: 512-byte sectors of 63 words, each with its checksum: an
//	         entry for each chunk, then the rows, 8 words each
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
//     change is found again, flushed or not, where the file is still the one
//     that it was.
//  4. A change that was not flushed may be lost, wholly or by sector of 512
//     bytes, but nothing else is ever read: no other chunk's bytes, no stale
//     slot's, no zeros that nobody wrote.
//  5. A slot belongs to at most one block, a row to at most one chunk. A freed
//     slot is reused or punched, and a freed row reused, only after the record
//     without it is durable and no reader can see it.
//  6. Opening changes nothing that a second open would see differently. A
//     damaged store is refused, never repaired in silence.
//  7. A store opens only over the base it was made for (package image).
//  8. During a merge both routes to a chunk give the same bytes.
//  9. An error in one request harms that request only, but for a failed sync:
//     then the store is broken, and says so.
//  10. Memory is bounded: 24 bytes a chunk, taken by the page where chunks are
//     touched (8 of them in memory that outlives the process), 64 more for a
//     chunk with a row (all of them there), and the log's length once.
//
// # Rows
//
// A row names a slot for a block once: while a chunk has the row, the slot that
// is named for a block never changes. A block that was dropped and is stored
// again gives its chunk a new row. So
//
//   - whoever sees a block stored finds its slot, without a lock;
//   - a checkpoint writes the live rows to the table, though they may name more
//     than is committed;
//   - a record names only the slots that the row got since the last record of
//     the chunk, and all of them when the chunk got the row.
//
// Rows that are given up go through pending, draining and free, as slots do,
// and a row is cleared when it is taken again. Replay therefore believes what a
// record says of a row only if its chunk has the row in its final entry: else
// the row was given to another chunk since, and the table may know better.
//
// An adopted memory's rows are newer than the table's and the log's. Its entries
// are in no record: recovery makes its rows durable in the table before them.
//
// # Who may do what when
//
// Entry and the reads that rest on it take no lock: an entry is one atomic
// word. A reader holds a Pin from before it loads the entry until it has done
// with the bytes; without one, the row of an entry may be another chunk's
// already. Whoever changes a chunk holds its claim (Claim, Release) across the
// I/O; chunks never wait for one another. A Batch holds several claims, and
// waits for none of them. Commits are serial; any number of Flush calls share one, and only a checkpoint runs beside it.
//
// The lock order is: a chunk's claim, then one of the store's mutexes, of
// which nobody holds two but superMu and logMu, in this order.
package exception
