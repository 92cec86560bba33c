// Package vm boots a small throw-away Linux guest for tests that need what the
// host's kernel may lack: the nbd driver, and power cuts.
//
// A guest is a stock Debian kernel (the cloud flavour) under qemu's software
// emulation, so neither /dev/kvm nor any support of the host's kernel is
// needed. Its root is an initramfs made of busybox, bash and of binaries of the
// host with their libraries; kernel and root are fetched and built once, by
// Prepare, and kept in a cache (~/.cache/cowdev-vm, or $COWDEV_VM_CACHE).
//
// Boot starts a guest and gives it files of the test and raw disks (/dev/vda,
// /dev/vdb and so on). It runs /job/run.sh with bash, in /job, and
// what that prints arrives line by line. By convention of the scripts in
// guest/ the lines are
//
//	ready            the kernel is up, the script begins
//	ok NAME          a scenario passed
//	not ok NAME: WHY a scenario failed
//	skip NAME: WHY   a scenario was not begun, or not finished in time
//	exit STATUS      the script ended
//
// and all others are notes. Machine.Cut is a power cut: the guest's memory is
// gone, its disks hold what it had flushed and perhaps more.
//
// Inside, everything takes ten to thirty times as long as outside: compare
// bytes and operations, not times.
package vm
