// Package rawfd takes sockets away from Go's network poller, for threads that
// block in system calls of their own.
package rawfd

import (
	"net"

	"golang.org/x/sys/unix"
)

// Take returns a blocking descriptor of nc, which it closes.
//
// A copy that (*net.UnixConn).File makes would not do: the poller watches that
// too, and wakes a thread for each message.
func Take(nc *net.UnixConn) (int, error) {
	defer nc.Close()
	raw, err := nc.SyscallConn()
	if err != nil {
		return 0, err
	}
	var fd int
	var dupErr error
	if err := raw.Control(func(old uintptr) {
		fd, dupErr = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0)
	}); err != nil {
		return 0, err
	}
	if dupErr != nil {
		return 0, dupErr
	}
	return fd, unix.SetNonblock(fd, false)
}
