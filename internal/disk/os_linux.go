package disk

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// ErrLocked says that another process, or another opening of the file in this
// one, holds a lock that excludes ours.
var ErrLocked = errors.New("locked by another process")

// OS is a regular file or a block device on Linux.
type OS struct {
	f        *os.File
	fd       int
	device   bool
	nameless bool        // until Publish
	beside   *os.File    // another opening of the file, for SyncBeside; nil until Split
	noDsync  atomic.Bool // the filesystem knows no data-synchronous write
}

var _ File = (*OS)(nil)

// OpenOS opens a regular file or a block device; flags are those of
// os.OpenFile. A file that it creates gets mode 0666 before umask. Anything
// else (a directory, a pipe) is refused with an error that wraps ErrKind, and
// writing to a block device that is set read-only with fs.ErrPermission.
func OpenOS(path string, flags int) (*OS, error) {
	// O_NONBLOCK: opening a pipe must not wait for its other end.
	f, err := os.OpenFile(path, flags|unix.O_NONBLOCK, 0o666)
	if errors.Is(err, unix.ENXIO) {
		if info, statErr := os.Stat(path); statErr == nil && info.Mode()&fs.ModeSocket != 0 {
			return nil, fmt.Errorf("%s is a socket: %w", path, ErrKind)
		}
	}
	if err != nil {
		return nil, unwrapPath(path, err)
	}
	o, err := NewOS(f)
	if err != nil {
		return nil, err
	}
	if err = unix.SetNonblock(o.fd, false); err == nil && flags&unix.O_ACCMODE != os.O_RDONLY {
		err = o.checkWritable()
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return o, nil
}

// CreateOS makes a file for path, which must not exist. It has no name until
// Publish: nobody finds it half made, and nothing is left of it if the process
// dies. On a filesystem that cannot do that, or without /proc, it has its name
// at once.
func CreateOS(path string) (*OS, error) {
	if o, err := CreateNameless(path); err == nil {
		return o, nil
	}
	return OpenOS(path, os.O_RDWR|os.O_CREATE|os.O_EXCL)
}

// CreateNameless is CreateOS where that can make a file without a name; else it
// wraps errors.ErrUnsupported.
func CreateNameless(path string) (*OS, error) {
	fd, err := unix.Open(filepath.Dir(path), unix.O_RDWR|unix.O_TMPFILE|unix.O_CLOEXEC, 0o666)
	if err == unix.EISDIR { // a kernel that does not know the flag
		err = unix.EOPNOTSUPP
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	o, err := NewOS(os.NewFile(uintptr(fd), path))
	if err != nil {
		return nil, err
	}
	if err := unix.Access(procPath(fd), unix.F_OK); err != nil { // Publish needs it
		o.Close()
		return nil, fmt.Errorf("%s: %w (%v)", path, errors.ErrUnsupported, err)
	}
	o.nameless = true
	return o, nil
}

// procPath is a name of the open file fd, as long as it is open.
func procPath(fd int) string { return fmt.Sprintf("/proc/self/fd/%d", fd) }

// Publish gives a file of CreateOS its name. It wraps fs.ErrExist where another
// file has that by now.
func (o *OS) Publish() error {
	if !o.nameless {
		return nil
	}
	if err := unix.Linkat(unix.AT_FDCWD, procPath(o.fd), unix.AT_FDCWD, o.Name(), unix.AT_SYMLINK_FOLLOW); err != nil {
		return fmt.Errorf("%s: %w", o.Name(), err)
	}
	o.nameless = false
	return nil
}

// Named reports whether a file of CreateOS has its name.
func (o *OS) Named() bool { return !o.nameless }

// SameFile reports whether a and b name one file that is there.
func SameFile(a, b string) bool {
	x, err := os.Stat(a)
	if err != nil {
		return false
	}
	y, err := os.Stat(b)
	return err == nil && os.SameFile(x, y)
}

// checkWritable refuses a block device that is set read-only: it can be opened
// for writing, and then fails every write.
func (o *OS) checkWritable() error {
	var ro int32
	if !o.device || ioctl(o.fd, unix.BLKROGET, &ro) != nil || ro == 0 {
		return nil
	}
	return fmt.Errorf("%s: the device is set read-only (blockdev --setrw): %w", o.Name(), fs.ErrPermission)
}

// OpenTemp makes a file without a name in dir, which is gone with its last
// descriptor.
func OpenTemp(dir string) (*OS, error) {
	f, err := os.OpenFile(dir, os.O_RDWR|unix.O_TMPFILE, 0o600)
	if err == nil {
		return NewOS(f)
	}
	// Not every filesystem has O_TMPFILE.
	f, err = os.CreateTemp(dir, "cowdev-*")
	if err != nil {
		return nil, err
	}
	if err := os.Remove(f.Name()); err != nil {
		f.Close()
		return nil, err
	}
	return NewOS(f)
}

// ErrKind says that a path is neither a regular file nor a block device.
var ErrKind = errors.New("not a regular file or block device")

// NewOS makes f, which it then owns, an OS; it closes f if that fails.
func NewOS(f *os.File) (*OS, error) {
	info, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, err
	}
	mode := info.Mode()
	device := mode&fs.ModeDevice != 0 && mode&fs.ModeCharDevice == 0
	if !mode.IsRegular() && !device {
		f.Close()
		return nil, fmt.Errorf("%s is %s: %w", f.Name(), kind(mode), ErrKind)
	}
	return &OS{f: f, fd: int(f.Fd()), device: device}, nil
}

// kind names what mode says of a file that is not usable.
func kind(mode fs.FileMode) string {
	switch {
	case mode.IsDir():
		return "a directory"
	case mode&fs.ModeSocket != 0:
		return "a socket"
	case mode&fs.ModeNamedPipe != 0:
		return "a pipe"
	case mode&fs.ModeCharDevice != 0:
		return "a character device"
	}
	return "of type " + mode.Type().String()
}

// unwrapPath puts the path first and leaves the system call out.
func unwrapPath(path string, err error) error {
	var pe *fs.PathError
	if errors.As(err, &pe) {
		err = pe.Err
	}
	return fmt.Errorf("%s: %w", path, err)
}

// File returns the open file, for mappings and file status. It stays o's.
func (o *OS) File() *os.File { return o.f }

// Name returns the path that o was opened by.
func (o *OS) Name() string { return o.f.Name() }

// Identity returns what tells the file from every other of this boot, by
// hexadecimal digits and hyphens: by its device, its inode and when that was
// made, or for a block device by its number and which disk has it now.
func (o *OS) Identity() (string, error) {
	var st unix.Statx_t
	const mask = unix.STATX_INO | unix.STATX_BTIME
	if err := unix.Statx(o.fd, "", unix.AT_EMPTY_PATH, mask, &st); err != nil {
		return "", fmt.Errorf("%s: %w", o.Name(), err)
	}
	if o.device {
		var seq uint64
		_ = ioctl(o.fd, unix.BLKGETDISKSEQ, &seq) // from Linux 5.15 on; no other disk of this boot has it
		return fmt.Sprintf("%x-%x-%x", st.Rdev_major, st.Rdev_minor, seq), nil
	}
	made := st.Btime.Sec*1e9 + int64(st.Btime.Nsec) // 0 where the filesystem keeps none
	return fmt.Sprintf("%x-%x-%x-%x", st.Dev_major, st.Dev_minor, st.Ino, uint64(made)), nil
}

// IsDevice reports whether o is a block device.
func (o *OS) IsDevice() bool { return o.device }

// ReadAt implements File.
func (o *OS) ReadAt(p []byte, off int64) (int, error) { return o.f.ReadAt(p, off) }

// WriteAt implements File.
func (o *OS) WriteAt(p []byte, off int64) (int, error) { return o.f.WriteAt(p, off) }

// WriteVecAt implements File. It is one system call for as many pieces as one
// takes.
func (o *OS) WriteVecAt(p [][]byte, off int64) error {
	const most = 1024 // IOV_MAX
	for len(p) > 0 {
		n, err := unix.Pwritev(o.fd, p[:min(len(p), most)], off)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return o.fail("write", off, err)
		case n == 0 && len(p[0]) > 0:
			return o.fail("write", off, unix.EIO)
		}
		off += int64(n)
		for len(p) > 0 && n >= len(p[0]) {
			n, p = n-len(p[0]), p[1:]
		}
		if n > 0 { // the rest of a piece that was written in part
			if _, err := o.WriteAt(p[0][n:], off); err != nil {
				return err
			}
			off, p = off+int64(len(p[0])-n), p[1:]
		}
	}
	return nil
}

