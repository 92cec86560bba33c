package crash

// What walks have found once in millions of states, made certain.

import (
	"math/rand/v2"
	"syscall"
	"testing"

	"github.com/cowdev/cowdev/block"
	"github.com/cowdev/cowdev/exception"
	"github.com/cowdev/cowdev/internal/disktest"
)

// TestFoundFailedSyncWithoutWord lets each sync of a session fail in turn,
// with no memory to leave word in, and cuts the power in each step of the next
// session's first change. A store must be left.
func TestFoundFailedSyncWithoutWord(t *testing.T) {
	for seed := range uint64(3) {
		for n := 1; ; n++ {
			f, failed := failSync(t, seed, n)
			if !failed {
				break
			}
			cutNextSession(t, f, rand.New(rand.NewPCG(seed, uint64(n))))
		}
	}
}

// failSync changes a new store, closes it with the nth sync failing, and
// returns the file for the next process and whether there was an nth sync.
func failSync(t *testing.T, seed uint64, n int) (f *disktest.File, failed bool) {
	f = disktest.New(seed)
	if err := exception.Create(f, exception.Params{Geometry: block.Geometry{Size: 16384, ChunkSize: 8192}, LogSize: 32 << 10}); err != nil {
		t.Fatal(err)
	}
	s, dev, err := open(make([]byte, 16384), f, exception.Options{})
	if err != nil {
		t.Fatal(err)
	}
	f.Inject = disktest.FailNth(n, disktest.Fault{Err: syscall.EIO}, func(op disktest.Op) bool { return op.Kind == disktest.Sync })
	_, werr := dev.WriteAt(make([]byte, 512), 0)
	cerr := s.Close()
	return f.Kill(nil), werr != nil || cerr != nil
}

// cutNextSession opens the store in f, changes it, and cuts the power on
// copies in each step.
func cutNextSession(t *testing.T, f *disktest.File, rng *rand.Rand) {
	base := make([]byte, 16384)
	s, dev, err := open(base, f, exception.Options{})
	if err != nil {
		t.Fatal(err)
	}
	f.OnStep = func(op disktest.Op, phase disktest.Phase) {
		if op.Kind == disktest.Read {
			return
		}
		for range 10 {
			left, _, err := open(base, f.Crash(rng), exception.Options{})
			if err != nil {
				t.Fatalf("power cut in %v, %v: %v", op, phase, err)
			}
			left.Abandon()
		}
	}
	if _, err := dev.WriteAt(make([]byte, 512), 0); err != nil {
		t.Fatal(err)
	}
	f.OnStep = nil
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}
