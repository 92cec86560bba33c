// Package clients holds tests of the cowdev binary with the NBD clients that
// people use: nbdinfo, nbdcopy and nbdsh of libnbd, qemu-img, qemu-io and
// qemu-storage-daemon, fio, and nbd-client, over unix sockets, TCP and TLS.
// The kernel's own client is in test/vm.
package clients
