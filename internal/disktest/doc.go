// Package disktest has a file in memory that crashes and fails on purpose: a
// disk.File that knows which of its bytes are durable, which are only in the
// page cache, and in what order they came there.
//
// # What a crash may leave
//
// A sector (512 bytes) is written whole or not at all. Every change that no
// sync has covered may have reached the disk or not, each sector of it on its
// own and in any order among the changes of other sectors; of one sector's
// versions the one that is left may be any since the last sync that covered
// it. A punched hole is zeros under the same rule. A changed size is on the
// disk or not, and what lies behind the size that is left is gone. Crash makes
// one such state by a random source, so a seed makes it again.
//
// A Sync covers the changes whose calls had returned when it began; what was
// written while it ran stays un-synced. A WriteSync covers its own sectors
// alone, and while it runs they may be torn.
//
// When only the process dies the page cache lives on: Kill gives that file,
// un-synced changes included, so that a power cut may follow.
//
// # Faults
//
// Inject decides for each operation whether it fails and how much of it is
// done before. After a failed Sync what it covered is on the disk or never
// will be, as kernels do it: the pages count as clean, still read as new, and
// no later Sync writes them. DropCache then forgets them. SetSpace makes a disk
// that is full.
//
// # Watching
//
// OnStep is called inside each operation, between what a crash could tell
// apart, with no lock held: it may take a Crash of the file there and look at
// it, or block to let another goroutine run first.
package disktest
