package disk

import (
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	pageShift = 12
	pageSize  = 1 << pageShift
	wordPages = 64 // pages told by one word of the bitmap, and by one question to the kernel

	// proofAge is how long a page counts as readable after it was seen to be.
	proofAge = time.Second

	// beyond is how many pages after a file's end none is in memory: more than
	// the largest folio (2 MiB, or 4 MiB) has, since one may span the end.
	beyond = 16 << 20 >> pageShift
)

// A Mapping is a file's bytes where the page cache keeps them, for replies
// that are sent without copying. It hands out only pages that were lately
// proven readable: the kernel said that they are in memory, or a read of them
// succeeded. A page that left memory since is read again by whoever touches
// it, and where that fails the system call that was handed the piece answers
// EFAULT; code of ours that touches a piece itself would die of SIGBUS and
// must not.
//
// View and Prove may be called by several goroutines at once.
type Mapping struct {
	data   []byte // the file, read-only; may reach far beyond its end
	size   int64  // bytes that may be asked for
	proven []uint64
	bitmap []byte // the memory of proven

	asks     bool // the kernel tells us what is in memory
	grows    bool // a page that only a read has seen may need room, on a tmpfs
	forgets  atomic.Bool
	mu       sync.Mutex // held while proven is cleared
	timer    *time.Timer
	isClosed bool
}

// NewMapping maps the first size bytes of f, which may end before that: bytes
// beyond its end must not be asked for until it has grown over them. f may be
// closed while the mapping lives.
func NewMapping(f *os.File, size int64) (*Mapping, error) {
	if size <= 0 {
		return nil, fmt.Errorf("map %s: size of %d bytes, expected at least 1", f.Name(), size)
	}
	// More pages than asked for, to put the kernel to the proof with the last.
	pages := (size+pageSize-1)>>pageShift + beyond
	data, err := unix.Mmap(int(f.Fd()), 0, int(pages<<pageShift), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map %s: %w", f.Name(), err)
	}
	// Without this a fault reads 128 KiB around it, which makes cold random
	// reads 20 times slower.
	_ = unix.Madvise(data, unix.MADV_RANDOM)

	words := (pages + wordPages - 1) / wordPages
	bitmap, err := unix.Mmap(-1, 0, int(words*8), unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_PRIVATE|unix.MAP_ANON|unix.MAP_NORESERVE)
	if err != nil {
		_ = unix.Munmap(data)
		return nil, fmt.Errorf("map %s: bitmap of pages: %w", f.Name(), err)
	}
	m := &Mapping{
		data: data, size: size, bitmap: bitmap,
		proven: unsafe.Slice((*uint64)(unsafe.Pointer(&bitmap[0])), words),
	}
	m.timer = time.AfterFunc(time.Hour, m.forget)
	m.timer.Stop()
	m.asks = m.tells(pages - 1)
	var fs unix.Statfs_t
	m.grows = unix.Fstatfs(int(f.Fd()), &fs) == nil && fs.Type == unix.TMPFS_MAGIC
	return m, nil
}

// View appends the piece that holds [off, off+n) to vecs and reports true, if
// all of it is proven readable and lies inside the mapping.
func (m *Mapping) View(vecs [][]byte, off, n int64) ([][]byte, bool) {
	end := off + n
	if n <= 0 || end > m.size {
		return vecs, n == 0
	}
	first, last := off>>pageShift, (end-1)>>pageShift
	for w := first / wordPages; w <= last/wordPages; w++ {
		need := wordMask(w, first, last)
		if atomic.LoadUint64(&m.proven[w])&need != need && m.ask(w)&need != need {
			return vecs, false
		}
	}
	return append(vecs, m.data[off:end:end]), true
}

// Prefetch begins to bring [off, off+n) into memory.
func (m *Mapping) Prefetch(off, n int64) error {
	end := min(off+n, m.size)
	if off >= end {
		return nil
	}
	return unix.Madvise(m.data[off>>pageShift<<pageShift:end], unix.MADV_WILLNEED)
}