// WriteSync implements File by one pwritev2 with RWF_DSYNC where the
// filesystem knows it, and else by a write and a sync.
func (o *OS) WriteSync(p []byte, off int64) error {
	for len(p) > 0 && !o.noDsync.Load() {
		n, err := unix.Pwritev2(o.fd, [][]byte{p}, off, unix.RWF_DSYNC)
		switch {
		case err == unix.EINTR:
			continue
		case err == unix.EOPNOTSUPP || err == unix.ENOSYS:
			o.noDsync.Store(true)
			continue
		case err != nil:
			return o.fail("synchronous write", off, err)
		case n == 0:
			return o.fail("synchronous write", off, unix.EIO)
		}
		p, off = p[n:], off+int64(n)
	}
	if len(p) == 0 {
		return nil
	}
	if _, err := o.WriteAt(p, off); err != nil {
		return err
	}
	return o.Sync()
}

// Sync implements File.
func (o *OS) Sync() error {
	if err := retry(func() error { return unix.Fdatasync(o.fd) }); err != nil {
		return fmt.Errorf("%s: sync: %w", o.Name(), err)
	}
	return nil
}

// Split opens the file a second time, so that SyncBeside learns of every error
// that Sync learns of. Without it the two are the same.
func (o *OS) Split() error {
	f, err := os.OpenFile(procPath(o.fd), os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return fmt.Errorf("%s: open it once more: %w", o.Name(), err)
	}
	o.beside = f
	return nil
}

