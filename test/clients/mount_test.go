package clients

// Filesystems of this host's kernel, mounted on the overlay through nbdfuse and
// a loop device.

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestMountedFilesystems(t *testing.T) {
	needFUSE(t)
	kinds := []struct{ name, mkfs, fsck string }{
		{"ext4", "mkfs.ext4 -q -F", "e2fsck -fn"},
		{"xfs", "mkfs.xfs -q -f", "xfs_repair -n"},
		{"btrfs", "mkfs.btrfs -q -f", "btrfs check"},
	}
	if os.Getenv("COWDEV_LONG") == "" {
		kinds = kinds[:1]
	}
	for _, kind := range kinds {
		t.Run(kind.name, func(t *testing.T) {
			base := filepath.Join(shortDir(t), "base.img")
			check(t, os.WriteFile(base, nil, 0o600))
			check(t, os.Truncate(base, 400<<20))
			before := digest(t, base)
			s := serveBase(t, base)
			dev := loopOver(t, s.uri)
			run(t, "sh", "-c", kind.mkfs+" "+dev)
			dir := filepath.Join(shortDir(t), "mnt")
			check(t, os.Mkdir(dir, 0o755))

			unmount := mountAt(t, dev, dir)
			run(t, "sh", "-c", `cd "$0" && mkdir d && for i in 1 2 3 4 5 6 7 8 9; do head -c ${i}00000 /dev/urandom > d/$i; done &&
				ln d/1 hard && ln -s d/2 soft && rm d/3 && mv d/4 d/renamed && truncate -s 1M d/5 && sync`, dir)
			want := tree(t, dir)
			unmount()
			run(t, "sh", "-c", kind.fsck+" "+dev)

			unmount = mountAt(t, dev, dir)
			if got := tree(t, dir); got != want {
				t.Errorf("mounted again:\n%s\nexpected\n%s", got, want)
			}
			unmount()
			if digest(t, base) != before {
				t.Error("the base was changed")
			}
		})
	}
}

// tree returns what a directory holds: names, sizes, links, digests.
func tree(t *testing.T, dir string) string {
	t.Helper()
	return run(t, "sh", "-c", `cd "$0" && find . -printf '%P %y %s %n %l\n' | grep -v '^ d' | grep -v 'd [0-9]* [0-9]* $' | sort && find . -type f -exec sha256sum {} + | sort`, dir)
}

// loopOver makes a loop device of the export at uri, for as long as the test.
func loopOver(t *testing.T, uri string) string {
	t.Helper()
	dir := filepath.Join(shortDir(t), "f")
	check(t, os.Mkdir(dir, 0o755))
	fuse := command(t, "nbdfuse", dir, uri)
	check(t, fuse.Start())
	t.Cleanup(func() {
		unix.Unmount(dir, unix.MNT_DETACH)
		fuse.Wait()
	})
	file := filepath.Join(dir, "nbd")
	for start := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		if _, err := os.Stat(file); err == nil {
			break
		} else if time.Since(start) > time.Minute {
			t.Fatalf("nbdfuse did not show %s within a minute: %v", file, err)
		}
	}
	out, err := command(t, "losetup", "--find", "--show", file).CombinedOutput()
	if err != nil {
		t.Skipf("no loop device: %v: %s", err, out)
	}
	dev := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if out, err := exec.CommandContext(ctx, "losetup", "-d", dev).CombinedOutput(); err != nil {
			t.Errorf("losetup -d %s: %v: %s", dev, err, out)
		}
	})
	return dev
}

// mountAt mounts dev at dir until the returned function, or the test's end.
func mountAt(t *testing.T, dev, dir string) (unmount func()) {
	t.Helper()
	run(t, "mount", dev, dir)
	mounted := true
	unmount = func() {
		if mounted {
			mounted = false
			run(t, "umount", dir)
		}
	}
	t.Cleanup(func() {
		if mounted {
			unix.Unmount(dir, unix.MNT_DETACH)
		}
	})
	return unmount
}
