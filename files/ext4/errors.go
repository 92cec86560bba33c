package ext4

import (
	"errors"
	"fmt"
	"io/fs"
)

// Errors of this package wrap one of these, so that a caller can tell them
// apart with errors.Is. A name that does not exist wraps fs.ErrNotExist. An
// error of the image's reader is wrapped as it came.
var (
	ErrNotExt      = errors.New("not an ext2, ext3 or ext4 file system")
	ErrUnsupported = errors.New("not supported")
	ErrCorrupt     = errors.New("file system is damaged")
	ErrEncrypted   = errors.New("encrypted, its key is not known here")
	ErrNotDir      = errors.New("not a directory")
	ErrLoop        = errors.New("too many symbolic links")
	ErrDifferent   = errors.New("file systems of different shape")
)

// corrupt returns an error that wraps ErrCorrupt and says what is wrong.
func corrupt(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrCorrupt, fmt.Sprintf(format, args...))
}

// badSum is the error of a checksum that does not match.
func badSum(found, computed uint32) error {
	return corrupt("checksum is %#08x, expected %#08x", found, computed)
}

func notExist(format string, args ...any) error {
	return fmt.Errorf("%s: %w", fmt.Sprintf(format, args...), fs.ErrNotExist)
}
