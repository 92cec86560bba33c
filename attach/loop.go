package attach

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Flags of a loop device (linux/loop.h).
const (
	loReadOnly  = 1
	loAutoclear = 4
	loDirectIO  = 16
)

// LoopOptions say how a file becomes a loop device.
type LoopOptions struct {
	Off, N    int64 // the part of the file in bytes; N 0 is all of the rest
	BlockSize int   // 0 is 512
	ReadOnly  bool
	// Autoclear lets the device go with its last user, the mount on it.
	Autoclear bool
	// Direct passes the page cache of the file by: its filesystem's own
	// cache is the only one.
	Direct bool
}

// A Loop is an attached loop device.
type Loop struct {
	name string
	back string   // LoopBack of it
	hold *os.File // an autoclear device would go at once without
}

// AttachLoop makes a loop device of the file or device at path. The caller
// calls Detach, or Release for one with Autoclear once it is in use.
func AttachLoop(path string, o LoopOptions) (*Loop, error) {
	mode := os.O_RDWR
	if o.ReadOnly {
		mode = os.O_RDONLY
	}
	back, err := os.OpenFile(path, mode, 0)
	if err != nil {
		return nil, err
	}
	defer back.Close()
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("loop devices: %w", err)
	}
	defer control.Close()
	cfg := o.config(back)
	for {
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, fmt.Errorf("find a free loop device: %w", err)
		}
		l, err := configureLoop("/dev/loop"+strconv.Itoa(n), cfg)
		if errors.Is(err, unix.EBUSY) {
			continue // somebody else was faster
		}
		return l, err
	}
}

// OpenLoop returns the loop device name, which has the file back behind it.
func OpenLoop(name, back string) (*Loop, error) {
	dev, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	if got := loopBack(dev); got != clip(back) {
		dev.Close()
		return nil, fmt.Errorf("%s: has %q behind it, expected %s", name, got, back)
	}
	return &Loop{name, clip(back), dev}, nil
}

// Path returns the device's name.
func (l *Loop) Path() string { return l.name }

// Release gives up this process's hold on the device, which stays attached
// unless it is Autoclear and nobody else holds it.
func (l *Loop) Release() error { return l.hold.Close() }

// Reserve reports whether nobody uses the device in the sense of Busy. Nobody
// can mount it from then on, until Detach.
func (l *Loop) Reserve() (bool, error) {
	if busy, err := Busy(l.name); busy || err != nil {
		return false, err
	}
	hold, err := os.OpenFile(l.name, os.O_RDONLY|unix.O_EXCL, 0)
	if errors.Is(err, unix.EBUSY) {
		return false, nil
	} else if err != nil {
		return false, err
	}
	l.hold.Close()
	l.hold = hold
	return true, nil
}

// Detach ends the device and waits until it is free, as DetachLoop does.
func (l *Loop) Detach(ctx context.Context) error {
	// By what is held: the name could be that of another device afterwards.
	err := clearLoop(l.hold)
	l.hold.Close()
	if err != nil {
		return err
	}
	return waitLoop(ctx, l.name, l.back)
}

func (o LoopOptions) config(back *os.File) *unix.LoopConfig {
	cfg := &unix.LoopConfig{Fd: uint32(back.Fd()), Size: uint32(o.BlockSize)}
	cfg.Info.Offset, cfg.Info.Sizelimit = uint64(o.Off), uint64(o.N)
	copy(cfg.Info.File_name[:len(cfg.Info.File_name)-1], back.Name())
	for flag, set := range map[uint32]bool{loReadOnly: o.ReadOnly, loAutoclear: o.Autoclear, loDirectIO: o.Direct} {
		if set {
			cfg.Info.Flags |= flag
		}
	}
	return cfg
}

func configureLoop(name string, cfg *unix.LoopConfig) (*Loop, error) {
	dev, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	if err := unix.IoctlLoopConfigure(int(dev.Fd()), cfg); err != nil {
		dev.Close()
		return nil, fmt.Errorf("configure %s: %w", name, err)
	}
	return &Loop{name, unix.ByteSliceToString(cfg.Info.File_name[:]), dev}, nil
}

// DetachLoop ends a loop device that has the file back behind it, and waits
// until it is free or another's. Who has it open still keeps it, until ctx ends
// the wait.
func DetachLoop(ctx context.Context, name, back string) error {
	dev, err := os.Open(name)
	if err != nil {
		return err
	}
	if loopBack(dev) == clip(back) { // which it is as long as dev is open
		err = clearLoop(dev)
	}
	dev.Close()
	if err != nil {
		return err
	}
	return waitLoop(ctx, name, clip(back))
}

func clearLoop(dev *os.File) error {
	if err := unix.IoctlSetInt(int(dev.Fd()), unix.LOOP_CLR_FD, 0); err != nil && !errors.Is(err, unix.ENXIO) {
		return fmt.Errorf("detach %s: %w", dev.Name(), err)
	}
	return nil
}

// waitLoop waits until back is not behind the loop device name any more. A free
// device may be somebody else's at once.
func waitLoop(ctx context.Context, name, back string) error {
	return poll(ctx, func() (bool, error) {
		if LoopBack(name) == back {
			return false, fmt.Errorf("%s: still in use, by whoever has it open", name)
		}
		return true, nil
	})
}

// clip cuts a name as the kernel does in what it tells of a loop device.
func clip(name string) string { return name[:min(len(name), unix.LO_NAME_SIZE-1)] }

// LoopBack returns the first 63 bytes of the name of the file behind a loop
// device, "" where there is none.
func LoopBack(name string) string {
	dev, err := os.Open(name)
	if err != nil {
		return ""
	}
	defer dev.Close()
	return loopBack(dev)
}

func loopBack(dev *os.File) string {
	info, err := unix.IoctlLoopGetStatus64(int(dev.Fd()))
	if err != nil {
		return ""
	}
	return unix.ByteSliceToString(info.File_name[:])
}

// LoopsOn returns the loop devices over a file or device. It asks sysfs:
// nothing has to be opened, which a dead device may not answer.
func LoopsOn(device string) (loops []string) {
	names, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	for _, name := range names {
		if b, _ := os.ReadFile(name); strings.TrimSuffix(string(b), "\n") == device {
			loops = append(loops, "/dev/"+strings.Split(name, "/")[3])
		}
	}
	return loops
}
