package block

import (
	"fmt"
	"iter"
	"math/bits"
)

// BlocksPerChunk is the number of blocks in a chunk, whatever its size: a
// Mask has one bit for each.
const BlocksPerChunk = 16

// Limits of a chunk's size in bytes.
const (
	MinChunkSize     = 8 << 10
	MaxChunkSize     = 1 << 20
	DefaultChunkSize = 64 << 10
)

// MaxChunks bounds the chunks of a device, so that a chunk number fits 32 bits.
const MaxChunks = 1<<32 - 2

// A Chunk is the number of a chunk: 0 holds the device's first bytes.
type Chunk uint32

// Mask has one bit for each block of a chunk; bit 0 is the block with the
// lowest offset.
type Mask uint16

// AllBlocks is the mask of a whole chunk.
const AllBlocks Mask = 1<<BlocksPerChunk - 1

// Bits returns the mask of n blocks from the first on.
func Bits(first, n int) Mask { return Mask((1<<n - 1) << first) }

// Count returns the number of blocks in m.
func (m Mask) Count() int { return bits.OnesCount16(uint16(m)) }

// First returns the lowest block of m, which has one.
func (m Mask) First() int { return bits.TrailingZeros16(uint16(m)) }

// Last returns the highest block of m, which has one.
func (m Mask) Last() int { return bits.Len16(uint16(m)) - 1 }

// Has reports whether block b is in m.
func (m Mask) Has(b int) bool { return m>>b&1 != 0 }

// Run returns the end of the run of equal bits of m that begins at block b,
// and whether the run is of set bits. b is below BlocksPerChunk.
func (m Mask) Run(b int) (end int, set bool) {
	set = m.Has(b)
	rest := m >> b
	if set {
		rest = ^rest
	}
	end = b + bits.TrailingZeros16(uint16(rest))
	return min(end, BlocksPerChunk), set
}

// A Geometry is the shape of a device: its size and that of its chunks, in
// bytes.
type Geometry struct {
	Size      int64
	ChunkSize int
}

// Validate reports why g cannot be the shape of a device, or nil.
func (g Geometry) Validate() error {
	switch {
	case g.Size <= 0:
		return fmt.Errorf("size of %d bytes, expected at least 1", g.Size)
	case g.ChunkSize < MinChunkSize || g.ChunkSize > MaxChunkSize || g.ChunkSize&(g.ChunkSize-1) != 0:
		return fmt.Errorf("chunk size of %d bytes, expected a power of two from %d to %d", g.ChunkSize, MinChunkSize, MaxChunkSize)
	case (g.Size-1)/int64(g.ChunkSize) >= MaxChunks:
		return fmt.Errorf("size of %d bytes needs more than %d chunks of %d bytes, use a larger chunk size", g.Size, int64(MaxChunks), g.ChunkSize)
	}
	return nil
}

// BlockSize returns the bytes of a block.
func (g Geometry) BlockSize() int { return g.ChunkSize / BlocksPerChunk }

// Chunks returns the number of chunks, counting a partial one at the end.
func (g Geometry) Chunks() int64 {
	return (g.Size + int64(g.ChunkSize) - 1) / int64(g.ChunkSize)
}

// Offset returns where chunk c begins in the device.
func (g Geometry) Offset(c Chunk) int64 { return int64(c) * int64(g.ChunkSize) }

// Len returns the bytes of chunk c that exist: ChunkSize but for the last.
func (g Geometry) Len(c Chunk) int {
	return int(min(int64(g.ChunkSize), g.Size-g.Offset(c)))
}

// Blocks returns the mask of the blocks of chunk c of which at least one byte
// exists.
func (g Geometry) Blocks(c Chunk) Mask {
	return Bits(0, (g.Len(c)+g.BlockSize()-1)/g.BlockSize())
}

// Contains reports whether [off, off+n) lies inside the device.
func (g Geometry) Contains(off, n int64) bool {
	return off >= 0 && n >= 0 && off <= g.Size && n <= g.Size-off
}

// A Span is the part of a request that lies in one chunk.
type Span struct {
	Chunk Chunk
	Off   int   // bytes from the chunk's beginning
	N     int   // bytes, at least 1
	Pos   int64 // bytes from the request's beginning
}

// SpanAt returns the first span of [off, off+n), which lies inside the device
// and is not empty; pos is what the span's Pos shall be.
func (g Geometry) SpanAt(off, n, pos int64) Span {
	size := int64(g.ChunkSize)
	in := off & (size - 1)
	return Span{Chunk: Chunk(off / size), Off: int(in), N: int(min(size-in, n)), Pos: pos}
}

// Spans cuts [off, off+n), which lies inside the device, into one span a
// chunk, in order.
func (g Geometry) Spans(off, n int64) iter.Seq[Span] {
	return func(yield func(Span) bool) {
		for pos := int64(0); pos < n; {
			s := g.SpanAt(off+pos, n-pos, pos)
			if !yield(s) {
				return
			}
			pos += int64(s.N)
		}
	}
}

// Cover returns the blocks that [off, off+n) of chunk c touches, and those
// that it fills. The end of the device counts as the end of its last block.
func (g Geometry) Cover(c Chunk, off, n int) (touched, filled Mask) {
	bs := g.BlockSize()
	end := off + n
	first, last := off/bs, (end+bs-1)/bs
	touched = Bits(first, last-first)
	fullFirst, fullLast := (off+bs-1)/bs, end/bs
	if end == g.Len(c) {
		fullLast = last
	}
	if fullLast > fullFirst {
		filled = Bits(fullFirst, fullLast-fullFirst)
	}
	return touched, filled
}
