package nbdserver

import (
	"sync"

	"golang.org/x/sys/unix"
)

// Limits of a batch: when one is reached it is sent before more is added.
const (
	batchHeaders = 16 << 10  // bytes of reply headers
	batchPieces  = iovMax    // vectors, so that most batches leave in one system call
	batchData    = 1 << 20   // bytes of data
	batchCopied  = 256 << 10 // bytes of data that had to be copied
)

// A batch is a run of replies that leave together: headers, which lie in
// head, and data, which lies where the device has it or was copied to copied.
type batch struct {
	vecs   [][]byte
	head   []byte
	open   bool // the last of vecs is the end of head
	data   int  // bytes of data in vecs
	copied *buffer
	used   int // bytes of copied
	iov    []unix.Iovec
}

var batches = sync.Pool{New: func() any {
	return &batch{
		vecs: make([][]byte, 0, batchPieces),
		head: make([]byte, 0, batchHeaders),
		iov:  make([]unix.Iovec, 0, batchPieces),
	}
}}

func getBatch() *batch { return batches.Get().(*batch) }

func putBatch(b *batch) {
	clear(b.vecs)
	clear(b.iov)
	if b.copied != nil {
		putBuffer(b.copied)
	}
	*b = batch{vecs: b.vecs[:0], head: b.head[:0], iov: b.iov[:0]}
	batches.Put(b)
}

// full says that the batch has to be sent before another reply is added.
func (b *batch) full() bool {
	return len(b.vecs) >= batchPieces-2 || cap(b.head)-len(b.head) < maxReplyHeader || b.data >= batchData
}

// wrote makes head, which something was appended to, the batch's, and what was
// appended the end of the vectors.
func (b *batch) wrote(head []byte) {
	from := len(b.head)
	b.head = head
	if b.open {
		last := &b.vecs[len(b.vecs)-1]
		*last = (*last)[:len(*last)+len(head)-from]
		return
	}
	b.vecs = append(b.vecs, head[from:])
	b.open = true
}

// A mark is a place in a batch that it can be cut back to.
type mark struct {
	vecs, head, last int
	open             bool
}

func (b *batch) mark() mark {
	m := mark{vecs: len(b.vecs), head: len(b.head), open: b.open}
	if b.open {
		m.last = len(b.vecs[m.vecs-1])
	}
	return m
}

func (b *batch) cut(m mark) {
	b.vecs, b.head, b.open = b.vecs[:m.vecs], b.head[:m.head], m.open
	if m.open {
		b.vecs[m.vecs-1] = b.vecs[m.vecs-1][:m.last]
	}
}

// show makes vecs, which a session appended n bytes to, the batch's.
func (b *batch) show(vecs [][]byte, n int) {
	b.vecs, b.open = vecs, false
	b.data += n
}

// space returns n bytes to copy data to, or nil if there are none left.
func (b *batch) space(n int) []byte {
	if n > batchCopied-b.used {
		return nil
	}
	if b.copied == nil {
		b.copied = getBuffer(batchCopied)
	}
	p := b.copied.b[b.used : b.used+n : b.used+n]
	b.used += n
	return p
}

// copiedTo adds data that was copied to what space returned.
func (b *batch) copiedTo(p []byte) {
	b.vecs, b.open = append(b.vecs, p), false
	b.data += len(p)
}
