package ext4

import (
	"fmt"

	lru "github.com/hashicorp/golang-lru/v2"

	"github.com/cowdev/cowdev/block"
)

// Pages of the cache: small metadata blocks lie close together, so a page
// holds several, and a remote image is asked less often.
const (
	pageSize   = 16 << 10
	cachePages = 512
)

// A source gives the file system's bytes: the image, through a small cache, in
// front of it the blocks that the journal replaces.
type source struct {
	r         block.Reader
	blockSize int
	cache     *lru.Cache[int64, []byte]

	// replay says for a block of the file system where its newer content
	// lies in the journal. It is written only while the file system is opened.
	replay map[uint64]logged
}

// A logged block lies in the journal.
type logged struct {
	at      uint64 // block of the image
	escaped bool   // its first four bytes stand for jbd2's magic number
}

func newSource(r block.Reader, blockSize int) *source {
	cache, err := lru.New[int64, []byte](cachePages)
	if err != nil {
		panic(err) // only for a size below 1
	}
	return &source{r: r, blockSize: blockSize, cache: cache}
}

// block returns the content of block b, to be read only.
func (s *source) block(b uint64) ([]byte, error) {
	at, ok := s.replay[b]
	if !ok {
		return s.raw(b)
	}
	p, err := s.raw(at.at)
	if err != nil || !at.escaped {
		return p, err
	}
	p = append([]byte(nil), p...)
	be.PutUint32(p, journalMagic)
	return p, nil
}

// raw returns the content of block b without regard to the journal, to be
// read only.
func (s *source) raw(b uint64) ([]byte, error) {
	if b >= uint64(s.r.Size())/uint64(s.blockSize) {
		return nil, corrupt("block %d is after the image's end", b)
	}
	size := int64(max(pageSize, s.blockSize))
	off := int64(b) * int64(s.blockSize)
	page := off / size
	p, ok := s.cache.Get(page)
	if !ok {
		p = make([]byte, min(size, s.r.Size()-page*size))
		if err := s.readImage(p, page*size); err != nil {
			return nil, err
		}
		s.cache.Add(page, p)
	}
	return p[off-page*size:][:s.blockSize], nil
}

// read fills p from byte off on, which with p's end lies in the file system.
// It goes around the cache except for replayed blocks: it is for file
// contents and whole inode tables.
func (s *source) read(p []byte, off int64) error {
	if len(s.replay) == 0 {
		return s.readImage(p, off)
	}
	bs := int64(s.blockSize)
	done := 0 // bytes of p that are filled
	for at := off - off%bs; at < off+int64(len(p)); at += bs {
		if _, ok := s.replay[uint64(at/bs)]; !ok {
			continue
		}
		from := int(max(at-off, 0)) // where the replayed block begins in p
		if err := s.readImage(p[done:from], off+int64(done)); err != nil {
			return err
		}
		b, err := s.block(uint64(at / bs))
		if err != nil {
			return err
		}
		done = from + copy(p[from:], b[max(off-at, 0):])
	}
	return s.readImage(p[done:], off+int64(done))
}

// readImage fills p from the image.
func (s *source) readImage(p []byte, off int64) error {
	if len(p) == 0 {
		return nil
	}
	n, err := s.r.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	return fmt.Errorf("read %d bytes of the image at %d: %w", len(p), off, err)
}
