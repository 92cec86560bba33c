package main

// What `cowdev doctor` finds, and mends with --fix alone. It looks at the whole
// machine, where other tests and users have servers and devices; so these tests
// run in namespaces of their own, with a /run, a /dev/shm and processes that
// nobody else sees.

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/cowdev/cowdev/attach"
	"github.com/cowdev/cowdev/exception"
)

// aloneEnv tells a test that it runs in namespaces of its own.
const aloneEnv = "COWDEV_TEST_ALONE"

// aloneScript makes a new /run and /dev/shm, and runs the test's binary from
// there. Nothing may load a driver into the kernel.
const aloneScript = `set -e
mount -t tmpfs tmpfs /run
mkdir /run/self /run/tmp
cp "$0" /run/self/cowdev-test
ln -s /bin/false /run/self/modprobe
mount -t tmpfs tmpfs /dev/shm
PATH=/run/self:$PATH TMPDIR=/run/tmp exec /run/self/cowdev-test "$@"`

// alone reports whether the test runs in namespaces of its own; else it has
// it run there, and is done.
func alone(t *testing.T) bool {
	t.Helper()
	if os.Getenv(aloneEnv) != "" {
		return true
	}
	if os.Geteuid() != 0 {
		t.Skip("namespaces and loop devices need root")
	}
	if fileExists("/sys/module/nbd") {
		t.Skip("this kernel has nbd, and doctor would mend devices of others")
	}
	namespaces := []string{"unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"}
	if out, err := system(append(namespaces, "true")...); err != nil {
		t.Skipf("no namespaces here: %v: %s", err, out)
	}
	self, err := os.Executable()
	must(t, err)
	t.Setenv(aloneEnv, "1")
	out, err := system(append(namespaces, "sh", "-c", aloneScript, self, "-test.v", "-test.run", "^"+t.Name()+"$")...)
	switch {
	case err != nil:
		t.Fatalf("%v\n%s", err, out)
	case strings.Contains(out, "--- SKIP"):
		t.Skip(out)
	case !strings.Contains(out, "--- PASS: "+t.Name()):
		t.Fatalf("the test did not run:\n%s", out)
	}
	return false
}

// examine runs doctor over dir and returns what it found, but for what is good
// to know and no fault, and its exit status.
func examine(t *testing.T, dir string, flags ...string) (faults []finding, status int) {
	t.Helper()
	cmd := program(t, dir, append([]string{"doctor", "--json", dir}, flags...)...)
	var said bytes.Buffer
	cmd.Stderr = &said
	out, err := cmd.Output()
	if exit := (&exec.ExitError{}); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	var all []finding
	if err := json.Unmarshal(out, &all); err != nil {
		t.Fatalf("doctor says %q, and on stderr %q: %v", out, &said, err)
	}
	for _, f := range all {
		if !f.Note {
			faults = append(faults, f)
		}
	}
	return faults, cmd.ProcessState.ExitCode()
}

// expectFaults examines dir: the objects of faults, in order, each with a part
// of its problem, and which are fixed.
func expectFaults(t *testing.T, dir string, flags []string, status int, want ...finding) {
	t.Helper()
	got, gotStatus := examine(t, dir, flags...)
	ok := len(got) == len(want) && gotStatus == status
	for i := 0; ok && i < len(want); i++ {
		ok = got[i].Object == want[i].Object && strings.Contains(got[i].Problem, want[i].Problem) &&
			got[i].Fixed == want[i].Fixed && got[i].Failure == ""
	}
	if !ok {
		t.Fatalf("doctor %v: status %d, expected %d; found\n%+v\nexpected\n%+v", flags, gotStatus, status, got, want)
	}
}

