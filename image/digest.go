package image

import (
	"context"
	"fmt"

	"github.com/zeebo/blake3"
	"golang.org/x/sys/unix"
)

const (
	leafSize = 4 << 20   // bytes of a leaf of the full digest's tree
	readSize = 256 << 10 // bytes read at once

	edge         = 1 << 20 // bytes of the first and of the last piece of the sample
	spreadBlock  = 4 << 10
	spreadBlocks = 4 // in each of the other pieces
)

// extent is a range of bytes of an image.
type extent struct{ off, n int64 }

// samplePiece returns the ranges that piece i covers in an image of size
// bytes, in order; none where the pieces before and after cover all there is.
func samplePiece(size int64, i int) []extent {
	switch i {
	case 0:
		return []extent{{0, min(edge, size)}}
	case samplePieces - 1:
		at := max(size-edge, min(edge, size))
		return clip([]extent{{at, size - at}}, size)
	}
	var blocks []extent
	if i == 1 {
		// Superblocks outside the first MiB: of a first partition at 1 MiB,
		// of btrfs at 64 MiB, of ext4's first backup at 128 MiB.
		blocks = []extent{{1 << 20, 72 << 10}, {64 << 20, spreadBlock}, {128 << 20, spreadBlock}}
		return clip(blocks, size-edge)
	}
	// The rest is spread evenly between the edges.
	const spread = (samplePieces - 3) * spreadBlocks
	step := (size - 2*edge) / spread &^ (spreadBlock - 1)
	if step < spreadBlock {
		return nil
	}
	for j := range spreadBlocks {
		at := edge + step*int64((i-2)*spreadBlocks+j)
		blocks = append(blocks, extent{at, spreadBlock})
	}
	return blocks
}

// clip cuts what lies beyond end off.
func clip(blocks []extent, end int64) []extent {
	var kept []extent
	for _, b := range blocks {
		if n := min(b.n, end-b.off); n > 0 {
			kept = append(kept, extent{b.off, n})
		}
	}
	return kept
}

// sample digests the sample.
func (b *Base) sample() (*Sample, error) {
	s := new(Sample)
	root := blake3.New()
	buf := make([]byte, edge)
	for i := range s.Pieces {
		piece := blake3.New()
		for _, e := range samplePiece(b.size, i) {
			p := buf[:e.n]
			if n, err := b.readFile(p, e.off); n < len(p) {
				return nil, fmt.Errorf("digest of the sample: %w", err)
			}
			piece.Write(p)
		}
		var d Digest
		piece.Sum(d[:0])
		s.Pieces[i] = le.Uint32(d[:])
		root.Write(d[:])
	}
	root.Sum(s.Root[:0])
	return s, nil
}

// FullOptions change how the full digest is computed.
type FullOptions struct {
	// Progress is told, now and then, how many bytes have been dealt with.
	Progress func(done int64)
	// Wait is called before each piece of at most 4 MiB, and may take its
	// time, so that a busy server is left alone. An error ends the digest.
	Wait func(context.Context) error
	// Gentle leaves nothing in the page cache that was not there before.
	Gentle bool
}

// FullDigest reads all data of the image and returns its digest.
func (b *Base) FullDigest(ctx context.Context, o FullOptions) (*Full, error) {
	leaves := (b.size + leafSize - 1) / leafSize
	d := digester{base: b, o: o, buf: make([]byte, readSize), zeroLeaf: zeroDigest(leafSize)}
	full := new(Full)
	root := blake3.New()
	for i := range int64(fullRanges) {
		branch := blake3.New()
		for leaf := leaves * i / fullRanges; leaf < leaves*(i+1)/fullRanges; leaf++ {
			sum, err := d.leaf(ctx, leaf*leafSize)
			if err != nil {
				return nil, fmt.Errorf("full digest: %w", err)
			}
			branch.Write(sum[:])
		}
		var sum Digest
		branch.Sum(sum[:0])
		full.Ranges[i] = le.Uint32(sum[:])
		root.Write(sum[:])
	}
	root.Sum(full.Root[:0])
	return full, nil
}

// rangeBounds returns the bytes that range i of the full digest covers.
func rangeBounds(size int64, i int) (off, end int64) {
	leaves := (size + leafSize - 1) / leafSize
	off = leaves * int64(i) / fullRanges * leafSize
	end = leaves * int64(i+1) / fullRanges * leafSize
	return off, min(end, size)
}

type digester struct {
	base     *Base
	o        FullOptions
	buf      []byte
	zeroLeaf Digest

	dataFrom, dataEnd int64 // the run that was looked up last
	hole              bool
}

// leaf returns the digest of the leaf that begins at off.
func (d *digester) leaf(ctx context.Context, off int64) (Digest, error) {
	end := min(off+leafSize, d.base.size)
	if err := ctx.Err(); err != nil {
		return Digest{}, err
	}
	if err := d.run(off); err != nil {
		return Digest{}, err
	}
	if d.o.Progress != nil {
		defer d.o.Progress(end)
	}
	if d.hole && d.dataEnd >= end && end-off == leafSize {
		return d.zeroLeaf, nil
	}
	if d.o.Wait != nil {
		if err := d.o.Wait(ctx); err != nil {
			return Digest{}, err
		}
	}
	h := blake3.New()
	for off < end {
		if err := d.run(off); err != nil {
			return Digest{}, err
		}
		p := d.buf[:min(readSize, end-off, d.dataEnd-off)]
		if d.hole {
			clear(p)
		} else if err := d.read(p, off); err != nil {
			return Digest{}, err
		}
		h.Write(p)
		off += int64(len(p))
	}
	var sum Digest
	h.Sum(sum[:0])
	return sum, nil
}

// run looks up the run of data or hole that off lies in.
func (d *digester) run(off int64) error {
	if off >= d.dataFrom && off < d.dataEnd {
		return nil
	}
	runs, err := d.base.Extents(off, d.base.size-off, 1)
	if err == nil {
		d.dataFrom, d.dataEnd, d.hole = off, runs[0].End(), runs[0].Hole
	}
	return err
}

func (d *digester) read(p []byte, off int64) error {
	b := d.base
	drop := d.o.Gentle && b.view != nil && !b.view.Cached(off, int64(len(p)))
	if n, err := b.f.ReadAt(p, off); n < len(p) {
		return fmt.Errorf("%s: read at %d: %w", b.path, off, err)
	}
	if drop {
		_ = unix.Fadvise(int(b.f.File().Fd()), off, int64(len(p)), unix.FADV_DONTNEED)
	}
	return nil
}

// zeroDigest returns the digest of n zeros.
func zeroDigest(n int) (d Digest) {
	h := blake3.New()
	for zeros := make([]byte, readSize); n > 0; n -= len(zeros) {
		h.Write(zeros[:min(n, len(zeros))])
	}
	h.Sum(d[:0])
	return d
}
