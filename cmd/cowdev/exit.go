package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"

	"github.com/urfave/cli/v2"

	"github.com/cowdev/cowdev/exception"
	"github.com/cowdev/cowdev/files"
	"github.com/cowdev/cowdev/files/ext4"
	"github.com/cowdev/cowdev/image"
	"github.com/cowdev/cowdev/internal/disk"
)

// Exit statuses. README.md has them for users.
const (
	exitDone        = 0
	exitFailure     = 1 // diff: there are differences
	exitUsage       = 2
	exitFile        = 3 // missing, not readable, not permitted, of the wrong kind
	exitLocked      = 4 // in use by another process
	exitInterrupted = 5 // can be resumed by running it again
	exitWrongBase   = 6
	exitNotStore    = 7 // or of another version
	exitDamaged     = 8
	exitNoSpace     = 9
	exitRepaired    = 10
)

// usageError is a command line that means nothing.
type usageError struct{ err error }

func (u usageError) Error() string { return u.err.Error() }
func (u usageError) Unwrap() error { return u.err }

func usagef(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

// quietError is a status that is not worth a message: the output said it.
type quietError int

func (q quietError) Error() string { return fmt.Sprintf("exit status %d", int(q)) }

// statusError is an error with a status of its own.
type statusError struct {
	error
	status int
}

func (s statusError) Unwrap() error { return s.error }

// statuses says which errors have which exit status; the first that matches
// counts.
var statuses = []struct {
	status int
	errs   []error
}{
	{exitInterrupted, []error{context.Canceled}},
	{exitLocked, []error{disk.ErrLocked, syscall.EADDRINUSE}},
	{exitWrongBase, []error{image.ErrWrongBase}},
	{exitNotStore, []error{exception.ErrNotStore, exception.ErrVersion}},
	{exitDamaged, []error{exception.ErrCorrupt, image.ErrIdentity, files.ErrDamaged, ext4.ErrCorrupt}},
	{exitNoSpace, []error{exception.ErrFull, syscall.ENOSPC, syscall.EDQUOT, syscall.EFBIG}},
	{exitFile, []error{
		disk.ErrKind, image.ErrUnusable, fs.ErrNotExist, fs.ErrExist, fs.ErrPermission,
		syscall.EISDIR, syscall.ENOTDIR, syscall.EROFS, syscall.ENAMETOOLONG, syscall.ELOOP,
		syscall.ENXIO, files.ErrNoFS, files.ErrNoPartition, files.ErrUnsupported, ext4.ErrUnsupported, ext4.ErrEncrypted,
	}},
}

// exitStatus returns the status that tells of err.
func exitStatus(err error) int {
	var usage usageError
	var quiet quietError
	var own statusError
	switch {
	case err == nil:
		return exitDone
	case errors.As(err, &own):
		return own.status
	case errors.As(err, &quiet):
		return int(quiet)
	case errors.As(err, &usage):
		return exitUsage
	case untold(err) && !errors.Is(err, context.Canceled):
		return exitFailure // whatever kept the output away: no image is full
	}
	for _, s := range statuses {
		for _, e := range s.errs {
			if errors.Is(err, e) {
				return s.status
			}
		}
	}
	return exitFailure
}

// untold reports whether err is a failure to write to standard output.
func untold(err error) bool {
	var pe *fs.PathError
	return errors.As(err, &pe) && pe.Op == "write" && pe.Path == os.Stdout.Name()
}

// report prints err in one line.
func report(w io.Writer, err error) {
	var quiet quietError
	if errors.As(err, &quiet) {
		return
	}
	text := separate(err.Error(), err)
	text = strings.ReplaceAll(text, context.Canceled.Error(), "interrupted")
	fmt.Fprintf(w, "cowdev: %s\n", printable(text))
}

// separate returns text, which err is told by, with "; " between errors that
// were joined: any newline that is left is of a name.
func separate(text string, err error) string {
	switch e := err.(type) {
	case interface{ Unwrap() error }:
		if inner := e.Unwrap(); inner != nil {
			text = separate(text, inner)
		}
	case interface{ Unwrap() []error }:
		var parts []string
		for _, inner := range e.Unwrap() {
			parts = append(parts, inner.Error())
		}
		text = strings.Replace(text, strings.Join(parts, "\n"), strings.Join(parts, "; "), 1)
		for _, inner := range e.Unwrap() {
			text = separate(text, inner)
		}
	}
	return text
}

// printable returns s with what does not print, as a file's name may hold,
// written as in a Go string: it must not reach the terminal.
func printable(s string) string {
	quoted := strconv.Quote(s)
	return unquoted.Replace(quoted[1 : len(quoted)-1])
}

// unquoted takes back what strconv.Quote does to characters that print.
var unquoted = strings.NewReplacer(`\"`, `"`, `\\`, `\`)

// untilSignal returns the context of a verb that can be interrupted.
func untilSignal(c *cli.Context) (context.Context, context.CancelFunc) {
	return signal.NotifyContext(c.Context, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
}
