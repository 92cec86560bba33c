package guest

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// block is the unit in which contents are told.
const block = 4 << 10

// OriginSize is the size of the origin in bytes.
const OriginSize = 128 << 20

// A Load is what is asked of a device. Offsets are random, none twice.
type Load struct {
	ID, Title  string
	Write      bool
	Again      bool  // of blocks that the store's first load has written
	Block      int64 // bytes of a request
	Count      int
	Depth      int  // requests under way
	SyncEach   bool // fdatasync after each write; else one, after the last
	Sequential bool // from the beginning of the device
}

// Groups are all loads. Each group begins with a new store.
var Groups = [][]Load{
	{
		{ID: "read-base", Title: "4 KiB random read of the base, depth 1", Block: block, Count: 1000, Depth: 1},
	},
	{
		{ID: "first", Title: "4 KiB random first write, depth 1", Write: true, Block: block, Count: 1000, Depth: 1},
		{ID: "read-overlay", Title: "4 KiB random read of the overlay, depth 1", Again: true, Block: block, Count: 1000, Depth: 1},
		{ID: "again-sync", Title: "4 KiB random overwrite, fdatasync after each", Write: true, Again: true, Block: block, Count: 600, Depth: 1, SyncEach: true},
	},
	{
		{ID: "first-x16", Title: "4 KiB random first write, depth 16", Write: true, Block: block, Count: 2000, Depth: 16},
	},
	{
		{ID: "first-sync", Title: "4 KiB random first write, fdatasync after each", Write: true, Block: block, Count: 600, Depth: 1, SyncEach: true},
	},
	{
		{ID: "sequential", Title: "1 MiB sequential first write, depth 1", Write: true, Block: 1 << 20, Count: 64, Depth: 1, Sequential: true},
	},
}

// offsets returns where a load's requests go. Loads of one seed that are as
// long go to the same places; each goes through them in an order of its own.
func (l *Load) offsets(seed uint64) []int64 {
	all := make([]int64, OriginSize/l.Block)
	for i := range all {
		all[i] = int64(i) * l.Block
	}
	if l.Sequential {
		return all[:l.Count]
	}
	r := rand.New(rand.NewPCG(seed, 0))
	r.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	all = all[:l.Count]
	if l.Again {
		r.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	}
	return all
}

// contents knows how often each block of a device was written.
type contents [OriginSize / block]uint32

// run puts the load on a device and returns how long it took, with the last
// sync. It notes what it writes in c.
func (l *Load) run(device string, seed uint64, c *contents) (time.Duration, error) {
	flags := unix.O_RDONLY
	if l.Write {
		flags = unix.O_RDWR
	}
	fd, err := unix.Open(device, flags|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("open %s: %w", device, err)
	}
	defer unix.Close(fd)
	offsets := l.offsets(seed)
	var next atomic.Int64
	errs := make([]error, l.Depth)
	var all sync.WaitGroup
	began := time.Now()
	for i := range l.Depth {
		all.Go(func() {
			p, err := aligned(l.Block)
			if err != nil {
				errs[i] = err
				return
			}
			defer unix.Munmap(p)
			for n := next.Add(1) - 1; n < int64(len(offsets)) && errs[i] == nil; n = next.Add(1) - 1 {
				errs[i] = l.request(fd, p, offsets[n], c)
			}
		})
	}
	all.Wait()
	if l.Write {
		errs = append(errs, unix.Fdatasync(fd))
	}
	return time.Since(began), errors.Join(errs...)
}

// request does one request. No two of a load touch the same block.
func (l *Load) request(fd int, p []byte, off int64, c *contents) error {
	if !l.Write {
		return full(unix.Pread(fd, p, off))(p, "read", off)
	}
	for at := int64(0); at < l.Block; at += block {
		n := (off + at) / block
		c[n]++
		fill(p[at:at+block], n, c[n])
	}
	if err := full(unix.Pwrite(fd, p, off))(p, "write", off); err != nil || !l.SyncEach {
		return err
	}
	return unix.Fdatasync(fd)
}

// full makes an error of a system call that failed or was not complete.
func full(n int, err error) func(p []byte, what string, off int64) error {
	return func(p []byte, what string, off int64) error {
		if err == nil && n < len(p) {
			err = fmt.Errorf("%d of %d bytes", n, len(p))
		}
		if err != nil {
			return fmt.Errorf("%s at %d: %w", what, off, err)
		}
		return nil
	}
}

// compare reads all of a device, and returns an error for the first block that
// is not as c has it. It is opened with flags.
func (c *contents) compare(device string, flags int) error {
	fd, err := unix.Open(device, flags|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", device, err)
	}
	defer unix.Close(fd)
	p, err := aligned(1 << 20)
	if err != nil {
		return err
	}
	defer unix.Munmap(p)
	want := make([]byte, block)
	for off := int64(0); off < OriginSize; off += int64(len(p)) {
		if err := full(unix.Pread(fd, p, off))(p, "read", off); err != nil {
			return err
		}
		for at := int64(0); at < int64(len(p)); at += block {
			n := (off + at) / block
			if fill(want, n, c[n]); !bytes.Equal(p[at:at+block], want) {
				return fmt.Errorf("block %d, written %d times, has bytes that are not its own", n, c[n])
			}
		}
	}
	return nil
}

// pool is what contents are cut from. They cannot be compressed.
var pool = sync.OnceValue(func() []byte {
	p := make([]byte, 1<<20+block)
	rand.NewChaCha8([32]byte{'g', 'u', 'e', 's', 't'}).Read(p)
	return p
})

// fill makes the contents of block n once it was written so often; 0 is the
// origin.
func fill(p []byte, n int64, written uint32) {
	from := (uint64(n)*0x9e3779b97f4a7c15 + uint64(written)*0x632be59bd9b4e019) >> 44 // 20 bits
	copy(p, pool()[from:])
	binary.LittleEndian.PutUint64(p, uint64(n))
	binary.LittleEndian.PutUint64(p[8:], uint64(written))
}

// MakeOrigin writes the origin's contents to a file.
func MakeOrigin(path string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	p := make([]byte, 1<<20)
	for off := int64(0); off < OriginSize; off += int64(len(p)) {
		for at := int64(0); at < int64(len(p)); at += block {
			fill(p[at:at+block], (off+at)/block, 0)
		}
		if _, err := f.Write(p); err != nil {
			return err
		}
	}
	return f.Close()
}

// CompareOrigin returns an error where a file is not as MakeOrigin made it.
func CompareOrigin(path string) error { return new(contents).compare(path, unix.O_RDONLY) }

// aligned returns n bytes that O_DIRECT takes.
func aligned(n int64) ([]byte, error) {
	return unix.Mmap(-1, 0, int(n), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON|unix.MAP_POPULATE)
}
