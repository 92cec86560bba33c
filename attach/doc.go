// Package attach makes a block device of Linux out of a device that this
// process serves, so that a filesystem on it can be mounted.
//
// There are two drivers.
//
//   - NBD: /dev/nbdN. The kernel's NBD client is given one end of socket pairs
//     by netlink (package nbdnl); the other ends are served by
//     nbdserver.ServeTransmission, here or in another process. The device
//     outlives who serves it: the kernel holds requests until it is given new
//     sockets (NBD.Reconnect, Resume), or until DeadTimeout.
//   - Loop: /dev/loopN over a FUSE filesystem of one file. For kernels without
//     the nbd driver. It ends with the process that serves it.
//
// What other processes have to know of an attached device lies in a States
// directory, /run/cowdev, in one file a device.
//
// # Caveats
//
// A filesystem under memory pressure writes to its device, and waits for who
// serves it; who serves it must not wait for memory that only such a write
// would free. Shield tells the kernel so (PR_SET_IO_FLUSHER) and keeps the
// process's memory from being swapped out, where permitted.
//
// Devices have whole sectors of 512 bytes: what an image has after the last
// one is not seen through them.
package attach
