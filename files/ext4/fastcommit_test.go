package ext4_test

import (
	"encoding/binary"
	"math/rand/v2"
	"testing"

	"github.com/cowdev/cowdev/files/ext4"
)

// TestReplaceRun compares a file's runs with an array of blocks, while ranges
// are put in and taken away at random.
func TestReplaceRun(t *testing.T) {
	const blocks = 40
	for seed := range uint64(200) {
		rnd := rand.New(rand.NewPCG(seed, 0))
		var model [blocks]uint64
		var runs []ext4.Run
		for step := range 40 {
			r := ext4.Run{Logical: uint64(rnd.IntN(blocks)), Phys: uint64(rnd.IntN(3) * (1 + rnd.IntN(100)))}
			r.N = uint64(1 + rnd.IntN(blocks-int(r.Logical)))
			runs = ext4.ReplaceRun(runs, r)
			for i := range r.N {
				model[r.Logical+i] = 0
				if r.Phys != 0 {
					model[r.Logical+i] = r.Phys + i
				}
			}
			var got [blocks]uint64
			next := uint64(0)
			for _, r := range runs {
				if r.N == 0 || r.Logical < next {
					t.Fatalf("seed %d, step %d: runs %v", seed, step, runs)
				}
				for i := range r.N {
					got[r.Logical+i] = r.Phys + i
				}
				next = r.Logical + r.N
			}
			if got != model {
				t.Fatalf("seed %d, step %d: %v gives\n%v, expected\n%v", seed, step, runs, got, model)
			}
		}
	}
}

// TestHostileFastCommits replays tags at random: their kinds and lengths are
// right, what they say is not.
func TestHostileFastCommits(t *testing.T) {
	const addRange, delRange, create, link, unlink, inode = 1, 2, 3, 4, 5, 6
	sizes := map[int]int{addRange: 16, delRange: 12, create: 12, link: 12, unlink: 12, inode: 4 + 160}
	image := smallImages(t)[1]
	for seed := range uint64(150) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		var tags []byte
		for range 30 {
			tag := 1 + rnd.IntN(6)
			val := make([]byte, sizes[tag])
			for i := range val {
				val[i] = byte(rnd.Uint32() & rnd.Uint32() & rnd.Uint32())
			}
			// Small numbers mean inodes, blocks and names that are there.
			binary.LittleEndian.PutUint32(val, uint32(rnd.IntN(100)))
			switch tag {
			case create, link, unlink:
				binary.LittleEndian.PutUint32(val[4:], uint32(rnd.IntN(100)))
				val[8] = byte('a' + rnd.IntN(3))
			case addRange:
				copy(val[10:], []byte{0, 0, byte(rnd.IntN(256)), byte(rnd.IntN(4)), 0, 0})
			}
			tags = binary.LittleEndian.AppendUint16(tags, uint16(tag))
			tags = binary.LittleEndian.AppendUint16(tags, uint16(len(val)))
			tags = append(tags, val...)
		}
		fs, err := ext4.Open(image)
		if err != nil {
			t.Fatal(err)
		}
		ext4.ReplayTags(fs, tags) // an error is as good as none
		askEverything(fs, image.Size(), nil)
	}
}
