package vm

import (
	"context"
	_ "embed"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

//go:embed guest/lib.sh
var libScript string

//go:embed guest/attach.sh
var attachScript string

// long asks for campaigns rather than what fits into everybody's test run.
var long = os.Getenv("COWDEV_LONG") != ""

// build builds cowdev.
func build(t *testing.T) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	bin := filepath.Join(t.TempDir(), "cowdev")
	cmd := exec.CommandContext(ctx, "go", "build", "-o", bin, "github.com/cowdev/cowdev/cmd/cowdev")
	cmd.WaitDelay = time.Second
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	return bin
}

// write puts text into a file of the host.
func write(t *testing.T, text string) string {
	t.Helper()
	f, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteString(text); err != nil {
		t.Fatal(err)
	}
	return f.Name()
}

// rawDisk makes a sparse file for a disk.
func rawDisk(t *testing.T, size int64) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(name, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(name, size); err != nil {
		t.Fatal(err)
	}
	return name
}

// A report takes the lines of a guest's script as results of this test.
type report struct {
	t       *testing.T
	failed  []string
	passed  int
	skipped int
}

func (r *report) line(line string) {
	switch {
	case strings.HasPrefix(line, "ok "):
		r.passed++
		r.t.Log(line)
	case strings.HasPrefix(line, "skip "):
		r.skipped++
		r.t.Log(line)
	case strings.HasPrefix(line, "not ok "):
		r.failed = append(r.failed, strings.TrimPrefix(line, "not ok "))
		r.t.Log(line)
	default:
		r.t.Log(line)
	}
}

// cowdev works with the kernel's nbd driver: serve with nbd-client, and
// attach, mount, resume, detach, for filesystems that stay mounted while the
// server is killed and replaced. guest/attach.sh has the scenarios.
func TestKernelDevices(t *testing.T) {
	names := []string{
		"nbd_client_ext4", "survive_ext4", "survive_xfs", "mount_umount_merge", "resume", "gone_for_good",
		"name_taken", "first_write_keeps_identity", "partition", "bad_input", "many_devices",
	}
	n := numbers{rounds: 2, attaches: 1, devices: 4, limit: 60, budget: 60}
	limit := guestLimit
	if long {
		names = append(names, "nbd_client_xfs", "nbd_client_btrfs", "nbd_client_vfat")
		n = numbers{rounds: 20, attaches: 100, devices: 10, limit: 3000, budget: 3 * 3600, strict: 1}
		limit = 4 * time.Hour
	}
	if only := os.Getenv("COWDEV_VM_ONLY"); only != "" {
		names = strings.Fields(only)
	}
	r := &report{t: t}
	m := boot(t, limit, Options{
		Files:  map[string]string{"cowdev": build(t), "lib.sh": write(t, libScript), "attach.sh": write(t, attachScript)},
		Disks:  []string{rawDisk(t, 4<<30)},
		Script: n.export() + "exec bash /job/attach.sh " + strings.Join(names, " "),
		Line:   r.line,
	})
	status, err := m.Wait()
	if len(r.failed) > 0 && m.hungry() && !long {
		t.Skipf("machine too busy: the guest had %v of a processor in %v; what failed in it: %q",
			m.CPU().Round(time.Second), time.Since(m.began).Round(time.Second), r.failed)
	}
	for _, f := range r.failed {
		t.Errorf("in the guest: %s", f)
	}
	if m.late() && len(r.failed) == 0 && !long {
		t.Skipf("machine too slow: %d of %d scenarios passed in %v", r.passed, len(names), limit)
	}
	if err != nil || status != 0 || r.passed+r.skipped != len(names) {
		t.Errorf("%d of %d scenarios passed, %d skipped, status %d, %v", r.passed, len(names), r.skipped, status, err)
	}
	if t.Failed() {
		t.Logf("console:\n%s", m.Console())
	}
	t.Logf("%d scenarios passed, %d skipped, %v of processor time", r.passed, r.skipped, m.CPU().Round(time.Second))
}

// numbers are how much a guest's script does, and how long it may take.
type numbers struct {
	rounds   int // kills, and hand-overs, of each server
	attaches int // of each of devices
	devices  int
	limit    int // seconds of a scenario
	budget   int // seconds after which none is begun
	strict   int // 1: a scenario that takes longer than limit has failed
}

func (n numbers) export() string {
	return fmt.Sprintf("export ROUNDS=%d ATTACHES=%d DEVICES=%d LIMIT=%d BUDGET=%d STRICT=%d\n", n.rounds, n.attaches, n.devices, n.limit, n.budget, n.strict)
}