// expectMended examines dir, where faults are that doctor can mend: it tells of
// them, does nothing, mends them with --fix, and then finds left alone.
func expectMended(t *testing.T, dir string, faults []finding, left ...finding) {
	t.Helper()
	status := func(faults []finding) int { return min(len(faults), exitFailure) }
	before := machine(t, dir)
	expectFaults(t, dir, nil, status(faults), faults...)
	if after := machine(t, dir); after != before {
		t.Fatalf("doctor without --fix changed the machine: before\n%s\nafter\n%s", before, after)
	}
	mended := append([]finding{}, faults...)
	for i := range mended {
		mended[i].Fixed = !slices.ContainsFunc(left, func(f finding) bool { return f.Object == faults[i].Object })
	}
	expectFaults(t, dir, []string{"--fix"}, status(left), mended...)
	expectFaults(t, dir, nil, status(left), left...)
}

// machine tells what there is that doctor could change: files with their
// contents, and mounts.
func machine(t *testing.T, dir string) string {
	t.Helper()
	var b strings.Builder
	for _, root := range []string{dir, "/dev/shm", string(attach.DefaultStates)} {
		err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if err != nil { // a FUSE mount without its server
				b.WriteString(path + " " + err.Error() + "\n")
				return nil
			}
			b.WriteString(path + " " + d.Type().String())
			if d.Type().IsRegular() {
				b.WriteString(" " + digestOf(t, path))
			}
			b.WriteString("\n")
			return nil
		})
		must(t, err)
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	must(t, err)
	own := strings.LastIndex(string(mounts), " /run tmpfs ") // those before are the host's, and come and go
	return b.String() + string(mounts[max(own, 0):])
}

// kill is kill -9 of a server of startServer.
func kill(t *testing.T, server *exec.Cmd) {
	t.Helper()
	must(t, server.Process.Kill())
	server.Wait()
}

// newBase writes base.img, and returns its directory.
func newBase(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	must(t, os.WriteFile(filepath.Join(dir, "base.img"), bytes.Repeat([]byte("base"), 4<<20), 0o600))
	return dir
}

// Servers that were killed leave a socket each, and writes; beside them stands
// one that lives.
func TestDoctorMendsSockets(t *testing.T) {
	if !alone(t) {
		return
	}
	dir := newBase(t)
	cow, busy := filepath.Join(dir, "cow.img"), filepath.Join(dir, "busy.sock")
	kill(t, startServer(t, dir))
	other, err := net.Listen("unix", filepath.Join(dir, "other.sock"))
	must(t, err)
	other.(*net.UnixListener).SetUnlinkOnClose(false)
	must(t, other.Close())
	living, err := net.Listen("unix", busy)
	must(t, err)
	defer living.Close()

	unsaved := finding{Object: cow, Problem: "did not make durable before it died"}
	expectMended(t, dir, []finding{
		unsaved,
		{Object: cow + ".sock", Problem: "nobody listens"},
		{Object: filepath.Join(dir, "other.sock"), Problem: "nobody listens"},
	}, unsaved)
	if fileExists(cow+".sock") || fileExists(filepath.Join(dir, "other.sock")) || !fileExists(busy) {
		t.Error("the sockets of the dead should be gone, and that of the living be there")
	}

	server := startServer(t, dir) // as it says
	must(t, server.Process.Signal(syscall.SIGTERM))
	must(t, server.Wait())
	expectFaults(t, dir, nil, exitDone)
}