// SyncBeside implements File.
func (o *OS) SyncBeside() error {
	if o.beside == nil {
		return o.Sync()
	}
	if err := retry(func() error { return unix.Fdatasync(int(o.beside.Fd())) }); err != nil {
		return fmt.Errorf("%s: sync: %w", o.Name(), err)
	}
	return nil
}

// StartSync sets the disk to work on what was written, and does not wait.
func (o *OS) StartSync() {
	_ = unix.SyncFileRange(o.fd, 0, 0, unix.SYNC_FILE_RANGE_WRITE)
}

// Share implements Sharer.
func (o *OS) Share(off int64, from File, at, n int64) error {
	src, ok := from.(*OS)
	if !ok || n <= 0 {
		return errors.ErrUnsupported
	}
	return unix.IoctlFileCloneRange(o.fd, &unix.FileCloneRange{
		Src_fd: int64(src.fd), Src_offset: uint64(at), Src_length: uint64(n), Dest_offset: uint64(off),
	})
}

// Unshare gives [off, off+n), which is data, blocks of its own where the file
// has them in common with another, so that writing over it needs no room.
// Where the filesystem cannot be asked for that it does nothing.
func (o *OS) Unshare(off, n int64) error {
	if o.device || n <= 0 {
		return nil
	}
	const mode = unix.FALLOC_FL_UNSHARE_RANGE | unix.FALLOC_FL_KEEP_SIZE
	err := retry(func() error { return unix.Fallocate(o.fd, mode, off, n) })
	if err == unix.EOPNOTSUPP || err == unix.ENOSYS || err == unix.EINVAL {
		return nil
	}
	if err != nil {
		return o.fail("unshare", off, err)
	}
	return nil
}

// PunchHole implements File. On a block device the range is zeroed, never
// discarded: what a discarded range reads as is the device's affair.
func (o *OS) PunchHole(off, n int64) error {
	if n <= 0 {
		return nil
	}
	var err error
	if o.device {
		arg := [2]uint64{uint64(off), uint64(n)}
		err = retry(func() error { return ioctl(o.fd, unix.BLKZEROOUT, &arg) })
	} else {
		const mode = unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE
		err = retry(func() error { return unix.Fallocate(o.fd, mode, off, n) })
	}
	switch err {
	case nil:
		return nil
	case unix.EOPNOTSUPP, unix.ENOSYS, unix.EINVAL: // EINVAL: a range that is not whole sectors
		return o.writeZeros(off, n)
	}
	return o.fail("punch hole", off, err)
}

var zeros [64 << 10]byte

// writeZeros writes zeros into the part of [off, off+n) that exists.
func (o *OS) writeZeros(off, n int64) error {
	size, err := o.Size()
	if err != nil {
		return err
	}
	for n = min(n, size-off); n > 0; {
		k, err := o.WriteAt(zeros[:min(n, int64(len(zeros)))], off)
		if err != nil {
			return err
		}
		off, n = off+int64(k), n-int64(k)
	}
	return nil
}

// Truncate implements File. A block device keeps its size and only refuses
// one that it does not have.
func (o *OS) Truncate(size int64) error {
	if !o.device {
		return o.f.Truncate(size)
	}
	have, err := o.Size()
	if err == nil && size > have {
		err = fmt.Errorf("%d bytes are needed, the device has %d: %w", size, have, unix.ENOSPC)
	}
	return err
}

// Size implements File.
func (o *OS) Size() (int64, error) {
	if o.device {
		var size uint64
		if err := ioctl(o.fd, unix.BLKGETSIZE64, &size); err != nil {
			return 0, fmt.Errorf("%s: size of the device: %w", o.Name(), err)
		}
		return int64(size), nil
	}
	info, err := o.f.Stat()
	if err != nil {
		return 0, err
	}
	return info.Size(), nil
}

