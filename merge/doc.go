// Package merge folds the exceptions of a store into its base, or into a new
// image.
//
// # In place
//
// Into copies every exception into the base and then empties the store. It can
// be killed at any point and run again, and at every point the base seen
// through the store has the right bytes (8):
//
//  1. What the store holds is made durable.
//  2. The store's state becomes Merging (R25). From now on the base's identity
//     says nothing of ranges that have an exception.
//  3. Stored blocks are written into the base, in order of their offsets and in
//     large pieces; zeros become holes. Beside that, where the filesystem can
//     (reflink), the base is given the store's own blocks of what lies in one
//     piece there, a MiB or more, and nothing is copied. What a crash leaves
//     half written lies under an exception still.
//  4. The base is made durable.
//  5. The base's new identity is recorded, the state still being Merging.
//  6. The exceptions are dropped (R24), or the store is removed.
//  7. The state becomes Active.
//
// A merge that begins in state Merging does all of it again: a block is never
// left out because the cached base has the right bytes already, which says
// nothing of the disk.
//
// # Into a new image
//
// To leaves the base and the store as they are. The new image shares the
// base's blocks where the filesystem can (reflink), and elsewhere gets its
// data but not its holes. The exceptions are copied in any case. It is given its
// name only when it is complete.
package merge
