package attach

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cowdev/cowdev/attach/nbdnl"
)

// Defaults of an NBDConfig.
const (
	DefaultConnections = 2
	DefaultBlockSize   = 512
)

// pollEvery is how often the kernel's state is looked at while waiting for it.
const pollEvery = 10 * time.Millisecond

// An NBDConfig says what is attached, and how.
type NBDConfig struct {
	Index       int // N of /dev/nbdN, or nbdnl.AnyDevice
	Size        int64
	Flags       uint16 // transmission flags, nbdserver.Export.TransmissionFlags
	BlockSize   int    // bytes; 512 keeps existing XFS and partition tables readable
	Connections int
	// Timeout is how long a request may take before the kernel gives its
	// connection up; see nbdnl.Config. It counts whole seconds.
	Timeout time.Duration
	// DeadTimeout is how long requests wait while nobody serves.
	DeadTimeout time.Duration
	Identifier  string // what is behind the device: the store's UUID
}

// netlink returns what the kernel is told of c with sockets.
func (c NBDConfig) netlink(sockets []*os.File) nbdnl.Config {
	return nbdnl.Config{
		Index: c.Index, Size: uint64(c.Size), BlockSize: uint64(c.BlockSize), ServerFlags: uint64(c.Flags),
		Timeout: c.Timeout, DeadTimeout: c.DeadTimeout, Identifier: c.Identifier, Sockets: sockets,
	}
}

// An NBD is an attached /dev/nbdN.
type NBD struct {
	cfg   NBDConfig // with the index the kernel gave
	owner string
}

// ConnectNBD attaches a device and returns our ends of its connections. They
// have to be served before the device is opened: the kernel looks for
// partitions then. It gives EBUSY where cfg.Index is in use, and
// nbdnl.ErrNoDriver where there is no driver.
func ConnectNBD(cfg NBDConfig) (*NBD, []net.Conn, error) {
	if cfg.Size < DefaultBlockSize {
		return nil, nil, fmt.Errorf("image of %d bytes, a device has at least one sector of %d", cfg.Size, DefaultBlockSize)
	}
	if cfg.Index != nbdnl.AnyDevice {
		if n := readSysfs(cfg.Index, "pid"); n != "" {
			return nil, nil, fmt.Errorf("%s: in use, by process %s: %w", NBDPath(cfg.Index), n, unix.EBUSY)
		}
	}
	ours, theirs, err := SocketPairs(cfg.Connections)
	if err != nil {
		return nil, nil, err
	}
	defer closeFiles(theirs)
	if cfg.Index, err = nbdnl.Connect(cfg.netlink(theirs)); err != nil {
		closeConns(ours)
		return nil, nil, err
	}
	return &NBD{cfg, OwnerNBD(cfg.Index)}, ours, nil
}

// ResumeNBD gives the device cfg.Index, whose server is gone, new connections,
// and returns our ends of them. It waits until the kernel has noticed that the
// old ones are dead. Only timeouts of cfg have an effect on the device; its
// Identifier must be the device's.
func ResumeNBD(ctx context.Context, cfg NBDConfig) (*NBD, []net.Conn, error) {
	ours, theirs, err := SocketPairs(cfg.Connections)
	if err != nil {
		return nil, nil, err
	}
	defer closeFiles(theirs)
	d := &NBD{cfg, OwnerNBD(cfg.Index)}
	// One at a time: the kernel may have seen the end of some only.
	for i := range theirs {
		if err := d.reconfigure(ctx, theirs[i:i+1]); err != nil {
			closeConns(ours)
			return nil, nil, err
		}
	}
	return d, ours, nil
}

// Reconnect returns our end of a new connection, in the place of one that the
// kernel gave up.
func (d *NBD) Reconnect(ctx context.Context) (net.Conn, error) {
	ours, theirs, err := SocketPairs(1)
	if err != nil {
		return nil, err
	}
	defer closeFiles(theirs)
	if err := d.reconfigure(ctx, theirs); err != nil {
		closeConns(ours)
		return nil, err
	}
	return ours[0], nil
}

// reconfigure hands sockets to the kernel once it has places for them: it
// takes none while the old ones are alive in its eyes.
func (d *NBD) reconfigure(ctx context.Context, sockets []*os.File) error {
	return poll(ctx, func() (bool, error) {
		err := nbdnl.Reconfigure(d.cfg.netlink(sockets))
		if errors.Is(err, unix.ENOSPC) {
			return false, fmt.Errorf("%s: its old connections are still alive: %w", d.Path(), err)
		}
		return true, err
	})
}

// Path returns the device's name.
func (d *NBD) Path() string { return NBDPath(d.cfg.Index) }

// Owner returns OwnerNBD of the device as it was attached.
func (d *NBD) Owner() string { return d.owner }

// Config returns what the device was attached with.
func (d *NBD) Config() NBDConfig { return d.cfg }

