package files

import (
	"io"
	"io/fs"
	"os"
	"sync"
	"time"

	"github.com/diskfs/go-diskfs/backend"

	"github.com/cowdev/cowdev/block"
)

// storage is a block.Reader as go-diskfs wants its disks. It keeps the first
// read error, because the library passes over some of them.
type storage struct {
	*io.SectionReader

	mu  sync.Mutex
	err error
}

var _ backend.Storage = (*storage)(nil)

func newStorage(r block.Reader) *storage {
	return &storage{SectionReader: io.NewSectionReader(r, 0, r.Size())}
}

// ReadAt reads, and keeps the error for failed. What lies beyond the image is
// an error like any other.
func (s *storage) ReadAt(p []byte, off int64) (int, error) {
	n, err := s.SectionReader.ReadAt(p, off)
	if n == len(p) {
		err = nil
	}
	if err != nil {
		s.mu.Lock()
		if s.err == nil {
			s.err = err
		}
		s.mu.Unlock()
	}
	return n, err
}

// failed returns the first error since the last call.
func (s *storage) failed() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	err := s.err
	s.err = nil
	return err
}

func (s *storage) Stat() (fs.FileInfo, error)              { return storageInfo{s.Size()}, nil }
func (s *storage) Close() error                            { return nil }
func (s *storage) Sys() (*os.File, error)                  { return nil, backend.ErrNotSuitable }
func (s *storage) Writable() (backend.WritableFile, error) { return nil, backend.ErrIncorrectOpenMode }
func (s *storage) Path() string                            { return "" }

// storageInfo tells go-diskfs that the disk is a regular file of that size.
type storageInfo struct{ size int64 }

func (i storageInfo) Name() string       { return "image" }
func (i storageInfo) Size() int64        { return i.size }
func (i storageInfo) Mode() fs.FileMode  { return 0o444 }
func (i storageInfo) ModTime() time.Time { return time.Time{} }
func (i storageInfo) IsDir() bool        { return false }
func (i storageInfo) Sys() any           { return nil }
