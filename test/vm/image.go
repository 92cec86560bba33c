package vm

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// ErrUnavailable says that the guest's kernel could not be had: there is no
// network, or no Debian.
var ErrUnavailable = errors.New("no kernel for a guest")

// layout is part of the cache's key: raise it when what is built changes.
const layout = 5

// tools are the host's binaries that the guest gets; busybox does the rest.
var tools = []string{
	"busybox", "bash", "nbd-client", "fio", "mount", "blkdiscard", "flock",
	"mke2fs", "e2fsck", "mkfs.xfs", "xfs_repair", "mkfs.btrfs", "btrfs",
	"mkfs.fat", "fsck.fat", "xfs_io",
}

// modules are what is loaded in the guest, or can be; the first ones at boot.
var modules = []string{
	"virtio_pci", "virtio_blk", "virtio_console", "virtio_rng",
	"crc32c_generic", "libcrc32c",
	"nbd", "loop", "fuse", "xfs", "btrfs", "dm_snapshot", "vfat", "nls_cp437", "nls_iso8859-1", "nls_ascii",
}

// bootModules are the first of modules: those /init loads before all else.
const bootModules = 6

// An Image is a kernel and a root in the cache, ready to boot.
type Image struct {
	kernel string // vmlinuz
	root   string // initramfs
	qemu   string
}

// Prepare returns the image, after fetching the kernel and building the root
// where the cache has none that fits.
func Prepare(ctx context.Context) (*Image, error) {
	cache := os.Getenv("COWDEV_VM_CACHE")
	if cache == "" {
		home, err := os.UserCacheDir()
		if err != nil {
			return nil, err
		}
		cache = filepath.Join(home, "cowdev-vm")
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return nil, err
	}
	qemu, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		return nil, fmt.Errorf("%w (package qemu-system-x86; scripts/install-test-packages)", err)
	}
	unlock, err := lockCache(ctx, cache)
	if err != nil {
		return nil, err
	}
	defer unlock()
	pkg, err := fetchKernel(ctx, cache)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	img := &Image{qemu: qemu}
	if img.kernel, err = glob1(filepath.Join(pkg, "boot", "vmlinuz-*")); err != nil {
		return nil, err
	}
	img.root, err = buildRoot(ctx, cache, pkg)
	return img, err
}

