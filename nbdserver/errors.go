package nbdserver

import (
	"errors"
	"syscall"

	"github.com/cowdev/cowdev/internal/nbd"
)

// A failure is an error as the client is told it: a number of the
// specification and a sentence, in which nothing of this machine is told.
type failure struct {
	code uint32
	text string
}

// What the server itself refuses.
var (
	errReadOnly     = &failure{nbd.EPERM, "the export is read-only"}
	errUnknownCmd   = &failure{nbd.EINVAL, "unknown command"}
	errBadFlag      = &failure{nbd.EINVAL, "a command flag is unknown or not valid for this command"}
	errNoPayload    = &failure{nbd.EINVAL, "a write needs the flag PAYLOAD_LEN with extended headers"}
	errBadFlush     = &failure{nbd.EINVAL, "offset and length of a flush must be zero"}
	errPastEnd      = &failure{nbd.EINVAL, "the range goes past the end of the export"}
	errNoSpacePast  = &failure{nbd.ENOSPC, "the range goes past the end of the export"}
	errReadTooLong  = &failure{nbd.EOVERFLOW, "a read may have at most 33554432 bytes"}
	errWriteTooLong = &failure{nbd.EINVAL, "a write may have at most 33554432 bytes"}
	errNoContext    = &failure{nbd.EINVAL, "no metadata context was selected"}
	errEmptyStatus  = &failure{nbd.EINVAL, "a block status of no bytes says nothing"}
	errBadFilter    = &failure{nbd.EINVAL, "the list of metadata contexts is not valid"}
	errShuttingDown = &failure{nbd.ESHUTDOWN, "the server is shutting down"}
)

// deviceFailures are the errors that devices return, in the order in which
// they are looked for.
var deviceFailures = []struct {
	err error
	failure
}{
	{syscall.ENOSPC, failure{nbd.ENOSPC, "no space left for the overlay"}},
	{syscall.EDQUOT, failure{nbd.ENOSPC, "no quota left for the overlay"}},
	{syscall.EFBIG, failure{nbd.ENOSPC, "the overlay's file may not grow"}},
	{syscall.EPERM, failure{nbd.EPERM, "not permitted"}},
	{syscall.EROFS, failure{nbd.EPERM, "not permitted"}},
	{syscall.ENOMEM, failure{nbd.ENOMEM, "out of memory"}},
	{syscall.ESHUTDOWN, failure{nbd.ESHUTDOWN, "the device is shutting down"}},
}

var (
	errNotFast = &failure{nbd.ENOTSUP, "zeroing this range would not be faster than writing it"}
	errIO      = &failure{nbd.EIO, "input/output error"}
)

// failureOf is the one place where an error of a device becomes one of the
// protocol. ENOTSUP is left to fast zeroing, where the specification has it.
func failureOf(req *request, err error) *failure {
	if req.flags&nbd.CmdFlagFastZero != 0 && (errors.Is(err, syscall.ENOTSUP) || errors.Is(err, errors.ErrUnsupported)) {
		return errNotFast
	}
	for i := range deviceFailures {
		if errors.Is(err, deviceFailures[i].err) {
			return &deviceFailures[i].failure
		}
	}
	return errIO
}