// NextData implements File. Where holes are not told (a block device, some
// filesystems) every byte may be data.
func (o *OS) NextData(off int64) (int64, error) {
	size, err := o.Size()
	if err != nil || off >= size {
		return size, err
	}
	return o.seek(off, unix.SEEK_DATA, size, off)
}

// NextHole returns the first offset at or after off where a hole begins, or
// the file's size.
func (o *OS) NextHole(off int64) (int64, error) {
	size, err := o.Size()
	if err != nil || off >= size {
		return size, err
	}
	return o.seek(off, unix.SEEK_HOLE, size, size)
}

// seek asks for the next data or hole, and returns unknown where holes are
// not told.
func (o *OS) seek(off int64, whence int, size, unknown int64) (int64, error) {
	if o.device {
		return unknown, nil
	}
	at, err := unix.Seek(o.fd, off, whence)
	switch err {
	case nil:
		return at, nil
	case unix.ENXIO: // nothing more of the kind
		return size, nil
	case unix.EINVAL, unix.EOPNOTSUPP, unix.ENOSYS:
		return unknown, nil
	}
	return 0, o.fail("look for data", off, err)
}

// DropCache makes what is read of [off, off+n) from now on come from the disk,
// where no page of it waits to be written. n may be 0 for all that follows off.
func (o *OS) DropCache(off, n int64) error {
	return retry(func() error { return unix.Fadvise(o.fd, off, n, unix.FADV_DONTNEED) })
}

// Lock takes a flock, shared or exclusive, without waiting; one that o holds
// already is changed. The error wraps ErrLocked and names the holder where
// /proc/locks tells. Closing o gives the lock up.
func (o *OS) Lock(shared bool) error {
	how, access := unix.LOCK_EX, "exclusive"
	if shared {
		how, access = unix.LOCK_SH, "shared"
	}
	err := retry(func() error { return unix.Flock(o.fd, how|unix.LOCK_NB) })
	if err == unix.EWOULDBLOCK {
		return fmt.Errorf("%s: %s lock: %w%s", o.Name(), access, ErrLocked, describe(o.Holders()))
	}
	if err != nil {
		return fmt.Errorf("%s: %s lock: %w", o.Name(), access, err)
	}
	return nil
}

// Unlock gives up the lock that o holds.
func (o *OS) Unlock() error { return retry(func() error { return unix.Flock(o.fd, unix.LOCK_UN) }) }

// Holders returns the processes that hold a flock on the file, as far as
// /proc/locks tells; with several openings a process is named once.
func (o *OS) Holders() []int {
	var st unix.Stat_t
	if unix.Fstat(o.fd, &st) != nil {
		return nil
	}
	locks, err := os.ReadFile("/proc/locks")
	if err != nil {
		return nil
	}
	return holders(locks, st.Ino)
}

// holders reads lines such as "1: FLOCK  ADVISORY  WRITE 812 fe:00:4711 0 EOF".
// Only the inode is compared: the device told there is not the one of stat on
// some filesystems (btrfs, overlayfs).
func holders(locks []byte, inode uint64) []int {
	var pids []int
	seen := make(map[int]bool)
	for lines := bufio.NewScanner(bytes.NewReader(locks)); lines.Scan(); {
		f := strings.Fields(lines.Text())
		if len(f) != 8 || f[1] != "FLOCK" {
			continue
		}
		at := strings.Split(f[5], ":")
		pid, err := strconv.Atoi(f[4])
		if err != nil || pid <= 0 || seen[pid] || at[len(at)-1] != strconv.FormatUint(inode, 10) {
			continue
		}
		seen[pid] = true
		pids = append(pids, pid)
	}
	return pids
}

// describe names processes for a message, with a leading blank.
func describe(pids []int) string {
	var b strings.Builder
	for i, pid := range pids {
		if i > 0 {
			b.WriteString(",")
		}
		fmt.Fprintf(&b, " pid %d", pid)
		if comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid)); err == nil {
			fmt.Fprintf(&b, " (%s)", bytes.TrimSpace(comm))
		}
	}
	return b.String()
}

// Close implements File.
func (o *OS) Close() error {
	err := o.f.Close()
	if o.beside != nil {
		o.beside.Close()
	}
	return err
}

func (o *OS) fail(what string, off int64, err error) error {
	return fmt.Errorf("%s: %s at %d: %w", o.Name(), what, off, err)
}

// retry calls f again as long as a signal interrupts it.
func retry(f func() error) error {
	for {
		if err := f(); err != unix.EINTR {
			return err
		}
	}
}
