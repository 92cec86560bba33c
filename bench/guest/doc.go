// Package guest compares copy-on-write devices of one kernel: the kernel's own
// dm-snapshot, and cowdev serve behind the kernel's nbd driver. It runs as root
// inside a virtual machine, for few kernels at hand have both.
//
// Every system makes a device of the same two disks: an origin, which nothing
// may write, and a second disk for what changes. All loads come by the same
// calls, O_DIRECT reads and writes of the device and fdatasync. What a load
// costs is counted at the disks, until the device is closed and the caches are
// written out:
//
//	new store -> open -> load -> close -> sync -> counters -> (next load) -> compare
//
// Contents are told by a block's number and how often it was written (fill), so
// that the origin is made on the host and compared here without a copy of it.
// After the last load of a store the whole device is compared, block by block.
package guest