// A loop device whose process was killed is ended, and its store closed with
// all that was acknowledged.
func TestDoctorMendsDeadDevice(t *testing.T) {
	if !alone(t) {
		return
	}
	dir := newBase(t)
	cmd := program(t, dir, "attach", "--driver=loop", "--detach", "base.img", "cow.img")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Skipf("no loop device over FUSE here: %v: %s", err, out)
	}
	s, err := attach.DefaultStates.Find(filepath.Join(dir, "cow.img"))
	must(t, err)
	// Loop devices are the whole machine's: a free one may be another's at once.
	ours := func() bool { return !s.Gone() }
	if !ours() {
		t.Fatalf("%s is not over %s", s.Device, s.FuseDir)
	}
	t.Cleanup(func() {
		if ours() { // the namespaces end, the device would not
			syscall.Kill(s.PID, syscall.SIGKILL)
			system("losetup", "--detach", s.Device)
		}
	})
	device, err := os.OpenFile(s.Device, os.O_WRONLY|os.O_SYNC, 0)
	must(t, err)
	_, err = device.WriteAt(bytes.Repeat([]byte("cows"), 1024), 1<<20)
	must(t, errors.Join(err, device.Close()))
	expectFaults(t, dir, nil, exitDone)

	must(t, syscall.Kill(s.PID, syscall.SIGKILL))
	within(t, "the device's process is gone", func() bool { return !s.Alive() })
	within(t, "its filesystem is dead, not dying", func() bool {
		_, err := os.Stat(filepath.Join(s.FuseDir, "x"))
		return errors.Is(err, syscall.ENOTCONN)
	})
	expectMended(t, dir, []finding{{Object: s.Device, Problem: "which served it, is gone"}})
	if ours() {
		t.Errorf("%s is still there", s.Device)
	}
	if left, _ := filepath.Glob(string(attach.DefaultStates) + "/*"); len(left) > 0 {
		t.Errorf("%v are left", left)
	}
	if info := mustRun(t, dir, "info", "cow.img"); strings.Contains(info, "not closed in order") {
		t.Errorf("the store was not closed in order:\n%s", info)
	}
	mustRun(t, dir, "merge", "base.img", "cow.img")
	merged, err := os.ReadFile(filepath.Join(dir, "base.img"))
	must(t, err)
	if !bytes.Equal(merged[1<<20:][:4096], bytes.Repeat([]byte("cows"), 1024)) {
		t.Error("what was written to the device is lost")
	}
}

// What tells of devices that are gone is forgotten, and what FUSE servers left
// removed.
func TestDoctorMendsLeftovers(t *testing.T) {
	if !alone(t) {
		return
	}
	dir := newBase(t)
	mustRun(t, dir, "create", "base.img", "cow.img")
	gone := exec.Command("true")
	must(t, gone.Run())
	must(t, attach.DefaultStates.Save(&attach.State{
		Device: "/dev/nbd5", Driver: attach.DriverNBD, PID: gone.Process.Pid, COW: filepath.Join(dir, "cow.img"),
	}))
	left := filepath.Join(string(attach.DefaultStates), "fuse-1")
	must(t, os.Mkdir(left, 0o700))
	living := filepath.Join(string(attach.DefaultStates), fmt.Sprintf(fuseDirOf, os.Getpid())+"1")
	must(t, os.Mkdir(living, 0o700)) // of a process that is about to attach a device
	must(t, syscall.Mount("left", left, "tmpfs", 0, ""))
	expectMended(t, dir, []finding{
		{Object: "/dev/nbd5", Problem: "is gone, and so is the device"},
		{Object: left, Problem: "left by a cowdev that is gone"},
	})
	if names, _ := filepath.Glob(string(attach.DefaultStates) + "/*"); !slices.Equal(names, []string{living}) {
		t.Errorf("%v are left, expected %s", names, living)
	}
}

// A device that is gone, and whose server could not close the store, is not
// forgotten before somebody has.
func TestDoctorClosesStore(t *testing.T) {
	if !alone(t) {
		return
	}
	dir := newBase(t)
	cow := filepath.Join(dir, "cow.img")
	server := startServer(t, dir)
	kill(t, server)
	must(t, os.Remove(cow+".sock"))
	store, err := lookAt(cow)
	must(t, err)
	must(t, attach.DefaultStates.Save(&attach.State{
		Device: "/dev/nbd5", Driver: attach.DriverNBD, PID: server.Process.Pid, UUID: store.UUID,
		Base: filepath.Join(dir, "base.img"), COW: cow, Failure: "its server was killed",
	}))
	expectMended(t, dir, []finding{{Object: "/dev/nbd5", Problem: "is gone: its server was killed"}})
	if info := mustRun(t, dir, "info", "cow.img"); strings.Contains(info, "not closed in order") {
		t.Errorf("the store was not closed in order:\n%s", info)
	}
}

