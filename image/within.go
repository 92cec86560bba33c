package image

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Within reports whether the filesystem that holds dir lies on the base: then
// writing there changes the base under the overlay.
func (b *Base) Within(dir string) bool {
	var base, st unix.Stat_t
	if unix.Fstat(int(b.f.File().Fd()), &base) != nil || unix.Stat(dir, &st) != nil {
		return false
	}
	isBase := func(s *unix.Stat_t) bool {
		if b.f.IsDevice() {
			return s.Mode&unix.S_IFMT == unix.S_IFBLK && s.Rdev == base.Rdev
		}
		return s.Dev == base.Dev && s.Ino == base.Ino
	}
	return restsOn(st.Dev, isBase, 16)
}

// restsOn follows the block device dev down: to the disk of a partition, the
// members of an array or a mapping, the file behind a loop device; depth
// bounds how far.
func restsOn(dev uint64, isBase func(*unix.Stat_t) bool, depth int) bool {
	if depth == 0 {
		return false
	}
	if unix.Major(dev) == 0 {
		dev = mountSource(dev) // btrfs and others have a number of their own
		if dev == 0 {
			return false
		}
	}
	if isBase(&unix.Stat_t{Mode: unix.S_IFBLK, Rdev: dev}) {
		return true
	}
	dir := sysBlock(dev)
	if file, err := os.ReadFile(filepath.Join(dir, "loop/backing_file")); err == nil {
		var st unix.Stat_t
		if unix.Stat(strings.TrimSpace(string(file)), &st) == nil {
			return isBase(&st) || restsOn(st.Dev, isBase, depth-1)
		}
	}
	below, _ := filepath.Glob(filepath.Join(dir, "slaves/*/dev"))
	if _, err := os.Stat(filepath.Join(dir, "partition")); err == nil {
		below = append(below, filepath.Join(dir, "../dev"))
	}
	for _, path := range below {
		if next, ok := readDev(path); ok && restsOn(next, isBase, depth-1) {
			return true
		}
	}
	return false
}

// readDev reads a device number such as 254:1 from a file.
func readDev(path string) (uint64, bool) {
	text, err := os.ReadFile(path)
	if err != nil {
		return 0, false
	}
	return parseDev(string(text))
}

func parseDev(s string) (uint64, bool) {
	var major, minor uint32
	if _, err := fmt.Sscanf(s, "%d:%d", &major, &minor); err != nil {
		return 0, false
	}
	return unix.Mkdev(major, minor), true
}

// mountSource returns the block device that a filesystem with an anonymous
// device number was mounted from, or 0.
func mountSource(dev uint64) uint64 {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return 0
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		// 36 35 0:31 / /mnt rw,noatime shared:1 - btrfs /dev/vdb rw
		before, after, ok := strings.Cut(lines.Text(), " - ")
		fields, source := strings.Fields(before), strings.Fields(after)
		if !ok || len(fields) < 3 || len(source) < 2 {
			continue
		}
		var st unix.Stat_t
		if d, ok := parseDev(fields[2]); ok && d == dev && unix.Stat(source[1], &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFBLK {
			return st.Rdev
		}
	}
	return 0
}
