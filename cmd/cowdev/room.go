package main

import (
	"context"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cowdev/cowdev/exception"
)

// roomMarks are the shares of a filesystem, in percent, of which a server
// warns when no more than that is left for a store that can still grow.
var roomMarks = []int64{10, 5, 1}

// roomPoll is how often a server looks.
const roomPoll = 5 * time.Second

// room is what the filesystem of a store has left, in bytes.
type room struct {
	Free  int64 `json:"free-bytes"`  // on the filesystem, for who runs this
	Total int64 `json:"total-bytes"` // of the filesystem
	Need  int64 `json:"need-bytes"`  // what the store may still come to take
}

// roomFor looks at the filesystem of the store at path, which has taken what
// u says of a device of deviceSize bytes.
func roomFor(path string, deviceSize int64, u usage) (room, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return room{}, fmt.Errorf("room for %s: %w", path, err)
	}
	return room{
		Free:  int64(st.Bavail) * st.Bsize,
		Total: int64(st.Blocks) * st.Bsize,
		Need:  max(0, deviceSize-u.stored),
	}, nil
}

// mark returns the lowest of roomMarks that the room has come down to, or 0
// where there is enough: for all that the store may need, or for a while. A
// filesystem that says it has no size at all does not tell (ramfs, and some of FUSE).
func (r room) mark() int64 {
	low := int64(0)
	if r.Free < r.Need && r.Total > 0 {
		for _, m := range roomMarks {
			if r.Free*100 <= r.Total*m {
				low = m
			}
		}
	}
	return low
}

func (r room) String() string {
	s := fmt.Sprintf("%s free on the filesystem, at most %s more needed", short(r.Free), short(r.Need))
	if m := r.mark(); m > 0 {
		s += fmt.Sprintf(": LOW, below %d %%", m)
	}
	return s
}

// watchRoom says so each time that the room for the store comes down to
// another of roomMarks, until ctx ends.
func watchRoom(ctx context.Context, s *exception.Store, path string, say func(format string, args ...any)) {
	said := int64(0)
	t := time.NewTicker(roomPoll)
	defer t.Stop()
	for {
		// Counting what is stored costs; it is due only where room is short
		// of the whole device.
		r, err := roomFor(path, s.Geometry().Size, usage{})
		if err == nil && r.mark() > 0 {
			r, err = roomFor(path, s.Geometry().Size, usageOf(s))
		}
		if m := r.mark(); err == nil && m != said {
			if m > 0 && (said == 0 || m < said) {
				say("%s: %v; writes that need room will fail, or wait, when there is none", path, r)
			}
			said = m
		}
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
	}
}
