package main

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cowdev/cowdev/attach"
)

// needMounts skips a test where cowdev mount cannot work.
func needMounts(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	for _, name := range []string{"/dev/fuse", "/dev/loop-control"} {
		f, err := os.OpenFile(name, os.O_RDWR, 0)
		if err != nil {
			t.Skipf("this machine has no usable %s: %v", name, err)
		}
		f.Close()
	}
}

// stateOf returns what is kept of the device of the store at cow, which is
// ended with the test.
func stateOf(t *testing.T, cow string) *attach.State {
	t.Helper()
	s, err := attach.DefaultStates.Find(cow)
	must(t, err)
	t.Cleanup(func() {
		for _, dir := range s.Mounts {
			unix.Unmount(dir, unix.MNT_DETACH)
		}
		if left, err := attach.DefaultStates.Find(cow); err == nil {
			program(t, "", "detach", left.Device).Run()
		}
	})
	return s
}

// promptly runs the program, which must end in the time that commands of a mount
// take when they wait for nothing, and returns its messages.
func promptly(t *testing.T, status int, args ...string) string {
	t.Helper()
	cmd := program(t, "", args...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	start := time.Now()
	cmd.Run()
	if got := cmd.ProcessState.ExitCode(); got != status || time.Since(start) > usableLimit/3 {
		t.Fatalf("cowdev %s: status %d after %v, expected %d\n%s", strings.Join(args, " "), got, time.Since(start), status, &out)
	}
	return out.String()
}

// Two mounts stand at one directory, and the server of the lower one, which is
// of a partition, is dead: each umount takes the upper one of those left.
func TestUmountStack(t *testing.T) {
	needMounts(t)
	lower, upper := newLookFixture(t, true), newLookFixture(t, false)
	dir := filepath.Join(lower.dir, "mnt")
	must(t, os.Mkdir(dir, 0o700))
	promptly(t, exitDone, "mount", "--driver=loop", "--partition=1", lower.base, lower.cow, dir)
	a := stateOf(t, lower.cow)
	promptly(t, exitDone, "attach", "--detach", "--driver=loop", upper.base, upper.cow)
	b := stateOf(t, upper.cow)
	must(t, attach.MountDevice(b.Device, dir, "ext4", ""))
	must(t, attach.DefaultStates.Update(b.Device, func(s *attach.State) { s.Mounts = []string{dir} }))
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	promptly(t, exitFailure, "detach", a.Device) // it is in use, if not itself
	must(t, unix.Kill(a.PID, unix.SIGKILL))
	for a.Alive() {
		time.Sleep(time.Millisecond)
	}
	if got := promptly(t, exitFailure, "doctor"); !strings.Contains(got, a.Device+": mounted at "+dir) || !strings.Contains(got, "unmount first what was mounted there later; then umount -l "+dir) {
		t.Errorf("doctor does not tell where %s is mounted, and under what:\n%s", a.Device, got)
	}

	promptly(t, exitDone, "umount", dir)
	if s, err := attach.DefaultStates.Find(upper.cow); err == nil {
		t.Fatalf("the upper device is still there: %+v", s)
	}
	if s, err := attach.DefaultStates.Find(lower.cow); err != nil || !slices.Contains(s.Mounts, dir) {
		t.Fatalf("the lower mount went with the upper one: %+v, %v", s, err)
	}
	promptly(t, exitDone, "umount", dir)
	if device := attach.MountedAt(dir); device != "" {
		t.Errorf("%s is still mounted", device)
	}
	if s, err := attach.DefaultStates.Find(lower.cow); err == nil {
		t.Errorf("the lower device is still there: %+v", s)
	}
	promptly(t, exitFailure, "umount", dir)
}
