package image

import (
	"slices"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/cowdev/cowdev/internal/disk"
)

// Sizes of what is known of holes, in bytes.
const (
	region = 16 << 20 // is asked about at once
	grain  = 16 << 10 // is a hole or not; one that is so in part is not
)

// A holeMap has a bit for each grain of a region that is a hole.
type holeMap [region / grain / 64]uint64

// What most regions are, shared by all of them.
var noHole, allHole holeMap

// zeros is what holes are shown as.
var zeros [64 << 10]byte

// holes knows where the image is a hole, so that what is read there need not be
// brought to memory: the kernel would fill a page with zeros for each 4 KiB. It
// is asked region by region, where something is read that is not in memory; as
// the image does not change, once.
type holes struct {
	f       *disk.OS
	size    int64
	regions []atomic.Pointer[holeMap] // nil where not known
	mu      sync.Mutex                // one asks at a time
}

// newHoles returns nil where the kernel's word on holes is not taken: it must
// be what a read would return, also of what was written a moment ago.
func newHoles(f *disk.OS, size int64) *holes {
	var st unix.Statfs_t
	if f.IsDevice() || unix.Fstatfs(int(f.File().Fd()), &st) != nil {
		return nil
	}
	switch st.Type {
	case unix.EXT4_SUPER_MAGIC, unix.XFS_SUPER_MAGIC, unix.BTRFS_SUPER_MAGIC, unix.TMPFS_MAGIC:
		return &holes{f: f, size: size, regions: make([]atomic.Pointer[holeMap], (size+region-1)/region)}
	}
	return nil
}

// zero reports whether all of [off, off+n) is known to be a hole: not where it
// is empty, or does not lie inside the image.
func (h *holes) zero(off, n int64) bool {
	if h == nil || off < 0 || n <= 0 || off+n > h.size {
		return false
	}
	for end := off + n; off < end; {
		m := h.regions[off/region].Load()
		stop := min(end, (off/region+1)*region)
		if m == nil || m == &noHole || m != &allHole && !m.has(off%region/grain, (stop-1)%region/grain) {
			return false
		}
		off = stop
	}
	return true
}

func (m *holeMap) has(first, last int64) bool {
	for g := first; g <= last; g++ {
		if m[g/64]>>(g%64)&1 == 0 {
			return false
		}
	}
	return true
}

// learn asks about the regions of [off, off+n) that are not known. Where the
// kernel does not answer they stay so.
func (h *holes) learn(off, n int64) {
	if h == nil || off < 0 || n <= 0 {
		return
	}
	for i := off / region; i <= (off+n-1)/region; i++ {
		if h.regions[i].Load() == nil {
			h.ask(i)
		}
	}
}

// ask asks about region i, and notes all the regions that the answer tells of.
func (h *holes) ask(i int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if size, err := h.f.Size(); err != nil || size < h.size || h.regions[i].Load() != nil {
		return // a file that was cut short has no holes there, but nothing
	}
	start := i * region
	data, err := h.f.NextData(start)
	if err != nil {
		return
	}
	if k := h.whole(data); k > i {
		h.note(i, k, &allHole)
		return
	}
	hole := start
	if data == start {
		if hole, err = h.f.NextHole(start); err != nil {
			return
		}
	}
	if k := h.whole(hole); k > i {
		h.note(i, k, &noHole)
		return
	}
	var m holeMap
	for end := min(start+region, h.size); hole < end; {
		if data, err = h.f.NextData(hole); err != nil || data <= hole {
			return // or it was cut short since
		}
		m.add(hole-start, min(data, end)-start, data >= h.size)
		if hole, err = h.f.NextHole(data); err != nil || hole < data {
			return
		}
	}
	h.note(i, i+1, &m)
}

// whole returns how many regions lie before end, wholly.
func (h *holes) whole(end int64) int64 {
	if end >= h.size {
		return int64(len(h.regions))
	}
	return end / region
}

func (h *holes) note(from, to int64, m *holeMap) {
	for i := from; i < to; i++ {
		h.regions[i].CompareAndSwap(nil, m)
	}
}

// add notes that [from, to) of the region is a hole. The last grain counts if
// the hole ends within it, if the image ends there.
func (m *holeMap) add(from, to int64, last bool) {
	first, end := (from+grain-1)/grain, to/grain
	if last {
		end = (to + grain - 1) / grain
	}
	for g := first; g < end; g++ {
		m[g/64] |= 1 << (g % 64)
	}
}

// show appends n bytes of zeros to vecs.
func show(vecs [][]byte, n int64) [][]byte {
	vecs = slices.Grow(vecs, int((n+int64(len(zeros))-1)/int64(len(zeros))))
	for ; n > 0; n -= int64(len(zeros)) {
		k := min(n, int64(len(zeros)))
		vecs = append(vecs, zeros[:k:k])
	}
	return vecs
}
