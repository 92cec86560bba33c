package attach

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// mountFlags are the options that mount(2) takes as flags; all others are the
// filesystem's own.
var mountFlags = map[string]uintptr{
	"ro": unix.MS_RDONLY, "nosuid": unix.MS_NOSUID, "nodev": unix.MS_NODEV, "noexec": unix.MS_NOEXEC,
	"sync": unix.MS_SYNCHRONOUS, "dirsync": unix.MS_DIRSYNC, "noatime": unix.MS_NOATIME,
	"nodiratime": unix.MS_NODIRATIME, "relatime": unix.MS_RELATIME, "strictatime": unix.MS_STRICTATIME,
	"lazytime": unix.MS_LAZYTIME, "silent": unix.MS_SILENT,
	"rw": 0, "suid": 0, "dev": 0, "exec": 0, "async": 0, "atime": 0, "defaults": 0,
}

// MountDevice mounts device at dir. Without a type the filesystem is recognised
// by its own mark. The options are mount(8)'s, comma separated.
func MountDevice(device, dir, fstype, options string) error {
	if fstype == "" {
		var err error
		if fstype, err = recognise(device); err != nil {
			return err
		}
	}
	var flags uintptr
	var data []string
	for _, o := range strings.Split(options, ",") {
		if f, ok := mountFlags[o]; ok {
			flags |= f
		} else if o != "" {
			data = append(data, o)
		}
	}
	if err := unix.Mount(device, dir, fstype, flags, strings.Join(data, ",")); err != nil {
		return fmt.Errorf("mount %s at %s as %s: %w", device, dir, fstype, err)
	}
	return nil
}

// Unmount unmounts what is mounted at dir.
func Unmount(dir string) error {
	if err := unix.Unmount(dir, 0); err != nil {
		return fmt.Errorf("unmount %s: %w", dir, err)
	}
	return nil
}

// marks are how filesystems are told apart, in the order in which they are
// looked for.
var marks = []struct {
	fstype string
	off    int64
	mark   string
}{
	{"xfs", 0, "XFSB"},
	{"squashfs", 0, "hsqs"},
	{"btrfs", 0x10040, "_BHRfS_M"},
	{"ext4", 0x438, "\x53\xef"},
	{"erofs", 0x400, "\xe2\xe1\xf5\xe0"},
	{"f2fs", 0x400, "\x10\x20\xf5\xf2"},
	{"vfat", 0x52, "FAT32"},
	{"vfat", 0x36, "FAT"},
	{"exfat", 3, "EXFAT   "},
	{"ntfs3", 3, "NTFS    "},
	{"iso9660", 0x8001, "CD001"},
}

// recognise returns the type of the filesystem on a device.
func recognise(device string) (string, error) {
	f, err := os.Open(device)
	if err != nil {
		return "", err
	}
	defer f.Close()
	for _, m := range marks {
		got := make([]byte, len(m.mark))
		if _, err := f.ReadAt(got, m.off); err == nil && bytes.Equal(got, []byte(m.mark)) {
			return m.fstype, nil
		}
	}
	return "", fmt.Errorf("%s: no filesystem that is known here; --partition N for one of a partition table, --type for another", device)
}

// MountedAt returns the device that is mounted at dir last, "" where none is.
func MountedAt(dir string) (device string) {
	dir, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return ""
	}
	if dir, err = filepath.Abs(dir); err != nil {
		return ""
	}
	eachMount(func(dev, at string) {
		if at == dir {
			device = dev
		}
	})
	return device
}

// MountOf returns a directory at which device is mounted, or a part of it that
// is a loop device; "" where it is not.
func MountOf(device string) (dir string) {
	of := withLoops(device)
	eachMount(func(dev, at string) {
		if slices.Contains(of, dev) {
			dir = at
		}
	})
	return dir
}

// withLoops returns device, and the loop devices on it.
func withLoops(device string) []string { return append(LoopsOn(device), device) }

// eachMount goes through the kernel's table of mounts, oldest first.
func eachMount(visit func(device, dir string)) {
	table, _ := os.ReadFile("/proc/self/mounts")
	for _, line := range strings.Split(string(table), "\n") {
		if f := strings.Fields(line); len(f) > 1 {
			visit(unescape.Replace(f[0]), unescape.Replace(f[1]))
		}
	}
}

// unescape undoes what the kernel does to names in its table of mounts.
var unescape = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