// Prove says that [off, off+n) was just read from the file without an error.
// It counts for the pages that lie in the range wholly, and for the last one
// of the mapping if the range reaches its end. Of a tmpfs it proves nothing: a
// read sees the zeros of a hole, and a touch makes a page of it, for which there
// may be no room.
func (m *Mapping) Prove(off, n int64) {
	if m.grows {
		return
	}
	n = min(n, m.size-off)
	first, end := (off+pageSize-1)>>pageShift, (off+n)>>pageShift
	if off+n == m.size {
		end = (m.size + pageSize - 1) >> pageShift
	}
	if first >= end {
		return
	}
	for w := first / wordPages; w <= (end-1)/wordPages; w++ {
		m.note(w, wordMask(w, first, end-1))
	}
}

// Cached reports whether any byte of [off, off+n) is in memory now, or might
// be where the kernel does not tell.
func (m *Mapping) Cached(off, n int64) bool {
	if !m.asks {
		return true
	}
	first, last := off>>pageShift, (off+n-1)>>pageShift
	for w := first / wordPages; w <= last/wordPages; w++ {
		if m.resident(w)&wordMask(w, first, last) != 0 {
			return true
		}
	}
	return false
}

// Close unmaps the file. Nobody may look at a piece any more, nor ask for one.
func (m *Mapping) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.isClosed {
		return nil
	}
	m.isClosed = true
	m.timer.Stop()
	err := unix.Munmap(m.data)
	if e := unix.Munmap(m.bitmap); err == nil {
		err = e
	}
	m.data, m.bitmap, m.proven = nil, nil, nil
	return err
}

// wordMask returns the bits of word w that tell of pages first to last.
func wordMask(w, first, last int64) uint64 {
	mask := ^uint64(0)
	if lo := first - w*wordPages; lo > 0 {
		mask &= ^uint64(0) << lo
	}
	if hi := last - w*wordPages; hi < wordPages-1 {
		mask &= 1<<(hi+1) - 1
	}
	return mask
}

// ask asks the kernel which of the pages of word w are in memory, and returns
// the word.
func (m *Mapping) ask(w int64) uint64 {
	if !m.asks {
		return 0
	}
	bits := m.resident(w)
	if bits != 0 {
		m.note(w, bits)
	}
	// Prove may know of more.
	return bits | atomic.LoadUint64(&m.proven[w])
}

// resident returns the pages of word w that are in memory and up to date.
func (m *Mapping) resident(w int64) uint64 {
	at := w * wordPages << pageShift
	piece := m.data[at:min(at+wordPages<<pageShift, int64(len(m.data)))]
	var vec [wordPages]byte
	_, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&piece[0])),
		uintptr(len(piece)), uintptr(unsafe.Pointer(&vec[0])))
	if errno != 0 {
		return 0
	}
	var bits uint64
	for i, v := range vec[:(len(piece)+pageSize-1)>>pageShift] {
		bits |= uint64(v&1) << i
	}
	return bits
}

// tells reports whether the kernel says the truth about the pages of this
// file: to who neither owns it nor may write it, it calls every page resident,
// even one far beyond the file's end, as the last one of the mapping is.
func (m *Mapping) tells(page int64) bool {
	return m.resident(page/wordPages)>>(page%wordPages)&1 == 0
}

// note marks pages of word w as proven, and sees to it that they are
// forgotten in time.
func (m *Mapping) note(w int64, bits uint64) {
	atomic.OrUint64(&m.proven[w], bits)
	if !m.forgets.Load() && m.forgets.CompareAndSwap(false, true) {
		m.timer.Reset(proofAge)
	}
}

// forget takes back every proof, so that pages which left memory are asked
// for again. A proof that arrives meanwhile is kept or lost, both harmless.
func (m *Mapping) forget() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.isClosed {
		return
	}
	m.forgets.Store(false)
	_ = unix.Madvise(m.bitmap, unix.MADV_DONTNEED) // reads as zeros afterwards
}
