// Package crash proves that a device keeps invariants 3 and 4 of package
// exception: after any death each sector is found with a value that it may
// have. docs/testing.md tells the fault model.
//
// An Oracle is told of every change and flush, and knows those values. A Walk
// makes a device over a file of package disktest, has clients change it, lets
// it die and comes back to it, again and again, and looks at copies of the
// file that die at other moments. The device runs in this process, or, by a
// Host, in the real program (test/crash).
//
// Nothing here knows how a store works. What a session did is told by world
// and client, what deaths are by death.go, and what is done with their
// remains by look.go.
package crash
