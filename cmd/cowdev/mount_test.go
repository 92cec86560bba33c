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

// mountPlace makes the directory mnt in dir. What is mounted there and
// the devices of the stores end with the test.
func mountPlace(t *testing.T, dir string, stores ...string) string {
	t.Helper()
	at := filepath.Join(dir, "mnt")
	must(t, os.Mkdir(at, 0o700))
	t.Cleanup(func() {
		for attach.MountedAt(at) != "" && unix.Unmount(at, unix.MNT_DETACH) == nil {
		}
		for _, cow := range stores {
			if s, err := attach.DefaultStates.Find(cow); err == nil {
				program(t, "", "detach", s.Device).Run()
			}
		}
	})
	return at
}

// stateOf returns what is kept of the device of the store at cow.
func stateOf(t *testing.T, cow string) *attach.State {
	t.Helper()
	s, err := attach.DefaultStates.Find(cow)
	must(t, err)
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

// A second mount at a directory is refused, and changes nothing.
func TestMountTwice(t *testing.T) {
	needMounts(t)
	x := newLookFixture(t, false)
	other := filepath.Join(x.dir, "other.img")
	dir := mountPlace(t, x.dir, x.cow, other+".cow")
	tool(t, "cp", x.base, other)
	promptly(t, exitDone, "mount", "--driver=loop", x.base, x.cow, dir)
	s := stateOf(t, x.cow)
	link := filepath.Join(x.dir, "link")
	must(t, os.Symlink("mnt", link))
	for _, at := range []string{dir, link} {
		got := promptly(t, exitLocked, "mount", "--driver=loop", other, other+".cow", at)
		if strings.Count(got, "\n") != 1 || !strings.Contains(got, "cowdev umount "+dir) || !strings.Contains(got, s.Device) {
			t.Errorf("a second mount: %q", got)
		}
	}
	if fileExists(other + ".cow") {
		t.Error("the second mount made a store")
	}
	promptly(t, exitDone, "umount", dir)
	promptly(t, exitDone, "mount", "--driver=loop", other, other+".cow", dir)
	promptly(t, exitDone, "umount", link)
}

// Two mounts stand at one directory, and the server of the lower one, which is
// of a partition, is dead: each umount takes the upper one of those left.
func TestUmountStack(t *testing.T) {
	needMounts(t)
	lower, upper := newLookFixture(t, true), newLookFixture(t, false)
	dir := mountPlace(t, lower.dir, lower.cow, upper.cow)
	promptly(t, exitDone, "mount", "--driver=loop", "--partition=1", lower.base, lower.cow, dir)
	a := stateOf(t, lower.cow)
	promptly(t, exitDone, "attach", "--detach", "--driver=loop", upper.base, upper.cow)
	b := stateOf(t, upper.cow)
	must(t, attach.MountDevice(b.Device, dir, "ext4", ""))
	must(t, attach.DefaultStates.Update(b.Device, func(s *attach.State) { s.Mounts = []string{dir} }))
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
