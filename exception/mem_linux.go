package exception

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// Shared is a Memory in files of a tmpfs, which outlive the process and die
// with the boot.
type Shared struct {
	Dir string // /dev/shm where empty

	// File tells the store's file from every other of this boot, by characters
	// that a name may have: a copy of a store has its UUID too, and must not
	// have its memory. Empty where there can be no copy.
	File string
}

// Path returns the file that holds the live table of store u.
func (m Shared) Path(u UUID) string {
	name := m.Prefix() + u.String()
	if m.File != "" {
		name += "-" + m.File
	}
	return name
}

// Prefix returns what the paths of all stores begin with; the UUID follows.
func (m Shared) Prefix() string {
	dir := m.Dir
	if dir == "" {
		dir = "/dev/shm"
	}
	return filepath.Join(dir, fmt.Sprintf("cowdev-%d-%s-", os.Geteuid(), bootID()))
}

// Broken reports whether a process of this boot left word that a sync of store
// u failed, or serves it so. The next session for writing ends that.
func (m Shared) Broken(u UUID) bool {
	head := make([]byte, (headUUID+2)*8)
	f, err := os.Open(m.Path(u))
	if err != nil {
		return false
	}
	defer f.Close()
	if _, err := io.ReadFull(f, head); err != nil {
		return false
	}
	return le.Uint64(head[headMagic*8:]) == areaMagic && le.Uint64(head[headValid*8:]) == stateBroken
}

// bootID tells this boot from others, in a few characters.
func bootID() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "boot"
	}
	id, _, _ := strings.Cut(string(b), "-")
	return id
}

// Attach maps the file of store u, as an earlier process left it or new.
func (m Shared) Attach(u UUID, n int64) (Area, error) {
	path := m.Path(u)
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, err
	}
	a := &sharedArea{file: f, path: path, reserved: newPageSet(n)}
	if err := a.open(n); err != nil {
		f.Close()
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return a, nil
}

// Peek implements Peeker.
func (m Shared) Peek(u UUID, n int64) (Area, error) {
	area, err := Heap{}.Attach(u, n)
	if err != nil {
		return nil, err
	}
	f, err := os.OpenFile(m.Path(u), os.O_RDONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if errors.Is(err, os.ErrNotExist) {
		return area, nil
	}
	if err != nil {
		return nil, errors.Join(err, area.Release(false))
	}
	defer f.Close()
	if err := copyArea(area, f, n); err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", m.Path(u), err), area.Release(false))
	}
	return area, nil
}

// copyArea fills the area from f, if that has the area's size and is a file of
// our own.
func copyArea(a Area, f *os.File, n int64) error {
	var st unix.Stat_t
	fd := int(f.Fd())
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	if st.Uid != uint32(os.Geteuid()) || st.Mode&unix.S_IFMT != unix.S_IFREG || st.Size != n {
		return nil // nothing that a process of ours left
	}
	for off := int64(0); off < n; off += pageSize {
		data, err := unix.Seek(fd, off, unix.SEEK_DATA)
		if err == unix.ENXIO {
			break
		}
		if err != nil {
			return err
		}
		off = data / pageSize * pageSize
		page := a.Bytes()[off:min(off+pageSize, n)]
		if _, err := f.ReadAt(page, off); err != nil {
			return err
		}
		if err := a.Reserve(off, 1); err != nil {
			return err
		}
	}
	return nil
}

type sharedArea struct {
	file     *os.File
	path     string
	bytes    []byte
	reserved pageSet
	mu       sync.Mutex // one Reserve at a time
}

func (a *sharedArea) open(n int64) error {
	var st unix.Stat_t
	fd := int(a.file.Fd())
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	if st.Uid != uint32(os.Geteuid()) || st.Mode&unix.S_IFMT != unix.S_IFREG || st.Nlink != 1 {
		return fmt.Errorf("is not a file of our own, remove it")
	}
	if st.Size != n {
		if err := unix.Ftruncate(fd, 0); err != nil {
			return err
		}
		if err := unix.Ftruncate(fd, n); err != nil {
			return err
		}
	}
	var err error
	if a.bytes, err = unix.Mmap(fd, 0, int(n), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		return err
	}
	// What an earlier process reserved is there still.
	for off := int64(0); off < n; {
		data, err := unix.Seek(fd, off, unix.SEEK_DATA)
		if err != nil {
			break
		}
		hole, err := unix.Seek(fd, data, unix.SEEK_HOLE)
		if err != nil {
			break
		}
		a.reserved.add(data, hole-data)
		off = hole
	}
	return nil
}

func (a *sharedArea) Bytes() []byte           { return a.bytes }
func (a *sharedArea) Reserved(off int64) bool { return a.reserved.has(off) }
func (a *sharedArea) Lasting() bool           { return true }

// Reserve allocates the pages, since a store into a page for which the tmpfs
// has no room would be a SIGBUS.
func (a *sharedArea) Reserve(off, n int64) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	end := min((off+n+pageSize-1)/pageSize*pageSize, int64(len(a.bytes)))
	off -= off % pageSize
	// One call that maps the pages too, where the kernel has it (5.14).
	if err := unix.Madvise(a.bytes[off:end], unix.MADV_POPULATE_WRITE); err != nil {
		if err := unix.Fallocate(int(a.file.Fd()), 0, off, end-off); err != nil {
			return fmt.Errorf("reserve %d bytes of %s: %w", end-off, a.path, err)
		}
	}
	a.reserved.add(off, end-off)
	return nil
}

func (a *sharedArea) Release(keep bool) error {
	if !keep {
		os.Remove(a.path)
	}
	err := unix.Munmap(a.bytes)
	if e := a.file.Close(); err == nil {
		err = e
	}
	return err
}
