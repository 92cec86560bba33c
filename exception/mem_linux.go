package exception

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
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

	// User is who owns the memory besides the one that runs, if that is root:
	// the owner of the store finds what root's server left there, and root what
	// the owner's did. 0 where nobody else does.
	User int
}

// user returns whose memory it is.
func (m Shared) user() int {
	if m.User != 0 {
		return m.User
	}
	return os.Geteuid()
}

// ours reports whether st is of a file that nobody else could have put there.
func (m Shared) ours(st *unix.Stat_t) bool {
	return (int(st.Uid) == os.Geteuid() || int(st.Uid) == m.user()) && st.Mode&unix.S_IFMT == unix.S_IFREG
}

// Path returns the file that holds the live table of store u.
func (m Shared) Path(u UUID) string {
	name := m.prefix(strconv.Itoa(m.user())) + u.String()
	if m.File != "" {
		name += "-" + m.File
	}
	return name
}

// prefix returns what the paths of all stores begin with; the UUID follows.
func (m Shared) prefix(user string) string {
	return filepath.Join(m.Directory(), fmt.Sprintf("cowdev-%s-%s-", user, bootID()))
}

// Directory returns where the files lie.
func (m Shared) Directory() string {
	if m.Dir == "" {
		return "/dev/shm"
	}
	return m.Dir
}

// Files returns the files of this boot that hold live tables of the one who
// runs, or for root of anybody, each with the UUID of its store.
func (m Shared) Files() map[string]string {
	if os.Geteuid() == 0 {
		return m.filesOf("*")
	}
	return m.filesOf(strconv.Itoa(os.Geteuid()))
}

func (m Shared) filesOf(user string) map[string]string {
	names, _ := filepath.Glob(m.prefix(user) + "*")
	files := make(map[string]string, len(names))
	for _, name := range names {
		_, rest, _ := strings.Cut(filepath.Base(name), "-"+bootID()+"-")
		files[name] = rest[:min(len(rest), len(UUID{}.String()))]
	}
	return files
}

// Elsewhere returns the file that holds what session epoch of store u had in
// memory, if that is not the file at Path: the store was copied or moved, or
// another user goes on with it, after its server died. It is empty where there
// is none. Of another user's file, which cannot be read, the name has to do.
func (m Shared) Elsewhere(u UUID, epoch uint64) string {
	for name, of := range m.filesOf("*") {
		if of != u.String() || name == m.Path(u) {
			continue
		}
		h, err := headOf(name)
		if errors.Is(err, os.ErrPermission) && strings.HasSuffix(name, "-"+m.File) ||
			err == nil && h[headMagic] == areaMagic && h[headValid] == stateValid && h[headEpoch] == epoch {
			return name
		}
	}
	return ""
}

// Broken reports whether a process of this boot left word that a sync of store
// u failed, or serves it so. The next session for writing ends that.
func (m Shared) Broken(u UUID) bool {
	h, err := headOf(m.Path(u))
	return err == nil && h[headMagic] == areaMagic && h[headValid] == stateBroken
}

// headOf reads what the file at path says of its store.
func headOf(path string) ([headUUID]uint64, error) {
	var head [headUUID]uint64
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return head, err
	}
	defer f.Close()
	return head, binary.Read(f, le, &head)
}

// bootID tells this boot from others, in a few characters.
var bootID = sync.OnceValue(func() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "boot"
	}
	id, _, _ := strings.Cut(string(b), "-")
	return id
})

// Attach maps the file of store u, as an earlier process left it or new.
func (m Shared) Attach(u UUID, n int64) (Area, error) {
	path := m.Path(u)
	f, err := m.open(path)
	if err != nil {
		return nil, err
	}
	a := &sharedArea{file: f, path: path, reserved: newPageSet(n)}
	if err := a.open(m, n); err != nil {
		f.Close()
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return a, nil
}

// open opens the file at path, or makes it. What is there is not opened as
// something that may have to be made: the kernel refuses root that of another's
// file in a directory that all may write to (fs.protected_regular).
func (m Shared) open(path string) (*os.File, error) {
	const flags = os.O_RDWR | unix.O_NOFOLLOW | unix.O_CLOEXEC
	f, err := os.OpenFile(path, flags, 0)
	if !errors.Is(err, os.ErrNotExist) {
		return f, err
	}
	if f, err = os.OpenFile(path, flags|os.O_CREATE|os.O_EXCL, 0o600); err == nil && m.user() != os.Geteuid() {
		_ = f.Chown(m.user(), -1) // a user that this namespace has not will not come
	}
	return f, err
}

// Peek implements Peeker.
func (m Shared) Peek(u UUID, n int64) (Area, error) {
	area, err := Heap{}.Attach(u, n)
	if err != nil {
		return nil, err
	}
	f, err := os.OpenFile(m.Path(u), os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if errors.Is(err, os.ErrNotExist) {
		return area, nil
	}
	if err != nil {
		return nil, errors.Join(err, area.Release(false))
	}
	defer f.Close()
	if err := m.copyArea(area, f, n); err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", m.Path(u), err), area.Release(false))
	}
	return area, nil
}

// copyArea fills the area from f, if that has the area's size and is a file of
// our own.
func (m Shared) copyArea(a Area, f *os.File, n int64) error {
	var st unix.Stat_t
	fd := int(f.Fd())
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	if !m.ours(&st) || st.Size != n {
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

func (a *sharedArea) open(m Shared, n int64) error {
	var st unix.Stat_t
	fd := int(a.file.Fd())
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	if !m.ours(&st) || st.Nlink != 1 {
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
