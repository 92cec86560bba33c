package files

import (
	"errors"

	"github.com/cowdev/cowdev/block"
)

func openExt(r block.Reader, _ []byte) (FS, error) { return nil, errors.ErrUnsupported }
