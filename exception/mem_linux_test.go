package exception_test

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cowdev/cowdev/block"
	"github.com/cowdev/cowdev/exception"
	"github.com/cowdev/cowdev/internal/disktest"
)

// Where the tmpfs of the live table is full, as a container's soon is, what is
// stored can be read, a change that needs a page of it is refused, and all goes
// on when there is room.
func TestFullTmpfs(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting a tmpfs: needs root")
	}
	memory := exception.Shared{Dir: t.TempDir(), File: "1"}
	if err := unix.Mount("tmpfs", memory.Dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Skipf("mounting a tmpfs: %v", err)
	}
	defer unix.Unmount(memory.Dir, unix.MNT_DETACH)
	filler := filepath.Join(memory.Dir, "filler")
	if err := os.WriteFile(filler, make([]byte, 64<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	f := disktest.New(1)
	if err := exception.Create(f, exception.Params{Geometry: block.Geometry{Size: 1 << 30, ChunkSize: 64 << 10}}); err != nil {
		t.Fatal(err)
	}
	s := openStore(t, f, exception.Options{Memory: memory})
	for c := range s.Geometry().Chunks() {
		if e := s.Entry(block.Chunk(c)); e != 0 {
			t.Fatalf("chunk %d of an empty store: %v", c, e)
		}
	}
	s.Claim(9)
	err := s.Put(9, 0, make([]byte, 4096))
	s.Release(9)
	if !errors.Is(err, exception.ErrFull) {
		t.Errorf("a change without room for its entry: %v, expected %v", err, exception.ErrFull)
	}
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	put(t, s, 9, 0, 4096, 1)
	flush(t, s)
	expect(t, s, 9, 0, 4096, 1)
	var st unix.Statfs_t
	if err := unix.Statfs(memory.Dir, &st); err != nil {
		t.Fatal(err)
	}
	if used := st.Blocks - st.Bfree; used > 3 { // the first page, the entry's, perhaps a row's
		t.Errorf("one change and a look at all chunks take %d pages of the tmpfs", used)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}