// lockCache waits until no other process works in the cache.
func lockCache(ctx context.Context, cache string) (unlock func(), err error) {
	f, err := os.OpenFile(filepath.Join(cache, "lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", f.Name(), ctx.Err())
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// fetchKernel returns the folder in which Debian's kernel package lies
// unpacked, the newest that apt knows where the cache has none.
func fetchKernel(ctx context.Context, cache string) (string, error) {
	if have, _ := filepath.Glob(filepath.Join(cache, "linux-image-*")); len(have) > 0 {
		slices.Sort(have)
		return have[len(have)-1], nil
	}
	pkg, err := kernelPackage(ctx)
	if err != nil {
		return "", err
	}
	tmp, err := os.MkdirTemp(cache, "fetch.")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	// apt's own downloader drops privileges, and the cache may be private.
	if _, err := run(ctx, tmp, "apt-get", "-q", "-o", "APT::Sandbox::User=root", "-o", "Acquire::Retries=3", "download", pkg); err != nil {
		return "", err
	}
	deb, err := glob1(filepath.Join(tmp, "*.deb"))
	if err != nil {
		return "", err
	}
	root := filepath.Join(tmp, "root")
	if _, err := run(ctx, tmp, "dpkg-deb", "-x", deb, root); err != nil {
		return "", err
	}
	version, err := kernelVersion(root)
	if err != nil {
		return "", err
	}
	if _, err := run(ctx, tmp, "depmod", "-b", root, version); err != nil {
		return "", err
	}
	dir := filepath.Join(cache, pkg)
	return dir, os.Rename(root, dir)
}

var kernelDepends = regexp.MustCompile(`Depends: (linux-image-[0-9]\S*)`)

// kernelPackage asks apt what the cloud flavour's newest package is called.
func kernelPackage(ctx context.Context) (string, error) {
	for _, update := range []bool{false, true} {
		if update {
			if _, err := run(ctx, "", "apt-get", "-q", "update"); err != nil {
				return "", err
			}
		}
		out, _ := run(ctx, "", "apt-cache", "depends", "linux-image-cloud-amd64")
		if m := kernelDepends.FindSubmatch(out); m != nil {
			return string(m[1]), nil
		}
	}
	return "", errors.New("apt-cache knows no linux-image-cloud-amd64: the guest's kernel comes from Debian")
}

// kernelVersion returns the name of the one folder of modules.
func kernelVersion(pkg string) (string, error) {
	dir, err := glob1(filepath.Join(pkg, "lib", "modules", "*"))
	return filepath.Base(dir), err
}

// buildRoot returns the initramfs, building it where the cache has none made
// of the same kernel and tools.
func buildRoot(ctx context.Context, cache, pkg string) (string, error) {
	key := sha256.New()
	fmt.Fprintln(key, layout, pkg, modules, guestInit)
	paths := make([]string, len(tools))
	for i, tool := range tools {
		p, err := lookTool(tool)
		if err != nil {
			return "", err
		}
		st, err := os.Stat(p)
		if err != nil {
			return "", err
		}
		paths[i] = p
		fmt.Fprintln(key, p, st.Size(), st.ModTime().UnixNano())
	}
	name := filepath.Join(cache, fmt.Sprintf("root-%x.cpio", key.Sum(nil)[:8]))
	if _, err := os.Stat(name); err == nil {
		return name, nil
	}
	old, _ := filepath.Glob(filepath.Join(cache, "root-*.cpio"))
	f, err := os.CreateTemp(cache, "build.")
	if err != nil {
		return "", err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	if err := writeRoot(ctx, f, pkg, paths); err != nil {
		return "", err
	}
	for _, o := range old { // another guest may run from one: its qemu has read it
		os.Remove(o)
	}
	return name, os.Rename(f.Name(), name)
}

func lookTool(name string) (string, error) {
	for _, dir := range []string{"/usr/sbin", "/usr/bin", "/sbin", "/bin"} {
		if p := filepath.Join(dir, name); unix.Access(p, unix.X_OK) == nil {
			return p, nil
		}
	}
	return "", fmt.Errorf("%s is not installed, and the guest needs it (scripts/install-test-packages)", name)
}

// writeRoot writes the guest's root: folders, busybox and its names, the
// tools with their libraries, the modules with their dependencies, /init.
func writeRoot(ctx context.Context, f *os.File, pkg string, paths []string) error {
	c := newCPIO(f)
	for _, dir := range []string{"/usr/bin", "/usr/sbin", "/usr/lib", "/usr/lib64", "/proc", "/sys", "/dev", "/run", "/tmp", "/job", "/etc", "/root", "/mnt", "/var"} {
		c.dir(dir)
	}
	for _, dir := range []string{"bin", "sbin", "lib", "lib64"} {
		c.symlink("usr/"+dir, "/"+dir)
	}
	c.symlink("/proc/mounts", "/etc/mtab")
	c.char("/dev/console", 5, 1)
	c.char("/dev/null", 1, 3)
	c.bytes("/etc/passwd", []byte("root:x:0:0:root:/root:/bin/sh\n"), 0o644)
	c.bytes("/etc/group", []byte("root:x:0:\n"), 0o644)
	for _, p := range paths {
		if err := addBinary(ctx, c, p); err != nil {
			return err
		}
	}
	if err := addBusyboxNames(ctx, c); err != nil {
		return err
	}
	if err := addModules(c, pkg); err != nil {
		return err
	}
	if _, err := os.Stat("/etc/mke2fs.conf"); err == nil {
		if err := c.file("/etc/mke2fs.conf", "/etc/mke2fs.conf"); err != nil {
			return err
		}
	}
	c.bytes("/init", []byte(guestInit), 0o755)
	return c.close(func() int64 { n, _ := f.Seek(0, io.SeekCurrent); return n })
}

var libraryPath = regexp.MustCompile(`/[^ )]+`)

// addBinary adds a binary and the libraries that ldd names, at their places.
func addBinary(ctx context.Context, c *cpioWriter, p string) error {
	if err := addFile(c, p); err != nil {
		return err
	}
	out, err := run(ctx, "", "ldd", p)
	if err != nil {
		return nil // a static binary
	}
	for _, line := range strings.Split(string(out), "\n") {
		if lib := libraryPath.FindString(line); lib != "" {
			if err := addFile(c, lib); err != nil {
				return err
			}
		}
	}
	return nil
}

// addFile adds a file of the host at its place, /bin and its like taken as
// the links that they are.
func addFile(c *cpioWriter, p string) error {
	dir, err := filepath.EvalSymlinks(filepath.Dir(p))
	if err != nil {
		return err
	}
	name := filepath.Join(dir, filepath.Base(p))
	if c.has(name) {
		return nil
	}
	return c.file(name, p)
}

// addBusyboxNames gives the guest busybox's commands, under a folder that
// comes last in its PATH so that real tools go before them.
func addBusyboxNames(ctx context.Context, c *cpioWriter) error {
	out, err := run(ctx, "", "busybox", "--list")
	if err != nil {
		return err
	}
	for _, name := range strings.Fields(string(out)) {
		c.symlink("/usr/bin/busybox", "/usr/lib/busybox/"+name)
	}
	c.symlink("busybox", "/usr/bin/sh")
	return nil
}

// addModules adds the modules and what they depend on, and the lists by which
// modprobe finds them.
func addModules(c *cpioWriter, pkg string) error {
	version, err := kernelVersion(pkg)
	if err != nil {
		return err
	}
	dir := filepath.Join(pkg, "lib", "modules", version)
	deps, err := os.ReadFile(filepath.Join(dir, "modules.dep"))
	if err != nil {
		return err
	}
	want := map[string][]string{} // by the module's name: its file, then those it needs
	for _, line := range strings.Split(string(deps), "\n") {
		if file, needs, ok := strings.Cut(line, ":"); ok {
			want[moduleName(file)] = append([]string{file}, strings.Fields(needs)...)
		}
	}
	in := "/usr/lib/modules/" + version
	for _, m := range modules {
		for _, file := range want[moduleName(m)] { // none when it is built in
			if !c.has(filepath.Join(in, file)) {
				if err := c.file(filepath.Join(in, file), filepath.Join(dir, file)); err != nil {
					return err
				}
			}
		}
	}
	for _, list := range []string{"modules.dep", "modules.alias", "modules.symbols", "modules.builtin", "modules.order"} {
		if err := c.file(filepath.Join(in, list), filepath.Join(dir, list)); err != nil {
			return err
		}
	}
	c.bytes("/etc/boot-modules", []byte(strings.Join(modules[:bootModules], "\n")+"\n"), 0o644)
	return nil
}

func moduleName(file string) string {
	return strings.ReplaceAll(strings.TrimSuffix(filepath.Base(file), ".ko"), "-", "_")
}

func glob1(pattern string) (string, error) {
	found, err := filepath.Glob(pattern)
	if err == nil && len(found) != 1 {
		err = fmt.Errorf("%s: %d files, expected one", pattern, len(found))
	}
	if err != nil {
		return "", err
	}
	return found[0], nil
}

// run runs a command of the host to its end and returns what it printed.
func run(ctx context.Context, dir, name string, args ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive")
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	if err != nil {
		last := bytes.TrimSpace(out)
		if i := bytes.LastIndexByte(last, '\n'); i >= 0 {
			last = last[i+1:]
		}
		return out, fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, last)
	}
	return out, nil
}
