package main

// Devices whose processes are signalled, killed, or come up beside another: by
// loop devices, and by servers without a device where only nbd would do.

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/cowdev/cowdev/attach"
	"github.com/cowdev/cowdev/internal/keeper"
)

// attached attaches base.img with cow.img in dir as a loop device.
func attached(t *testing.T, dir string) *attach.State {
	t.Helper()
	out, err := program(t, dir, "attach", "--driver=loop", "--detach", "base.img", "cow.img").CombinedOutput()
	if err != nil {
		t.Skipf("no loop device over FUSE here: %v: %s", err, out)
	}
	s := stateOf(t, filepath.Join(dir, "cow.img"))
	dropTable(t, s.UUID)
	t.Cleanup(func() {
		if !s.Gone() {
			syscall.Kill(s.PID, syscall.SIGKILL)
			within(t, "the device's process is gone", func() bool { return !s.Alive() })
			removeOrphan(s)
		}
	})
	return s
}

// dropTable removes in the end the live table that a killed server left of the
// store uuid: its next server never comes.
func dropTable(t *testing.T, uuid string) {
	t.Cleanup(func() {
		tables, _ := filepath.Glob("/dev/shm/cowdev-*" + uuid + "*")
		for _, table := range tables {
			os.Remove(table)
		}
	})
}

// expectGone checks that nothing is left of the device of s.
func expectGone(t *testing.T, s *attach.State) {
	t.Helper()
	if !s.Gone() {
		t.Errorf("%s is still there", s.Device)
	}
	if fileExists(s.FuseDir) {
		t.Errorf("%s is still there", s.FuseDir)
	}
	if now, err := attach.DefaultStates.Find(s.COW); err == nil {
		t.Errorf("a state is left: %+v", now)
	}
}

// aboutToGo reports whether the device of s ends once nobody has it open.
func aboutToGo(s *attach.State) bool {
	b, _ := os.ReadFile("/sys/block/" + filepath.Base(s.Device) + "/loop/autoclear")
	return string(b) == "1\n"
}

// A device's process that is signalled again and again, as by several detach at
// once, ends in order all the same.
func TestLoopSignalledAgain(t *testing.T) {
	needMounts(t)
	dir := newBase(t)
	s := attached(t, dir)
	device, err := os.OpenFile(s.Device, os.O_WRONLY, 0)
	must(t, err)
	_, err = device.WriteAt(bytes.Repeat([]byte("cows"), 3<<20), 0)
	must(t, errors.Join(err, device.Close()))
	within(t, "the process has ended", func() bool {
		syscall.Kill(s.PID, syscall.SIGTERM)
		return !s.Alive()
	})
	expectGone(t, s)
	if info := mustRun(t, dir, "info", "cow.img"); strings.Contains(info, "not closed in order") {
		t.Errorf("the store was not closed in order:\n%s", info)
	}
}

// A device's process that is killed while the page cache has much to write to the
// device goes, and so does the device: nobody waits for what only it would answer.
func TestLoopKilledWhileDirty(t *testing.T) {
	needMounts(t)
	for _, ending := range []string{"", "asked", "waiting"} {
		dir := newBase(t)
		s := attached(t, dir)
		device, err := os.OpenFile(s.Device, os.O_WRONLY, 0)
		must(t, err)
		_, err = device.WriteAt(bytes.Repeat([]byte("cows"), 3<<20), 0)
		must(t, err)
		if ending != "" { // who closes it last writes
			must(t, syscall.Kill(s.PID, syscall.SIGTERM))
		}
		if ending == "waiting" { // for us, by a process that outlives the killed one
			within(t, "the device is about to go", func() bool { return aboutToGo(s) })
		}
		must(t, errors.Join(syscall.Kill(s.PID, syscall.SIGKILL), device.Close()))
		within(t, "the process is gone", func() bool { return !fileExists("/proc/" + strconv.Itoa(s.PID)) })
		if now, err := attach.DefaultStates.Find(s.COW); err == nil {
			must(t, removeOrphan(now))
		}
		expectGone(t, s)
	}
}

// Who writes to the device itself, and has not mounted it, loses nothing: detach
// waits until he has closed it.
func TestDetachWaitsForOpen(t *testing.T) {
	needMounts(t)
	dir := newBase(t)
	s := attached(t, dir)
	device, err := os.OpenFile(s.Device, os.O_WRONLY|os.O_SYNC, 0)
	must(t, err)
	detach := program(t, dir, "detach", "cow.img")
	must(t, detach.Start())
	within(t, "the device is about to go", func() bool { return aboutToGo(s) })
	_, err = device.WriteAt([]byte("cows"), 4096)
	must(t, errors.Join(err, device.Close()))
	must(t, detach.Wait())
	expectGone(t, s)
	mustRun(t, dir, "merge", "base.img", "cow.img")
	merged, err := os.ReadFile(filepath.Join(dir, "base.img"))
	must(t, err)
	if string(merged[4096:4100]) != "cows" {
		t.Error("what was written while detach waited is lost")
	}
}

// A log that cannot be opened is a failure that leaves nothing.
func TestAttachWithoutLog(t *testing.T) {
	needMounts(t)
	dir := newBase(t)
	cow := filepath.Join(dir, "cow.img")
	cmd := program(t, dir, "attach", "--driver=loop", "--detach", "--log", filepath.Join(dir, "none", "log"), "base.img", cow)
	out, err := cmd.CombinedOutput()
	if err == nil || strings.Contains(string(out), "ready") || !strings.Contains(string(out), "none/log") {
		t.Errorf("%v: %s", err, out)
	}
	if s, err := attach.DefaultStates.Find(cow); err == nil {
		t.Errorf("a state is left: %+v", s)
	}
}

