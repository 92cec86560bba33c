package main

import (
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// processors is how much of all processors was used, since the boot.
type processors struct {
	at   time.Time
	busy time.Duration // of all together
}

// now reads /proc/stat: all but idle, waiting for a disk, and guests, which
// count as users already.
func processorsNow() processors {
	p := processors{at: time.Now()}
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return p
	}
	var user, nice, system, idle, wait, irq, soft, stolen int64
	fmt.Sscanf(string(b), "cpu %d %d %d %d %d %d %d %d", &user, &nice, &system, &idle, &wait, &irq, &soft, &stolen)
	const tick = time.Second / 100
	p.busy = time.Duration(user+nice+system+irq+soft+stolen) * tick
	return p
}

// others returns which part of the processors was used since p, but for ours.
func (p processors) others(ours time.Duration) float64 {
	n := processorsNow()
	all := n.at.Sub(p.at) * time.Duration(runtime.NumCPU())
	return max(0, float64(n.busy-p.busy-ours)/float64(all))
}

// awaitQuiet waits until others use little of the processors, but no longer
// than patience.
func awaitQuiet(limit float64, patience time.Duration) {
	for began := time.Now(); time.Since(began) < patience; {
		p := processorsNow()
		time.Sleep(100 * time.Millisecond)
		if p.others(0) <= limit {
			return
		}
	}
}

// diskWritten returns the bytes written to all disks since the boot, by
// everybody.
func diskWritten() int64 {
	b, _ := os.ReadFile("/proc/diskstats")
	var bytes int64
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) < 10 || strings.HasPrefix(f[2], "loop") || strings.HasPrefix(f[2], "zram") || strings.HasPrefix(f[2], "ram") {
			continue
		}
		sectors, _ := strconv.ParseInt(f[9], 10, 64)
		bytes += sectors * 512
	}
	return bytes
}

// raisePriority lets this process and those that it starts go first, where it
// may.
func raisePriority() { _ = unix.Setpriority(unix.PRIO_PROCESS, 0, -20) }

// dropCache writes a file's pages out and lets go of them.
func dropCache(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Fdatasync(int(f.Fd())); err != nil {
		return err
	}
	return unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
}

// warmCache reads a file.
func warmCache(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	p := make([]byte, mib)
	for {
		if n, err := f.Read(p); n == 0 {
			if err.Error() == "EOF" {
				return nil
			}
			return err
		}
	}
}

// describeMachine says what the results were measured on.
func describeMachine(dir string) []string {
	var u unix.Utsname
	_ = unix.Uname(&u)
	var fs unix.Statfs_t
	_ = unix.Statfs(dir, &fs)
	return []string{
		fmt.Sprintf("%d processors: %s", runtime.NumCPU(), firstField("/proc/cpuinfo", "model name")),
		"memory: " + firstField("/proc/meminfo", "MemTotal"),
		"kernel " + unix.ByteSliceToString(u.Release[:]) + ", files on " + filesystem(fs.Type),
		runtime.Version(),
	}
}

func filesystem(magic int64) string {
	names := map[int64]string{unix.EXT4_SUPER_MAGIC: "ext4", unix.XFS_SUPER_MAGIC: "xfs", unix.BTRFS_SUPER_MAGIC: "btrfs", unix.TMPFS_MAGIC: "tmpfs"}
	if n := names[magic]; n != "" {
		return n
	}
	return fmt.Sprintf("filesystem %#x", magic)
}

func firstField(path, key string) string {
	b, _ := os.ReadFile(path)
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, key); ok {
			return strings.TrimSpace(strings.TrimLeft(rest, " \t:"))
		}
	}
	return "unknown"
}
