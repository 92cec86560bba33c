// Package crash proves that a device keeps invariants 3 and 4 of package
// exception: after any death each sector is found with a value that it may
// have.
//
// An Oracle is told of every change and flush, and knows those values. It
// serves the real device in memory, over a file of package disktest (the walks
// of this package), and the real program behind a socket (test/crash) alike.
package crash