// Who asked for a device and is gone before it was ready is not left with one.
func TestAttachForNobody(t *testing.T) {
	needMounts(t)
	dir := newBase(t)
	out, in, err := os.Pipe()
	must(t, err)
	out.Close()
	cmd := program(t, dir, "attach", "--driver=loop", "base.img", "cow.img")
	cmd.Env = append(os.Environ(), detachedEnv+"=1")
	cmd.Stdout = in
	err = cmd.Run()
	in.Close()
	if err == nil {
		t.Error("a device was attached for nobody")
	}
	if s, err := attach.DefaultStates.Find(filepath.Join(dir, "cow.img")); err == nil {
		t.Errorf("a state is left: %+v", s)
	}
}

// What is told of a device that ended without its store stays, with the reason;
// detach would say else that all is durable.
func TestEndedNotClosed(t *testing.T) {
	if !alone(t) {
		return
	}
	for err, stays := range map[error]bool{
		nil:                                     false,
		fmt.Errorf("%w: no room", errNotClosed): true,
		fmt.Errorf("%w for 1m0s", keeper.ErrGaveUp): true,
	} {
		s := &attach.State{Device: "/dev/nbd0", Driver: attach.DriverNBD, PID: os.Getpid(), Born: attach.Born(os.Getpid())}
		must(t, attach.DefaultStates.Save(s))
		if got := ended(new(attach.NBD), s, err); !errors.Is(got, err) {
			t.Errorf("%v: ended by %v", err, got)
		}
		now, e := attach.DefaultStates.Find(s.Device)
		if stays != (e == nil && strings.Contains(now.Failure, err.Error())) || !stays && e == nil {
			t.Errorf("%v: told is %+v (%v), expected that it stays: %v", err, now, e, stays)
		}
	}
}

// A device that waits for its store is not given a copy of it.
func TestResumeWantsItsStore(t *testing.T) {
	ac := attachConfig{resume: &attach.State{Device: "/dev/nbd0", Driver: attach.DriverNBD, UUID: "u", Size: 1 << 20, File: "1-2-3-4"}}
	for _, other := range []told{
		{UUID: "u", Size: 1 << 20, File: "1-2-5-6"},
		{UUID: "u", Size: 2 << 20, File: "1-2-3-4"},
		{UUID: "v", Size: 1 << 20, File: "1-2-3-4"},
	} {
		if _, _, err := ac.connect(other); err == nil || !strings.Contains(err.Error(), "another store") {
			t.Errorf("%+v: %v", other, err)
		}
	}
}

// A server that takes over from one that was killed gets the store that was
// served, or none at all: a new one in its place, or a copy, would put other
// bytes under a mounted filesystem.
func TestLauncherWantsItsStore(t *testing.T) {
	for name, replace := range map[string]func(t *testing.T, cow string){
		"removed": func(t *testing.T, cow string) { must(t, os.Remove(cow)) },
		"copied": func(t *testing.T, cow string) {
			tool(t, "cp", cow, cow+".copy")
			must(t, os.Rename(cow+".copy", cow))
		},
		"another": func(t *testing.T, cow string) {
			must(t, os.Remove(cow))
			mustRun(t, filepath.Dir(cow), "create", "base.img", "cow.img")
		},
		"base changed": func(t *testing.T, cow string) {
			base := filepath.Join(filepath.Dir(cow), "base.img")
			must(t, os.WriteFile(base, bytes.Repeat([]byte("esab"), 4<<20), 0o600))
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := newBase(t)
			cow := filepath.Join(dir, "cow.img")
			app := newApp(io.Discard, &messages{})
			ac := attachConfig{flags: []string{"--accept-base=true"}}
			ac.nbd.Connections = 1
			ac.serve.base, ac.serve.cow = filepath.Join(dir, "base.img"), cow
			l := newLauncher(cli.NewContext(app, nil, nil), &ac)
			l.setDevice("/dev/nbd-of-a-test")
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			defer cancel()
			first, told, err := l.begin(ctx)
			must(t, err)
			dropTable(t, told.UUID)
			must(t, syscall.Kill(told.PID, syscall.SIGKILL))
			<-first.Exited
			if err := l.closed(); !errors.Is(err, errNotClosed) {
				t.Errorf("of a server that was killed: %v", err)
			}
			second, err := l.launch(ctx)
			must(t, err)
			second.Stop()
			<-second.Exited
			must(t, l.closed())

			replace(t, cow)
			before := fileExists(cow)
			if third, err := l.launch(ctx); err == nil {
				third.Kill()
				<-third.Exited
				t.Error("a server came up over another store")
			}
			if fileExists(cow) != before {
				t.Error("a store was made in the place of the one that was served")
			}
		})
	}
}

// Where a program lies under cowdev's name that neither serves nor fails, the
// one of before serves while there is time.
func TestLauncherLeavesProgramThatHangs(t *testing.T) {
	dir := newBase(t)
	app := newApp(io.Discard, &messages{})
	var ac attachConfig
	ac.nbd.Connections = 1
	ac.serve.base, ac.serve.cow = filepath.Join(dir, "base.img"), filepath.Join(dir, "cow.img")
	l := newLauncher(cli.NewContext(app, nil, nil), &ac)
	l.setDevice("/dev/nbd-of-a-test")
	first, _, err := l.begin(context.Background())
	must(t, err)
	first.Stop()
	<-first.Exited
	l.exe = filepath.Join(dir, "hangs")
	must(t, os.WriteFile(l.exe, []byte("#!/bin/sh\nexec sleep 100\n"), 0o700))
	ctx, cancel := context.WithTimeout(context.Background(), 6*time.Second)
	defer cancel()
	second, err := l.launch(ctx)
	must(t, err)
	second.Stop()
	<-second.Exited
	must(t, l.closed())
}
