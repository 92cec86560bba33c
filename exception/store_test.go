// What a store does to its file: which operations a commit costs, what a
// failure breaks and what it does not, and what another open finds.
package exception_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"syscall"
	"testing"

	"github.com/cowdev/cowdev/block"
	"github.com/cowdev/cowdev/exception"
	"github.com/cowdev/cowdev/internal/disktest"
)

var geometry = block.Geometry{Size: 64<<20 - 1000, ChunkSize: 64 << 10}

// newStore returns a store of geometry, open, and its file.
func newStore(t testing.TB, o exception.Options) (*exception.Store, *disktest.File) {
	t.Helper()
	f := disktest.New(1)
	if err := exception.Create(f, exception.Params{Geometry: geometry, LogSize: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	return openStore(t, f, o), f
}

func openStore(t testing.TB, f *disktest.File, o exception.Options) *exception.Store {
	t.Helper()
	s, err := exception.Open(f, o)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// put writes n bytes of value v at off of chunk c.
func put(t testing.TB, s *exception.Store, c block.Chunk, off, n int, v byte) {
	t.Helper()
	s.Claim(c)
	defer s.Release(c)
	if err := s.Put(c, off, bytes.Repeat([]byte{v}, n)); err != nil {
		t.Fatal(err)
	}
}

func zero(t testing.TB, s *exception.Store, c block.Chunk, m block.Mask) {
	t.Helper()
	s.Claim(c)
	defer s.Release(c)
	if err := s.Zero(c, m); err != nil {
		t.Fatal(err)
	}
}

func flush(t testing.TB, s *exception.Store) {
	t.Helper()
	if err := s.Flush(); err != nil {
		t.Fatal(err)
	}
}

// expect holds n bytes at off of chunk c against value v.
func expect(t testing.TB, s *exception.Store, c block.Chunk, off, n int, v byte) {
	t.Helper()
	got := make([]byte, n)
	if err := s.ReadStored(got, c, s.Entry(c), off); err != nil {
		t.Fatal(err)
	}
	if want := bytes.Repeat([]byte{v}, n); !bytes.Equal(got, want) {
		t.Fatalf("chunk %d at %d: %#x…, expected %#x", c, off, got[:1], v)
	}
}

// checked returns what a check of the store in f finds.
func checked(t testing.TB, f *disktest.File) *exception.Report {
	t.Helper()
	r, err := exception.Check(f.Fork(nil))
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// cost counts the synced appends to f, and the syncs of the whole file.
type cost struct{ appends, syncs int }

// watch makes c count the operations of f.
func (c *cost) watch(f *disktest.File) {
	f.Inject = func(op disktest.Op) disktest.Fault {
		switch op.Kind {
		case disktest.WriteSync:
			c.appends++
		case disktest.Sync:
			c.syncs++
		}
		return disktest.Fault{}
	}
}

func TestCostOfFlush(t *testing.T) {
	s, f := newStore(t, exception.Options{})
	put(t, s, 0, 0, 4096, 1)
	flush(t, s)
	var spent cost
	spent.watch(f)
	for _, test := range []struct {
		name   string
		change func()
		want   cost
	}{
		{"nothing", func() {}, cost{0, 0}},
		{"one new block", func() { put(t, s, 1, 0, 4096, 1) }, cost{1, 0}},
		{"one block again", func() { put(t, s, 1, 0, 4096, 2) }, cost{1, 0}},
		{"part of a block", func() { put(t, s, 1, 10, 10, 3) }, cost{1, 0}},
		{"eight blocks", func() {
			for c := range block.Chunk(8) {
				put(t, s, 2+c, 8192, 4096, 1)
			}
		}, cost{1, 0}},
		{"a trim", func() { zero(t, s, 2, block.AllBlocks) }, cost{1, 0}},
		{"much", func() {
			for c := range block.Chunk(16) {
				put(t, s, 32+c, 0, 64<<10, 1)
			}
		}, cost{1, 1}},
		// The barrier says that what the log's records hold is in place, so
		// that nothing but the sync is needed from then on.
		{"much of what is stored", func() {
			for c := range block.Chunk(16) {
				put(t, s, 32+c, 0, 64<<10, 2)
			}
		}, cost{0, 1}},
	} {
		spent = cost{}
		test.change()
		flush(t, s)
		if spent != test.want {
			t.Errorf("%s: %+v, expected %+v", test.name, spent, test.want)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

// Short writes that go anywhere become one write of the file, if all their
// blocks are new.
func TestBatch(t *testing.T) {
	s, f := newStore(t, exception.Options{})
	put(t, s, 7, 4096, 4096, 1)
	var writes []disktest.Op
	f.Inject = func(op disktest.Op) disktest.Fault {
		if op.Kind == disktest.Write && op.Off >= 1<<20 { // not the table
			writes = append(writes, op)
		}
		return disktest.Fault{}
	}
	b := s.NewBatch()
	block4K := func(v byte) []byte { return bytes.Repeat([]byte{v}, 4096) }
	for _, test := range []struct {
		what string
		c    block.Chunk
		off  int
		p    []byte
		want bool
	}{
		{"a new block", 900, 8192, block4K(2), true},
		{"two of another chunk", 3, 61440 - 4096, bytes.Repeat([]byte{3}, 8192), true},
		{"a chunk that the batch has", 3, 0, block4K(4), false},
		{"half a block", 4, 2048, block4K(4), false},
		{"half of two blocks", 4, 0, make([]byte, 6000), false},
		{"a stored and a new block", 7, 4096, make([]byte, 8192), false},
		{"a new block of a chunk with another", 7, 0, block4K(5), true},
		{"more than a batch holds", 8, 0, make([]byte, 13*4096), false},
	} {
		if got, putOff := b.Add(test.c, test.off, test.p); got != test.want || putOff != got {
			t.Errorf("%s: %v, expected %v", test.what, got, test.want)
		}
	}
	if len(writes) != 0 {
		t.Errorf("written before Write: %v", writes)
	}
	if n, err := b.Write(); n != 3 || err != nil {
		t.Fatal(n, err)
	}
	if len(writes) != 1 || writes[0].Len != 4*4096 {
		t.Errorf("wrote %v, expected once 16384 bytes", writes)
	}
	if added, putOff := b.Add(7, 4096, block4K(6)); !added || putOff || len(writes) != 2 {
		t.Errorf("a stored block was not written at once: %v", writes)
	}
	check := func(s *exception.Store) {
		t.Helper()
		expect(t, s, 900, 8192, 4096, 2)
		expect(t, s, 3, 61440-4096, 8192, 3)
		expect(t, s, 7, 0, 4096, 5)
		expect(t, s, 7, 4096, 4096, 6)
	}
	check(s)
	f.Inject = nil
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = openStore(t, f.Kill(nil), exception.Options{})
	defer s.Close()
	check(s)
}

func TestFlushesShareCommits(t *testing.T) {
	s, f := newStore(t, exception.Options{})
	put(t, s, 0, 0, 4096, 1)
	flush(t, s)
	records := 0
	f.Inject = func(op disktest.Op) disktest.Fault {
		// Neither what ends the log's zone nor what extends it.
		if op.Kind == disktest.WriteSync && op.Len > 4096 && op.Len < 512<<10 {
			records++
		}
		return disktest.Fault{}
	}
	const clients, rounds = 16, 20
	var wg sync.WaitGroup
	for k := range clients {
		wg.Go(func() {
			for i := range rounds {
				put(t, s, block.Chunk(k), 4096*(i%15), 4096, byte(i))
				if err := s.Flush(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if records > clients*rounds {
		t.Errorf("%d records for %d flushes", records, clients*rounds)
	}
	f = f.Crash(rand.New(rand.NewPCG(1, 1)))
	s = openStore(t, f, exception.Options{})
	for k := range block.Chunk(clients) {
		expect(t, s, k, 4096*14, 4096, 14)
	}
}

func TestFullStoreGoesOn(t *testing.T) {
	s, f := newStore(t, exception.Options{})
	put(t, s, 0, 0, 4096, 1)
	flush(t, s)
	f.SetSpace(f.Allocated() + 4096*20)
	var err error
	c := block.Chunk(1)
	for ; err == nil && c < 100; c++ {
		s.Claim(c)
		err = s.Put(c, 0, bytes.Repeat([]byte{7}, 4096))
		s.Release(c)
	}
	if !errors.Is(err, exception.ErrFull) || !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("%v, expected %v", err, exception.ErrFull)
	}
	put(t, s, 0, 0, 4096, 2) // what is stored can be written
	flush(t, s)
	for k := block.Chunk(1); k < c-1; k++ {
		expect(t, s, k, 0, 4096, 7)
	}
	// Given up, flushed, taken again.
	zero(t, s, 1, block.AllBlocks)
	flush(t, s)
	put(t, s, c, 0, 4096, 8)
	flush(t, s)
	f.SetSpace(0)
	put(t, s, c+1, 0, 4096, 9)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = openStore(t, f.Kill(nil), exception.Options{})
	expect(t, s, 0, 0, 4096, 2)
	expect(t, s, c, 0, 4096, 8)
	expect(t, s, c+1, 0, 4096, 9)
}

func TestFailedSyncBreaksTheStore(t *testing.T) {
	s, f := newStore(t, exception.Options{})
	put(t, s, 0, 0, 4096, 1)
	flush(t, s)
	for c := range block.Chunk(16) {
		put(t, s, c, 0, 64<<10, 2)
	}
	f.Inject = disktest.FailNth(1, disktest.Fault{Err: syscall.EIO}, func(op disktest.Op) bool { return op.Kind == disktest.Sync })
	if err := s.Flush(); !errors.Is(err, exception.ErrBroken) {
		t.Fatalf("flush: %v, expected %v", err, exception.ErrBroken)
	}
	f.Inject = nil
	if err := s.Flush(); !errors.Is(err, exception.ErrBroken) {
		t.Fatalf("second flush: %v, expected %v", err, exception.ErrBroken)
	}
	s.Claim(40)
	if err := s.Put(40, 0, make([]byte, 4096)); !errors.Is(err, exception.ErrBroken) {
		t.Fatalf("write: %v, expected %v", err, exception.ErrBroken)
	}
	s.Release(40)
	if err := s.ReadStored(make([]byte, 4096), 3, s.Entry(3), 0); !errors.Is(err, exception.ErrBroken) {
		t.Fatalf("read of what was not synced: %v, expected %v", err, exception.ErrBroken)
	}
	if s.Broken() == nil {
		t.Fatal("the store does not say that it is broken")
	}
}

// A store that is refused leaves nothing in memory that outlasts the process.
func TestRefusedStoreLeavesNoMemory(t *testing.T) {
	s, f := newStore(t, exception.Options{})
	put(t, s, 1, 0, 4096, 1)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	image := f.Bytes()
	image[128<<10] ^= 1 // the table begins there
	memory := exception.Shared{Dir: t.TempDir()}
	if _, err := exception.Open(disktest.FromBytes(1, image), exception.Options{Memory: memory}); !errors.Is(err, exception.ErrCorrupt) {
		t.Fatalf("damaged: %v, expected %v", err, exception.ErrCorrupt)
	}
	if left, err := os.ReadDir(memory.Dir); err != nil || len(left) > 0 {
		t.Errorf("left in memory: %v, %v", left, err)
	}
}

// A store that was cut short in its data is refused before a write could make
// zeros of what is lost; who only reads gets the rest, and an error for that.
func TestCutShort(t *testing.T) {
	s, f := newStore(t, exception.Options{})
	for c := range block.Chunk(3) {
		put(t, s, c, 0, 64<<10, byte(c+1))
	}
	put(t, s, 9, 8192, 4096, 9) // has a row
	put(t, s, 9, 0, 4096, 9)
	last, _ := s.Locate(s.Entry(9), 0)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	whole := f.Bytes()
	for _, size := range []int64{last + 4095, last - 4096, last - 5000, last - 90_000} {
		cut := func() *disktest.File { return disktest.FromBytes(1, whole[:size]) }
		if _, err := exception.Open(cut(), exception.Options{}); !errors.Is(err, exception.ErrCorrupt) {
			t.Errorf("cut at %d, behind which something lies: %v, expected %v", size, err, exception.ErrCorrupt)
		}
		told := 0
		s := openStore(t, cut(), exception.Options{ReadOnly: true, Log: func(string, ...any) { told++ }})
		p := make([]byte, 4096)
		if err := s.ReadStored(p, 0, s.Entry(0), 0); err != nil || p[0] != 1 {
			t.Errorf("cut at %d: what is left reads as %x, %v", size, p[0], err)
		}
		if err := s.ReadStored(p, 9, s.Entry(9), 0); !errors.Is(err, syscall.EIO) {
			t.Errorf("cut at %d: what is gone reads as %x, %v", size, p[0], err)
		}
		if s.InFile() {
			t.Errorf("cut at %d: readers may map what is behind the end", size)
		}
		if told != 1 {
			t.Errorf("cut at %d: told %d times", size, told)
		}
	}
	openStore(t, disktest.FromBytes(1, whole[:last+4096]), exception.Options{})
}

// After a power cut the file may end inside a run of slots: before it lie
// blocks that are in place, behind it some that the log alone has.
func TestEndsBeforeWhatTheLogHas(t *testing.T) {
	s, f := newStore(t, exception.Options{})
	put(t, s, 0, 0, 4096, 1)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	f = f.Kill(nil)
	s = openStore(t, f, exception.Options{})
	put(t, s, 0, 4096, 4096, 2)
	flush(t, s)
	first, end := s.Locate(s.Entry(0), 0)
	if end != 2 {
		t.Fatalf("the extent of block 0 ends at %d, expected 2", end)
	}
	s = openStore(t, disktest.FromBytes(1, f.Bytes()[:first+4096]), exception.Options{})
	expect(t, s, 0, 0, 4096, 1)
	expect(t, s, 0, 4096, 4096, 2)
}

// A process that dies while the disk is full leaves a store that can be
// changed where it needs no room, and closed.
func TestTakenOverOnFullDisk(t *testing.T) {
	f := disktest.New(1)
	if err := exception.Create(f, exception.Params{Geometry: block.Geometry{Size: 12 << 20, ChunkSize: 64 << 10}}); err != nil {
		t.Fatal(err)
	}
	o := exception.Options{Memory: exception.Shared{Dir: t.TempDir()}}
	s := openStore(t, f, o)
	put(t, s, 0, 0, 4096, 1)
	flush(t, s)
	f.SetSpace(1) // what it has it keeps
	put(t, s, 0, 0, 4096, 2)
	f = f.Kill(nil)
	f.SetSpace(1)
	s = openStore(t, f, o)
	if !s.Adopted() {
		t.Fatal("what the process left is not taken over")
	}
	expect(t, s, 0, 0, 4096, 2)
	put(t, s, 0, 0, 4096, 3)
	flush(t, s)
	expect(t, s, 0, 0, 4096, 3)
	zero(t, s, 0, 1)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

// Blocks that are shorter than a page give back their space too, in whatever
// order: a page goes with its last.
func TestShortBlocksLeaveNothing(t *testing.T) {
	f := disktest.New(1)
	if err := exception.Create(f, exception.Params{Geometry: block.Geometry{Size: 1 << 20, ChunkSize: 8 << 10}, LogSize: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	s := openStore(t, f, exception.Options{})
	rng := rand.New(rand.NewPCG(1, 1))
	for range 300 {
		put(t, s, block.Chunk(rng.IntN(128)), rng.IntN(16)*512, 512, 1)
	}
	for _, c := range rng.Perm(128) {
		for _, b := range rng.Perm(block.BlocksPerChunk) {
			if b != 3 {
				zero(t, s, block.Chunk(c), 1<<b)
			}
		}
		flush(t, s)
	}
	if r := checked(t, f); r.Leaked > 4096 { // those beside slots that nobody took yet
		t.Errorf("%d bytes leaked while the store is open", r.Leaked)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	r := checked(t, f)
	if len(r.Problems) > 0 || r.Stored == 0 {
		t.Errorf("%d blocks stored, problems %v", r.Stored, r.Problems)
	}
}

// So do those that a process left which died, in the file's last page too.
func TestShortBlocksOfTheDeadLeaveNothing(t *testing.T) {
	f := disktest.New(1)
	if err := exception.Create(f, exception.Params{Geometry: block.Geometry{Size: 64 << 10, ChunkSize: 32 << 10}}); err != nil {
		t.Fatal(err)
	}
	o := exception.Options{Memory: exception.Shared{Dir: t.TempDir()}}
	s := openStore(t, f, o)
	put(t, s, 0, 0, 32<<10, 1)
	put(t, s, 1, 0, 32<<10, 1)
	zero(t, s, 0, 1)
	put(t, s, 0, 0, 2048, 2) // in a slot behind the others, whose page the file ends in
	zero(t, s, 0, 1)
	f = f.Kill(nil)
	s = openStore(t, f, o)
	put(t, s, 0, 2048, 2048, 3)
	flush(t, s)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	r := checked(t, f)
	if size, _ := f.Fork(nil).Size(); size%4096 == 0 {
		t.Errorf("the file has %d bytes, expected no whole pages", size)
	}
	if len(r.Problems) > 0 || r.Leaked > 0 {
		t.Errorf("%d bytes leaked, %v", r.Leaked, r.Problems)
	}
}

// Every bit of the superblocks, the table and the log of a small store: what
// is read after a flip is right, or the store is refused.
func TestEveryBitFlip(t *testing.T) {
	geo := block.Geometry{Size: 8192 * 5, ChunkSize: 8192}
	f := disktest.New(1)
	if err := exception.Create(f, exception.Params{Geometry: geo, LogSize: 32 << 10}); err != nil {
		t.Fatal(err)
	}
	s := openStore(t, f, exception.Options{})
	put(t, s, 0, 0, 8192, 1)
	put(t, s, 1, 512, 512, 2)
	zero(t, s, 2, 5)
	flush(t, s)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	closed := f.Bytes()
	f = disktest.FromBytes(1, closed)
	s = openStore(t, f, exception.Options{})
	put(t, s, 3, 0, 512, 3)
	flush(t, s)
	put(t, s, 1, 512, 512, 4)
	flush(t, s)
	put(t, s, 4, 0, 512, 5)
	flush(t, s)
	crashed := f.Crash(rand.New(rand.NewPCG(1, 1))).Bytes()

	state := func(image []byte) (string, error) {
		s, err := exception.Open(disktest.FromBytes(1, image), exception.Options{ReadOnly: true})
		if err != nil {
			return "", err
		}
		defer s.Close()
		var all []string
		for c := range block.Chunk(5) {
			e := s.Entry(c)
			for b := range block.BlocksPerChunk {
				p := make([]byte, 512)
				if e.State(b) == block.Stored {
					if err := s.ReadStored(p, c, e, b*512); err != nil {
						return "", err
					}
				}
				all = append(all, fmt.Sprint(c, b, e.State(b), p[0], p[511]))
			}
		}
		return fmt.Sprint(all), nil
	}
	for name, image := range map[string][]byte{"closed": closed, "crashed": crashed} {
		want, err := state(image)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		end := 128<<10 + 4096 + 64<<10 + 32<<10
		refused, corrected, last := 0, 0, 0
		for bit := 0; bit < end*8; bit++ {
			if image[bit/8] == 0 && bit%(8*251) != 0 || testing.Short() && bit%7 != 0 {
				continue // a bit here and there of the zeros will do
			}
			image[bit/8] ^= 1 << (bit % 8)
			got, err := state(image)
			switch {
			case errors.Is(err, exception.ErrCorrupt) || errors.Is(err, exception.ErrVersion):
				refused++
			case err != nil:
				t.Fatalf("%s: bit %d: %v", name, bit, err)
			case got == want:
				corrected++
			case name == "crashed" && bit/8 >= 128<<10+4096:
				// The last record after a crash cannot be told from a torn
				// append (R11).
				last++
			default:
				t.Fatalf("%s: bit %d of byte %d flipped: the store opens and reads otherwise", name, bit%8, bit/8)
			}
			image[bit/8] ^= 1 << (bit % 8)
		}
		t.Logf("%s: %d flips harmless, %d refused, %d taken for a torn last record", name, corrected, refused, last)
		if refused == 0 || corrected == 0 || name == "closed" && last > 0 || last > 8*4096*2 {
			t.Errorf("%s: %d corrected, %d refused, %d last", name, corrected, refused, last)
		}
	}
}

func BenchmarkPut(b *testing.B) {
	s, _ := newStore(b, exception.Options{})
	p := make([]byte, 4096)
	put(b, s, 0, 0, 4096, 1)
	b.ReportAllocs()
	for i := range b.N {
		c := block.Chunk(i % 64)
		s.Claim(c)
		if err := s.Put(c, i/64%15*4096, p); err != nil {
			b.Fatal(err)
		}
		s.Release(c)
	}
}