// NBDPath returns the name of device index.
func NBDPath(index int) string { return "/dev/nbd" + strconv.Itoa(index) }

// NBDIndex returns N of a path /dev/nbdN.
func NBDIndex(path string) (int, error) {
	n, err := strconv.Atoi(strings.TrimPrefix(filepath.Clean(path), "/dev/nbd"))
	if err != nil || n < 0 {
		return 0, fmt.Errorf("%s: not an nbd device, expected /dev/nbdN", path)
	}
	return n, nil
}

// WaitUsable waits until the device can be read. Its connections are being
// served.
func (d *NBD) WaitUsable(ctx context.Context) error {
	return poll(ctx, func() (bool, error) {
		if sectors := readSysfs(d.cfg.Index, "size"); sectors != strconv.FormatInt(d.cfg.Size/512, 10) {
			return false, fmt.Errorf("%s: has %s sectors, expected %d", d.Path(), sectors, d.cfg.Size/512)
		}
		f, err := os.Open(d.Path())
		if err != nil {
			return false, fmt.Errorf("open %s, which the kernel has made: %w", d.Path(), err)
		}
		defer f.Close()
		_, err = f.ReadAt(make([]byte, 512), 0)
		return true, err
	})
}

// Disconnect ends the device and waits until it is free to be used again.
// The connections see a goodbye. It does not ask whether somebody uses the
// device; see Busy.
func (d *NBD) Disconnect(ctx context.Context) error {
	return DisconnectNBD(ctx, d.cfg.Index, d.owner)
}

// DisconnectNBD is NBD.Disconnect for a device that another process attached.
// One that has another owner than that is somebody else's, who took it when it
// was free, and is left alone.
func DisconnectNBD(ctx context.Context, index int, owner string) error {
	if owner == "" || OwnerNBD(index) != owner {
		return nil
	}
	// A device that is not connected is what is wanted, so EINVAL is no error.
	if err := nbdnl.Disconnect(index); err != nil && !errors.Is(err, unix.EINVAL) {
		return err
	}
	return poll(ctx, func() (bool, error) {
		if OwnerNBD(index) == owner {
			return false, fmt.Errorf("%s: still in use, by whoever has it open", NBDPath(index))
		}
		return true, nil
	})
}

// ConnectedNBD reports whether the kernel has device index connected, dead
// connections included.
func ConnectedNBD(index int) bool { return OwnerNBD(index) != "" }

// OwnerNBD returns what the kernel notes of who connected device index, the
// number of a thread; "" where it is not connected. It stays the same when the
// device is given new connections, and tells it from one that was connected
// anew.
func OwnerNBD(index int) string { return readSysfs(index, "pid") }

// BackendNBD returns the Identifier that device index was attached with, or
// "".
func BackendNBD(index int) string { return readSysfs(index, "backend") }

// readSysfs reads an attribute of device index, "" where there is none.
func readSysfs(index int, attribute string) string {
	b, _ := os.ReadFile(filepath.Join("/sys/block", "nbd"+strconv.Itoa(index), attribute))
	return strings.TrimSpace(string(b))
}

// Busy reports whether a block device is mounted, or held in another way that
// allows no second holder, or a loop device on it is.
func Busy(path string) (bool, error) {
	for _, part := range LoopsOn(path) {
		if busy, err := Busy(part); busy && err == nil {
			return true, nil
		}
	}
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_EXCL, 0)
	switch {
	case errors.Is(err, unix.EBUSY):
		return true, nil
	case err != nil:
		return false, err
	}
	return false, f.Close()
}

// SocketPairs returns n pairs of connected stream sockets, one end as a
// connection, the other as a file for the kernel or another process.
func SocketPairs(n int) (ours []net.Conn, theirs []*os.File, err error) {
	defer func() {
		if err != nil {
			closeConns(ours)
			closeFiles(theirs)
		}
	}()
	for range n {
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return ours, theirs, fmt.Errorf("make a socket pair: %w", err)
		}
		theirs = append(theirs, os.NewFile(uintptr(fds[1]), "kernel"))
		f := os.NewFile(uintptr(fds[0]), "nbd")
		c, err := net.FileConn(f)
		f.Close()
		if err != nil {
			return ours, theirs, fmt.Errorf("make a socket pair: %w", err)
		}
		ours = append(ours, c)
	}
	return ours, theirs, nil
}

func closeConns(conns []net.Conn) {
	for _, c := range conns {
		c.Close()
	}
}

func closeFiles(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// poll asks done until it is true, and returns its error of then. When ctx
// ends first it returns the last error it had.
func poll(ctx context.Context, done func() (bool, error)) error {
	for {
		ok, err := done()
		if ok {
			return err
		}
		select {
		case <-ctx.Done():
			return errors.Join(err, ctx.Err())
		case <-time.After(pollEvery):
		}
	}
}
