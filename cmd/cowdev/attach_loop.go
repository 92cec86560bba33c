package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"

	"github.com/urfave/cli/v2"

	"github.com/cowdev/cowdev/attach"
	"github.com/cowdev/cowdev/internal/disk"
)

// attachLoop attaches a loop device over a FUSE file, and serves it until a
// signal finds it unused.
func attachLoop(c *cli.Context, ac attachConfig) (err error) {
	attach.Shield(false)
	view, err := openView(c.Context, c, ac.serve.base, ac.serve.cow, ac.serve.view)
	if err != nil {
		return err
	}
	// From here on a signal, and one that comes twice, must leave nothing behind.
	signals, stop := deviceSignals()
	defer stop()
	var s *attach.State // nil until the device is announced
	defer func() {
		if s != nil {
			err = errors.Join(err, forget(s, err))
		}
	}()
	defer func() { err = errors.Join(err, view.Close()) }()
	if view.device.Size() < attach.DefaultBlockSize {
		return fmt.Errorf("%s: %d bytes, a device has at least one sector of %d", ac.serve.base, view.device.Size(), attach.DefaultBlockSize)
	}
	if err := os.MkdirAll(string(attach.DefaultStates), 0o755); err != nil {
		return err
	}
	dir, err := os.MkdirTemp(string(attach.DefaultStates), fmt.Sprintf(fuseDirOf, os.Getpid())+"*")
	if err != nil {
		return err
	}
	defer os.Remove(dir)
	file, err := attach.MountFuse(view.device, dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, file.Close()) }()
	loop, err := attach.AttachLoop(file.Path(), attach.LoopOptions{
		BlockSize: ac.nbd.BlockSize, ReadOnly: view.device.ReadOnly(), Direct: true,
	})
	if err != nil {
		return err
	}
	// Not held open: the last to close a device writes what the page cache has
	// of it, and a thread of this process that waits for that keeps FUSE from
	// ending when the process is killed; then all wait for ever.
	if err := loop.Release(); err != nil {
		return err
	}
	ac.nbd.Size = view.device.Size()
	told := ac.state(loop.Path(), attach.DriverLoop, view.store.Header().UUID.String())
	told.FuseDir = dir
	end := func() error { return endLoop(loop.Path(), file.Path(), view.device.Release) }
	if err := announce(c, &ac, told); err != nil {
		return errors.Join(err, end())
	}
	s = told
	return holdLoop(c, loop.Path(), end, signals)
}

// fuseDirOf begins the name of the directory that a process mounts its FUSE
// filesystem at; the rest is random.
const fuseDirOf = "fuse-%d-"

// holdLoop waits for a signal that finds the device unused, and has end end it
// then.
func holdLoop(c *cli.Context, device string, end func() error, signals <-chan os.Signal) error {
	for sig := range signals {
		if sig == syscall.SIGUSR2 {
			warn(c, "%s: a loop device cannot be handed over", device)
			continue
		}
		err := end()
		if exitStatus(err) != exitLocked {
			return err
		}
		warn(c, "%s is in use, and would not outlive this process: unmount it first", device)
	}
	return nil
}

// endLoop ends device, over file, by another process, see attachLoop, or fails with
// exitLocked where it is in use. Once it is not it calls release: writes that
// wait for room would wait for ever. Who has the device open without mounting it
// is waited for: all that he writes would be lost.
func endLoop(device, file string, release func()) error {
	cmd := exec.Command(selfExe, "attach-end", "--", device, file)
	cmd.Args[0] = "cowdev"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // signals of a terminal are not for it
	var said bytes.Buffer
	cmd.Stderr = &said
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	if line, _ := bufio.NewReader(out).ReadString('\n'); line != "" {
		release()
	}
	err = cmd.Wait()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		err = statusError{fmt.Errorf("end %s: %w: %s", device, err, bytes.TrimSpace(said.Bytes())), max(exit.ExitCode(), exitFailure)}
	}
	return err
}

// attachEndCommand ends a loop device for the process that serves it.
func attachEndCommand() *cli.Command {
	return &cli.Command{
		Name:      "attach-end",
		Hidden:    true,
		Usage:     "End a loop device that cowdev attach serves",
		ArgsUsage: "DEVICE FILE",
		Action: func(c *cli.Context) error {
			args, err := arguments(c, c.Command.ArgsUsage)
			if err != nil {
				return err
			}
			loop, err := attach.OpenLoop(args[0], args[1])
			if err != nil {
				return err
			}
			if free, err := loop.Reserve(); err != nil {
				return err
			} else if !free {
				return fmt.Errorf("%s: in use: %w", args[0], disk.ErrLocked)
			}
			fmt.Fprintln(c.App.Writer, "reserved")
			return loop.Detach(context.Background())
		},
	}
}

// forget ends what is told of a device that is gone. Where its store was not
// closed in order, who waits for the end is told why.
func forget(s *attach.State, err error) error {
	if err == nil {
		return attach.DefaultStates.Remove(s)
	}
	return attach.DefaultStates.Update(s.Device, func(now *attach.State) {
		if now.SameHolder(s) {
			now.Failure = err.Error()
		}
	})
}
