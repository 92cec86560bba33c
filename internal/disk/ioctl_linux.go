package disk

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// ioctl calls the ioctl req of fd with a pointer to arg.
func ioctl[T any](fd int, req uint, arg *T) error {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(req), uintptr(unsafe.Pointer(arg)))
	if errno != 0 {
		return errno
	}
	return nil
}