// An interrupted merge is the user's to finish, by the command that is told:
// base and store are as good meanwhile, and it may take hours.
func TestDoctorTellsHalfMerged(t *testing.T) {
	if !alone(t) {
		return
	}
	dir := t.TempDir()
	small := filepath.Join(dir, "small")
	must(t, os.Mkdir(small, 0o700))
	must(t, syscall.Mount("small", small, "tmpfs", 0, "size=4m"))
	t.Cleanup(func() { syscall.Unmount(small, syscall.MNT_DETACH) })
	base, cow := filepath.Join(small, "base.img"), filepath.Join(dir, "cow.img")
	must(t, os.WriteFile(base, nil, 0o600))
	must(t, os.Truncate(base, 16<<20))
	must(t, os.Symlink(base, filepath.Join(dir, "base.img"))) // for startServer
	server := startServer(t, dir)
	c := goServer(t, dir)
	_, err := c.WriteAt(bytes.Repeat([]byte("cows"), 2<<20), 1<<20)
	must(t, err)
	must(t, c.Disconnect())
	must(t, server.Process.Signal(syscall.SIGTERM))
	must(t, server.Wait())
	merge := program(t, dir, "merge", base, cow)
	if merge.Run(); merge.ProcessState.ExitCode() != exitNoSpace {
		t.Fatalf("merge without room: %v, expected status %d", merge.ProcessState, exitNoSpace)
	}

	half := finding{Object: cow, Problem: "half merged"}
	expectMended(t, dir, []finding{half}, half)
	faults, _ := examine(t, dir)
	command, ok := strings.CutSuffix(faults[0].Cure, " finishes it")
	if !ok {
		t.Fatalf("no command is told: %s", faults[0].Cure)
	}
	must(t, syscall.Mount("small", small, "tmpfs", syscall.MS_REMOUNT, "size=64m"))
	if out, err := system("sh", "-c", command); err != nil {
		t.Fatalf("%s: %v\n%s", command, err, out)
	}
	expectFaults(t, dir, nil, exitDone)
}

// Live tables that many servers left are all named when that is asked for; those
// that a process uses are none of them.
func TestDoctorLiveTables(t *testing.T) {
	if !alone(t) {
		return
	}
	const n = 100
	var left []string
	for range n + 1 {
		var u exception.UUID
		for i := range u {
			u[i] = byte(rand.Uint32())
		}
		name := exception.Shared{}.Path(u)
		must(t, os.WriteFile(name, make([]byte, os.Getpagesize()), 0o600))
		left = append(left, name)
	}
	prefix := strings.TrimSuffix(exception.Shared{}.Path(exception.UUID{}), exception.UUID{}.String())
	inUse := left[n]
	f, err := os.Open(inUse)
	must(t, err)
	defer f.Close()
	page, err := syscall.Mmap(int(f.Fd()), 0, os.Getpagesize(), syscall.PROT_READ, syscall.MAP_SHARED)
	must(t, err)
	defer syscall.Munmap(page)

	doctor := func(args ...string) string {
		var out bytes.Buffer
		run(append([]string{"cowdev", "doctor"}, args...), &out, io.Discard)
		return out.String()
	}
	short := doctor()
	if !strings.Contains(short, "more such (--verbose names them)") || strings.Count(short, prefix) != 1 {
		t.Errorf("doctor says of %d live tables:\n%s", n, short)
	}
	var findings []finding
	must(t, json.Unmarshal([]byte(doctor("--json")), &findings))
	named := map[string]bool{}
	for _, f := range findings {
		named[f.Object] = true
	}
	verbose := doctor("--verbose")
	for _, name := range left[:n] {
		if !named[name] || !strings.Contains(verbose, name+": ") {
			t.Fatalf("%s: named by --json: %v, by --verbose: %v", name, named[name], strings.Contains(verbose, name+": "))
		}
	}
	if named[inUse] || strings.Contains(verbose, inUse) {
		t.Errorf("%s is called left, and is in use", inUse)
	}
}
