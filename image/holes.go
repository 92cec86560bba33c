package image

import (
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cowdev/cowdev/internal/disk"
)

// Sizes of what is known of holes, in bytes.
const (
	region = 16 << 20 // is asked about at once
	grain  = 16 << 10 // is a hole or not; one that is so in part is not
)

// Limits of what is asked and noted.
const (
	maxHoley   = 16 << 40             // bytes of an image that is asked about; its regions take 8 MiB
	maxNoted   = 1024                 // regions that one answer is noted for
	slowAnswer = 5 * time.Millisecond // no more is asked after one: the kernel may look at every extent up to the next hole
)

// A holeMap has a bit for each grain of a region that is a hole.
type holeMap [region / grain / 64]uint64

// What most regions are, shared by all of them.
var noHole, allHole holeMap

// holes knows where the image is a hole, so that what is read there need not be
// brought to memory: the kernel would fill a page with zeros for each 4 KiB. It
// asks region by region, where something is read from the file or is about to
// be; as the image does not change, once.
type holes struct {
	f       *disk.OS
	size    int64
	regions []atomic.Pointer[holeMap] // nil where not known
	slow    atomic.Bool               // nothing is asked any more
	mu      sync.Mutex                // one asks at a time; others do not wait
}

// newHoles returns nil for an image without holes, and where the kernel's word
// on them is not taken: it must be what a read would return, also of what was
// written a moment ago.
func newHoles(f *disk.OS, size int64) *holes {
	var fs unix.Statfs_t
	var st unix.Stat_t
	fd := int(f.File().Fd())
	if f.IsDevice() || size > maxHoley || unix.Fstat(fd, &st) != nil || st.Blocks*512 >= size || unix.Fstatfs(fd, &fs) != nil {
		return nil
	}
	switch fs.Type {
	case unix.EXT4_SUPER_MAGIC, unix.XFS_SUPER_MAGIC, unix.BTRFS_SUPER_MAGIC, unix.TMPFS_MAGIC:
		return &holes{f: f, size: size, regions: make([]atomic.Pointer[holeMap], (size+region-1)/region)}
	}
	return nil
}

// zero reports whether all of [off, off+n) is known to be a hole: not where it
// is empty, or does not lie inside the image.
func (h *holes) zero(off, n int64) bool {
	if h == nil || off < 0 || n <= 0 || n > h.size-off {
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
	if h == nil || off < 0 || off >= h.size || n <= 0 {
		return
	}
	for i, last := off/region, (min(n, h.size-off)+off-1)/region; i <= last; i++ {
		if h.regions[i].Load() == nil && !h.slow.Load() {
			h.ask(i)
		}
	}
}

// ask asks about region i, and notes all the regions that the answer tells of.
func (h *holes) ask(i int64) {
	if !h.mu.TryLock() {
		return
	}
	defer h.mu.Unlock()
	began := time.Now()
	if m, until := h.answer(i); m != nil {
		for ; i < until; i++ {
			h.regions[i].CompareAndSwap(nil, m)
		}
	}
	if time.Since(began) > slowAnswer {
		h.slow.Store(true)
	}
}

// answer returns what the regions from i to until are, or nil if that cannot be
// known.
func (h *holes) answer(i int64) (m *holeMap, until int64) {
	if size, err := h.f.Size(); err != nil || size < h.size {
		return nil, 0 // a file that was cut short has no holes there, but nothing
	}
	start, end := i*region, min((i+1)*region, h.size)
	m = new(holeMap)
	for at := start; at < end; {
		data, err := h.f.NextData(at)
		if err != nil || data < at {
			return nil, 0 // or it was cut short since
		}
		if at == start && data >= end {
			return &allHole, h.whole(i, data)
		}
		m.add(at-start, min(data, end)-start, data >= h.size)
		if data >= end {
			break
		}
		hole, err := h.f.NextHole(data)
		if err != nil || hole <= data {
			return nil, 0
		}
		if data == start && hole >= end {
			return &noHole, h.whole(i, hole)
		}
		at = (hole + grain - 1) / grain * grain
	}
	return m, i + 1
}

// whole returns up to which region the image is the same from i on where it is
// so up to end.
func (h *holes) whole(i, end int64) int64 {
	until := end / region
	if end >= h.size {
		until = int64(len(h.regions))
	}
	return min(until, i+maxNoted)
}

// add notes that [from, to) of the region, which begins with a grain, is a hole.
// A last grain that the hole ends in counts if the image ends there.
func (m *holeMap) add(from, to int64, last bool) {
	end := to / grain
	if last {
		end = (to + grain - 1) / grain
	}
	for g := from / grain; g < end; g++ {
		m[g/64] |= 1 << (g % 64)
	}
}
