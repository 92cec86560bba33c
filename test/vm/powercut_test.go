package vm

import (
	"context"
	_ "embed"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

//go:embed guest/powercut.sh
var powercutScript string

// The power of a machine with mounted filesystems on overlays is cut. Their
// stores are not damaged, the filesystems are clean, and every file whose sync
// had returned is there. The stores are looked at by this host, through the
// loop driver.
func TestPowerCut(t *testing.T) {
	cuts, records := 1, 12
	if long {
		cuts, records = 20, 60
	}
	bin := build(t)
	for cut := range cuts {
		t.Run(strconv.Itoa(cut), func(t *testing.T) {
			disks := map[string]string{"ext4": rawDisk(t, 600<<20), "xfs": rawDisk(t, 600<<20)}
			synced := cutPower(t, bin, disks, records*(cut+1)/cuts)
			for fs, disk := range disks {
				survived(t, bin, fs, disk, synced[fs])
			}
		})
	}
}

// cutPower runs the guest until it has synced records files on each disk, cuts
// its power and returns how many it then had.
func cutPower(t *testing.T, bin string, disks map[string]string, records int) map[string]int {
	var mu sync.Mutex
	synced := map[string]int{}
	enough := make(chan struct{})
	once := sync.OnceFunc(func() { close(enough) })
	m := boot(t, cutLimit, Options{
		Files:  map[string]string{"cowdev": bin, "lib.sh": write(t, libScript)},
		Disks:  []string{disks["ext4"], disks["xfs"]},
		Script: powercutScript,
		Line: func(line string) {
			var fs string
			var n int
			if _, err := fmt.Sscanf(line, "synced %s %d", &fs, &n); err != nil {
				t.Log(line)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			synced[fs] = n
			if synced["ext4"] >= records && synced["xfs"] >= records {
				once()
			}
		},
	})
	slow := false
	select {
	case <-enough:
	case <-m.done:
	case <-time.After(cutLimit / 2):
		slow = true // what there is will do
	}
	ended := m.status
	m.Cut()
	mu.Lock()
	defer mu.Unlock()
	t.Logf("power cut after %v synced files, %v of processor time", synced, m.CPU().Round(time.Second))
	switch {
	case (slow || m.late()) && (synced["ext4"] == 0 || synced["xfs"] == 0):
		t.Skipf("machine too slow: no file was synced in %v", cutLimit/2)
	case !slow && (synced["ext4"] < records || synced["xfs"] < records):
		t.Fatalf("the guest ended by itself (status %d)\n%s", ended, m.Console())
	}
	return synced
}

// survived looks at a disk after the cut.
func survived(t *testing.T, bin, fs, disk string, synced int) {
	t.Helper()
	base := rawDisk(t, 320<<20)
	if out, err := run1(t, bin, "check", disk); err != nil {
		t.Errorf("%s: cowdev check: %v\n%s", fs, err, out)
	}
	out, err := run1(t, bin, "attach", "--detach", "--driver=loop", "--accept-base", base, disk)
	if err != nil {
		if os.Geteuid() != 0 || strings.Contains(out, "FUSE") || strings.Contains(out, "loop") {
			t.Skipf("this machine cannot attach by FUSE and loop: %s", out)
		}
		t.Fatalf("%s: attach: %v\n%s", fs, err, out)
	}
	_, device, _ := strings.Cut(out, "ready: ")
	device = strings.TrimSpace(device)
	dir := t.TempDir()
	defer func() {
		if out, err := run1(t, bin, "detach", device); err != nil {
			t.Errorf("%s: detach: %v\n%s", fs, err, out)
		}
	}()
	if out, err := run1(t, "mount", "-t", fs, device, dir); err != nil {
		if strings.Contains(out, "unknown filesystem") {
			t.Skipf("this kernel has no %s: %s", fs, out)
		}
		t.Fatalf("%s: mount: %v\n%s", fs, err, out)
	}
	for n := 1; n <= synced; n++ {
		got, err := os.ReadFile(filepath.Join(dir, fmt.Sprint("record", n)))
		if err != nil || string(got) != sequence(n, 3000) {
			t.Errorf("%s: record%d: %d bytes (%v), expected the %d that were synced", fs, n, len(got), err, len(sequence(n, 3000)))
		}
	}
	if out, err := run1(t, "umount", dir); err != nil {
		t.Fatalf("%s: umount: %v\n%s", fs, err, out)
	}
	check := map[string][]string{"ext4": {"e2fsck", "-fn"}, "xfs": {"xfs_repair", "-n"}}[fs]
	if out, err := run1(t, check[0], append(check[1:], device)...); err != nil {
		t.Errorf("%s: %v is not clean: %v\n%s", fs, check, err, out)
	}
}

// sequence is what seq from to prints.
func sequence(from, to int) string {
	var b strings.Builder
	for n := from; n <= to; n++ {
		fmt.Fprintln(&b, n)
	}
	return b.String()
}

// run1 runs a program of the host to its end.
func run1(t *testing.T, name string, args ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C")
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	return string(out), err
}
