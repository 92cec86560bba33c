package main

import (
	"context"
	"fmt"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cowdev/cowdev/image"
	"github.com/cowdev/cowdev/nbdserver"
)

// idleFor is how long no request has come when a server counts as idle.
const idleFor = 200 * time.Millisecond

// learnDigest computes the base's full digest, at idle priority, and records
// it in the store. It waits for wait before each few megabytes.
func (v *view) learnDigest(ctx context.Context, wait func(context.Context) error) error {
	// The thread keeps its low priority and ends with the goroutine.
	runtime.LockOSThread()
	setIdlePriority()

	before, err := v.base.Identify(image.DigestOff)
	if err != nil {
		return err
	}
	full, err := v.base.FullDigest(ctx, image.FullOptions{Wait: wait, Gentle: true})
	if err != nil {
		return err
	}
	after, err := v.base.Identify(image.DigestOff)
	if err != nil {
		return err
	}
	if before.Stamp != after.Stamp || before.Stamp != v.identity.Stamp {
		return fmt.Errorf("%w: it was written while it was served", image.ErrWrongBase)
	}
	id := v.identity
	id.Full = full
	return v.store.SetBase(id.Encode())
}

// setIdlePriority lets every other thread go first, at the processor and at
// the disk.
func setIdlePriority() {
	const (
		whoProcess = 1       // IOPRIO_WHO_PROCESS: this thread
		idleClass  = 3 << 13 // IOPRIO_CLASS_IDLE
	)
	_, _, _ = unix.Syscall(unix.SYS_IOPRIO_SET, whoProcess, 0, idleClass)
	_ = unix.Setpriority(unix.PRIO_PROCESS, unix.Gettid(), 19)
}

// idleWaiter returns a function that waits until the server has had no request
// for a while, and does not wait while none has come since it last returned.
func idleWaiter(server *nbdserver.Server) func(context.Context) error {
	seen, idle := server.Stats().Requests, false
	return func(ctx context.Context) error {
		for {
			if now := server.Stats().Requests; now != seen {
				seen, idle = now, false
			} else if idle {
				return ctx.Err()
			}
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(idleFor):
			}
			idle = seen == server.Stats().Requests
		}
	}
}
