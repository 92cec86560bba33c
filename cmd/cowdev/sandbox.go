package main

import (
	"fmt"
	"path/filepath"

	"github.com/landlock-lsm/go-landlock/landlock"
	landlocksys "github.com/landlock-lsm/go-landlock/landlock/syscall"
	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"github.com/cowdev/cowdev/exception"
	"github.com/cowdev/cowdev/nbdserver"
)

// sandbox gives up every right that a server needs no more once its files and
// sockets are open: new privileges, and by Landlock every file but the few
// that it reads or removes later. A kernel without Landlock is told of in a
// warning, and only privileges are given up.
func sandbox(c *cli.Context, sc serveConfig) error {
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("sandbox: give up new privileges: %w", err)
	}
	version, err := landlocksys.LandlockGetABIVersion()
	if err != nil || version < 1 {
		warn(c, "sandbox: this kernel has no Landlock; only new privileges are given up")
		return nil
	}
	// For a block device's serial number, which is asked for once more when
	// its digest is known.
	rules := []landlock.Rule{landlock.RODirs("/sys/dev/block", "/sys/devices").IgnoreIfMissing()}
	for dir := range directoriesOf(sc.certs) {
		rules = append(rules, landlock.PathAccess(landlocksys.AccessFSReadFile, dir))
	}
	for dir := range sc.removesFrom() {
		rules = append(rules, landlock.PathAccess(landlocksys.AccessFSRemoveFile, dir).IgnoreIfMissing())
	}
	if err := landlock.V6.BestEffort().Restrict(rules...); err != nil {
		return fmt.Errorf("sandbox: %w", err)
	}
	return nil
}

// directoriesOf returns where certificates are found when SIGHUP has them read
// again. They may be other files then, renamed into the place of the first, or
// what a link leads to that leads elsewhere now: Landlock knows a file by its
// inode, so only the right to their directories lasts.
func directoriesOf(f nbdserver.CertificateFiles) map[string]bool {
	dirs := map[string]bool{}
	for _, path := range []string{f.CA, f.Cert, f.Key} {
		if path == "" {
			continue
		}
		dirs[filepath.Dir(path)] = true
		if at, err := filepath.EvalSymlinks(path); err == nil {
			dirs[filepath.Dir(at)] = true
		}
	}
	return dirs
}

// removesFrom returns the directories in which the server removes a file at
// its end: sockets, and the live table.
func (sc *serveConfig) removesFrom() map[string]bool {
	dirs := map[string]bool{exception.Shared{}.Directory(): true}
	for _, path := range sc.listen.sockets {
		dirs[filepath.Dir(path)] = true
	}
	return dirs
}
