package files

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math/bits"
)

// readFull fills p from r at off; an end before is an error.
func readFull(r io.ReaderAt, p []byte, off int64) error {
	n, err := r.ReadAt(p, off)
	switch {
	case n == len(p):
		return nil
	case err == nil || errors.Is(err, io.EOF):
		return io.ErrUnexpectedEOF
	}
	return err
}

// countDiffering returns the number of places at which a and b, of one
// length, hold different bytes.
func countDiffering(a, b []byte) int64 {
	const stride = 4096
	var n int64
	for len(a) > 0 {
		k := min(stride, len(a))
		if !bytes.Equal(a[:k], b[:k]) {
			n += countBytes(a[:k], b[:k])
		}
		a, b = a[k:], b[k:]
	}
	return n
}

// countBytes is countDiffering, eight bytes at a time: each byte of the two
// words' difference is folded to its lowest bit, and the bits are counted.
func countBytes(a, b []byte) int64 {
	const low, lows = 0x7f7f7f7f7f7f7f7f, 0x8080808080808080
	var n int64
	for len(a) >= 8 {
		x := binary.LittleEndian.Uint64(a) ^ binary.LittleEndian.Uint64(b)
		if x != 0 {
			n += int64(bits.OnesCount64(((x & low) + low | x) & lows))
		}
		a, b = a[8:], b[8:]
	}
	for i := range a {
		if a[i] != b[i] {
			n++
		}
	}
	return n
}

// isZero reports whether b holds zeros only.
func isZero(b []byte) bool {
	return len(b) == 0 || b[0] == 0 && bytes.Equal(b[1:], b[:len(b)-1])
}
