package exception

import (
	"testing"

	"github.com/cowdev/cowdev/block"
	"github.com/cowdev/cowdev/internal/disktest"
)

// A block that is gone again before a flush asks for it is in no record and in
// no sync, and the store does not remember it for ever (10).
func TestShortLivedIsForgotten(t *testing.T) {
	f := disktest.New(1)
	if err := Create(f, Params{Geometry: block.Geometry{Size: 1 << 20, ChunkSize: 64 << 10}}); err != nil {
		t.Fatal(err)
	}
	s, err := Open(f, Options{})
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 4096)
	for range 1000 {
		s.Claim(3)
		err := s.Put(3, 0, p)
		if err == nil {
			err = s.Drop(3, 1)
		}
		s.Release(3)
		if err == nil {
			err = s.Flush()
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if n := len(s.commits.unsynced); n > 10 {
		t.Errorf("%d changes are remembered", n)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}
