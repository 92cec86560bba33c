package nbdserver

import (
	"math/bits"
	"sync"
)

// Sizes of pooled buffers in bytes; each power of two between them has a pool.
const (
	minBufferBits = 12
	maxBufferBits = 20
	maxBuffer     = 1 << maxBufferBits
)

// A buffer is memory from a pool. The pools give back to the runtime what
// lies idle.
type buffer struct{ b []byte }

var buffers [maxBufferBits + 1]sync.Pool

// bufferClass returns the power of two of the buffer that holds n bytes.
func bufferClass(n int) int { return max(minBufferBits, bits.Len(uint(n-1))) }

// getBuffer returns a buffer of at least n bytes, n from 1 to maxBuffer. What
// is in it is left from its last use.
func getBuffer(n int) *buffer {
	class := bufferClass(n)
	if b, ok := buffers[class].Get().(*buffer); ok {
		return b
	}
	return &buffer{b: make([]byte, 1<<class)}
}

func putBuffer(b *buffer) { buffers[bufferClass(len(b.b))].Put(b) }
