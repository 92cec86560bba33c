package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"github.com/cowdev/cowdev/attach"
	"github.com/cowdev/cowdev/attach/nbdnl"
	"github.com/cowdev/cowdev/exception"
)

func doctorCommand() *cli.Command {
	return &cli.Command{
		Name:      "doctor",
		Usage:     "Find what is left of servers that died, and what keeps devices from working",
		ArgsUsage: "[STORE|DIRECTORY]",
		Description: "It looks at the kernel's drivers, at attached devices and at the stores on them, and at STORE\n" +
			"or the stores and sockets in DIRECTORY. It says what it would do, and does it with --fix; what\n" +
			"may lose data it never does. The status is 0 when nothing is left to do, and 1 otherwise.",
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "fix", Usage: "do what is told"},
			&cli.BoolFlag{Name: "verbose", Usage: "name all stores that cannot be found, not how many there are; as --json does"},
			jsonFlag,
		},
		Action: func(c *cli.Context) error {
			args, err := arguments(c, c.Command.ArgsUsage)
			if err != nil {
				return err
			}
			d := &doctor{c: c}
			if err := d.look(args[0]); err != nil {
				return err
			}
			return d.report()
		},
	}
}

// A finding is something that is not as it should be.
type finding struct {
	Object  string `json:"object"` // a device, file or process
	Problem string `json:"problem"`
	Cure    string `json:"cure"` // what would be done, or is for the user to do
	Fixed   bool   `json:"fixed"`
	Failure string `json:"failure,omitempty"` // why fixing it failed
	Note    bool   `json:"note,omitempty"`    // good to know, and no fault
	fix     func() error
}

// A doctor collects findings.
type doctor struct {
	c        *cli.Context
	states   []*attach.State
	findings []*finding
}

// find adds a finding. Without fix the cure is the user's to do.
func (d *doctor) find(object, problem, cure string, fix func() error) {
	d.findings = append(d.findings, &finding{Object: object, Problem: problem, Cure: cure, fix: fix})
}

func (d *doctor) look(where string) error {
	var err error
	if d.states, err = attach.DefaultStates.List(); err != nil {
		return err
	}
	d.drivers()
	for _, s := range d.states {
		d.device(s)
	}
	d.strangers()
	d.fuseLeftovers()
	d.orphans()
	stores := map[string]bool{}
	for _, s := range d.states {
		stores[s.COW] = true
	}
	if where != "" {
		found, err := storesAt(where)
		if err != nil {
			return err
		}
		for _, path := range found {
			stores[path] = true
		}
		d.sockets(where)
	}
	for path := range stores {
		d.store(path)
	}
	d.liveTables(stores)
	slices.SortStableFunc(d.findings, func(a, b *finding) int { return strings.Compare(a.Object, b.Object) })
	return nil
}

// report prints the findings, after fixing them where that was asked for.
func (d *doctor) report() error {
	left := 0
	for _, f := range d.findings {
		if d.c.Bool("fix") && f.fix != nil {
			if err := f.fix(); err != nil {
				f.Failure = err.Error()
			} else {
				f.Fixed = true
			}
		}
		if !f.Fixed && !f.Note {
			left++
		}
	}
	if d.c.Bool("json") {
		if err := printJSON(d.c.App.Writer, append([]*finding{}, d.findings...)); err != nil {
			return err
		}
	} else {
		d.print()
	}
	if left > 0 {
		return quietError(exitFailure)
	}
	return nil
}

func (d *doctor) print() {
	w := d.c.App.Writer
	for _, f := range d.findings {
		fmt.Fprintf(w, "%s: %s\n", f.Object, f.Problem)
		switch {
		case f.Fixed:
			fmt.Fprintf(w, "    done: %s\n", f.Cure)
		case f.Failure != "":
			fmt.Fprintf(w, "    tried: %s: %s\n", f.Cure, f.Failure)
		case f.fix != nil:
			fmt.Fprintf(w, "    --fix would: %s\n", f.Cure)
		default:
			fmt.Fprintf(w, "    to do: %s\n", f.Cure)
		}
	}
	if len(d.findings) == 0 {
		fmt.Fprintln(w, "nothing found")
	}
}

// drivers looks at what the kernel offers.
func (d *doctor) drivers() {
	if err := nbdnl.Available(); errors.Is(err, nbdnl.ErrNoDriver) {
		d.find("nbd", "the kernel's driver is not loaded; only loop devices over FUSE can be attached, and they end with their server",
			"modprobe nbd", func() error { return runTool("modprobe", "nbd") })
		d.findings[len(d.findings)-1].Note = true
	} else if err != nil {
		d.find("nbd", "the kernel's driver cannot be asked: "+err.Error(), "run cowdev doctor as root", nil)
	}
	for name, module := range map[string]string{"/dev/fuse": "fuse", "/dev/loop-control": "loop"} {
		if _, err := os.Stat(name); errors.Is(err, fs.ErrNotExist) {
			d.find(name, "does not exist; devices can be attached by nbd only", "modprobe "+module,
				func() error { return runTool("modprobe", module) })
		}
	}
}

// runTool runs a program of the system for a fix.
func runTool(name string, args ...string) error {
	ctx, cancel := limited()
	defer cancel()
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w: %s", name, err, strings.TrimSpace(string(out)))
	}
	return nil
}

// device looks at an attached device.
func (d *doctor) device(s *attach.State) {
	isNBD, gone := s.Driver == attach.DriverNBD, s.Gone()
	switch {
	case s.Alive():
		if isNBD {
			d.blockSize(s.Device)
		}
	case isNBD && gone && s.Failure == "":
		d.find(s.Device, fmt.Sprintf("process %d, which held it, is gone, and so is the device", s.PID),
			"forget it", func() error { return attach.DefaultStates.Remove(s) })
	case !gone && attach.MountOf(s.Device) != "" && isNBD:
		d.find(s.Device, fmt.Sprintf("mounted at %s, and process %d, which served it, is gone: its requests wait, and then fail", attach.MountOf(s.Device), s.PID),
			"cowdev attach --resume --detach "+shellWord(s.COW), func() error {
				_, err := startDetached(d.c, []string{"attach", "--resume", "--", s.COW})
				return err
			})
	case !gone && attach.MountOf(s.Device) != "":
		dir := attach.MountOf(s.Device)
		cure := "umount -l " + shellWord(dir) + ", then cowdev detach " + s.Device
		if top, err := attach.DefaultStates.Mounted(dir); err != nil || top.Device != s.Device {
			cure = "unmount first what was mounted there later; then " + cure
		}
		d.find(s.Device, fmt.Sprintf("mounted at %s, and process %d, which served it, is gone for good", dir, s.PID), cure, nil)
	default:
		problem := fmt.Sprintf("process %d, which served it, is gone", s.PID)
		if s.Failure != "" {
			problem += ": " + s.Failure
		}
		d.find(s.Device, problem, "detach it, and close its store in order", func() error { return detachOrphan(d.c, s) })
	}
}

// strangers looks at connected nbd devices of which no state tells.
func (d *doctor) strangers() {
	devices, err := nbdnl.Status()
	if err != nil {
		return // drivers has told
	}
	for _, dev := range devices {
		path := attach.NBDPath(dev.Index)
		known := slices.ContainsFunc(d.states, func(s *attach.State) bool { return s.Device == path })
		owner := attach.OwnerNBD(dev.Index)
		// Who has connected it and lives may be about to tell of it.
		if thread, _ := strconv.Atoi(owner); !dev.Connected || known || attach.Born(thread) != 0 {
			continue
		}
		d.blockSize(path)
		if id := attach.BackendNBD(dev.Index); id != "" {
			d.find(path, "connected to store "+id+" by a cowdev that has left nothing else", "disconnect it where nobody uses it",
				func() error { return detachForeign(dev.Index, owner) })
		}
	}
}

// blockSize looks for blocks too large for what is on a device.
func (d *doctor) blockSize(path string) {
	b, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(path), "queue/logical_block_size"))
	if err != nil {
		return
	}
	size, _ := strconv.Atoi(strings.TrimSpace(string(b)))
	if size <= 512 {
		return
	}
	head, err := readWithin(path, 2*time.Second)
	if err != nil {
		d.find(path, "cannot be read: "+err.Error(), "see what serves it", nil)
		return
	}
	switch {
	case string(head[:4]) == "XFSB" && int(binary.BigEndian.Uint16(head[102:])) < size:
		d.find(path, fmt.Sprintf("has blocks of %d bytes, its XFS was made for %d and cannot be mounted", size, binary.BigEndian.Uint16(head[102:])),
			"connect it with blocks of 512 bytes: nbd-client without -b, cowdev attach without --block-size", nil)
	case head[510] == 0x55 && head[511] == 0xaa && string(head[512:520]) == "EFI PART":
		d.find(path, fmt.Sprintf("has blocks of %d bytes, its partition table was made for 512 and is not seen", size),
			"connect it with blocks of 512 bytes: nbd-client without -b, cowdev attach without --block-size", nil)
	}
}

// readWithin reads the first 4 KiB of a device that may not answer.
func readWithin(path string, limit time.Duration) ([]byte, error) {
	type result struct {
		b   []byte
		err error
	}
	done := make(chan result, 1)
	go func() {
		b := make([]byte, 4096)
		f, err := os.Open(path)
		if err == nil {
			defer f.Close()
			_, err = f.ReadAt(b, 0)
		}
		done <- result{b, err}
	}()
	select {
	case r := <-done:
		return r.b, r.err
	case <-time.After(limit):
		return nil, fmt.Errorf("no answer within %v", limit)
	}
}

// fuseLeftovers looks for mounts of FUSE servers that are gone.
func (d *doctor) fuseLeftovers() {
	dirs, _ := filepath.Glob(filepath.Join(string(attach.DefaultStates), "fuse-*"))
	for _, dir := range dirs {
		if slices.ContainsFunc(d.states, func(s *attach.State) bool { return s.FuseDir == dir }) {
			continue
		}
		// Who lives is about to tell of its device, or to end.
		var pid int
		if _, err := fmt.Sscanf(filepath.Base(dir), fuseDirOf, &pid); err == nil && attach.Born(pid) != 0 {
			continue
		}
		d.find(dir, "left by a cowdev that is gone", "unmount and remove it", func() error {
			if err := detachLoopsOn(dir); err != nil {
				return err
			}
			if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil && err != unix.EINVAL {
				return err
			}
			return os.Remove(dir)
		})
	}
}

// detachLoopsOn ends the loop devices over the FUSE filesystem at dir.
func detachLoopsOn(dir string) error {
	ctx, cancel := limited()
	defer cancel()
	file := attach.FusePath(dir)
	for _, device := range attach.LoopsOn(file) {
		if err := attach.DetachLoop(ctx, device, file); err != nil {
			return err
		}
	}
	return nil
}

// orphans looks for servers whose supervisor is gone. They end by themselves
// once what they do is done.
func (d *doctor) orphans() {
	names, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, name := range names {
		line, _ := os.ReadFile(name)
		words := strings.Split(string(line), "\x00")
		pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(name)))
		if len(words) < 2 || words[0] != "cowdev" || words[1] != "attach-server" || supervised(pid) {
			continue
		}
		d.find("process "+strconv.Itoa(pid), "a server without a supervisor, that has not ended", "end it (SIGKILL): all that it acknowledged is kept",
			func() error { return unix.Kill(pid, unix.SIGKILL) })
	}
}

// supervised reports whether the parent of pid is a cowdev.
func supervised(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return true // gone meanwhile
	}
	_, rest, _ := strings.Cut(string(stat), ") ")
	if f := strings.Fields(rest); len(f) > 1 {
		parent, _ := os.ReadFile("/proc/" + f[1] + "/cmdline")
		return strings.Contains(string(parent), "\x00attach\x00")
	}
	return true
}

// store looks at one store.
func (d *doctor) store(path string) {
	info, err := lookAt(path)
	switch {
	case errors.Is(err, exception.ErrCorrupt):
		d.find(path, err.Error(), "cowdev check "+shellWord(path), nil)
		return
	case err != nil:
		d.find(path, err.Error(), "put it where it was, or detach its device", nil)
		return
	}
	if info.State == exception.Merging.String() && len(info.ServedBy) == 0 {
		d.find(path, "half merged: its base is usable with it only", "cowdev merge "+shellWord(info.Base.Name)+" "+shellWord(path)+" finishes it", nil)
	}
	if info.Broken {
		d.find(path, "a sync failed: it is read-only", "cowdev check "+shellWord(path)+", and look at its disk", nil)
	}
	for _, pid := range info.ServedBy {
		if exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid)); err == nil && !strings.Contains(filepath.Base(exe), "cowdev") {
			d.find(path, fmt.Sprintf("locked by process %d (%s), which is no cowdev", pid, exe), "end that process if it is not meant", nil)
		}
	}
	d.socket(path + ".sock")
}

// sockets looks at the sockets in a directory.
func (d *doctor) sockets(dir string) {
	names, _ := filepath.Glob(filepath.Join(dir, "*.sock"))
	for _, name := range names {
		if st, err := os.Stat(strings.TrimSuffix(name, ".sock")); err != nil || !st.Mode().IsRegular() {
			d.socket(name) // store looks at the others
		}
	}
}

// socket looks for a socket that nobody listens on.
func (d *doctor) socket(path string) {
	st, err := os.Lstat(path)
	if err != nil || st.Mode()&fs.ModeSocket == 0 {
		return
	}
	conn, err := net.DialTimeout("unix", path, time.Second)
	if err == nil {
		conn.Close()
		return
	}
	if errors.Is(err, syscall.ECONNREFUSED) {
		d.find(path, "nobody listens on this socket", "remove it", func() error { return removeStale(path) })
	}
}

// storesAt returns the stores at path: itself, or those of a directory.
func storesAt(path string) ([]string, error) {
	st, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !st.IsDir() {
		return []string{absolute(path)}, nil
	}
	entries, err := os.ReadDir(path)
	if err != nil {
		return nil, err
	}
	var stores []string
	for _, e := range entries {
		name := filepath.Join(path, e.Name())
		if e.Type().IsRegular() && !isNoStore(name) {
			stores = append(stores, absolute(name))
		}
	}
	return stores, nil
}

// isNoStore reports whether a file is none of ours; a damaged store is one.
func isNoStore(path string) bool {
	_, f, err := openLooking(path)
	if err != nil {
		return !errors.Is(err, exception.ErrCorrupt)
	}
	f.Close()
	return false
}

// liveTables looks for what servers that died have left of stores which were
// not opened since. It holds writes that are not durable, so nothing here
// removes it.
func (d *doctor) liveTables(stores map[string]bool) {
	const problem = "writes that a server acknowledged and did not make durable before it died"
	const cure = "serve or attach %s once more before the next boot"
	owners := map[string]*storeInfo{}
	for path := range stores {
		if info, err := lookAt(path); err == nil {
			owners[info.memory] = info
		}
	}
	tables := exception.Shared{}.Files()
	used := mappedFiles(exception.Shared{}.Directory())
	var strange []string // of stores that nobody has named
	for _, name := range slices.Sorted(maps.Keys(tables)) {
		// What is told of an attached device cures its store too.
		attached := slices.ContainsFunc(d.states, func(s *attach.State) bool { return s.UUID == tables[name] })
		if attached || used[name] {
			continue
		}
		if info := owners[name]; info == nil {
			strange = append(strange, name)
		} else if len(info.ServedBy) == 0 {
			d.find(info.File, problem, fmt.Sprintf(cure, "it"), nil)
		}
	}
	if len(strange) > 1 && !d.c.Bool("verbose") && !d.c.Bool("json") {
		d.find(strange[0], fmt.Sprintf("%s; and %d more such (--verbose names them)", problem, len(strange)-1),
			fmt.Sprintf(cure, "their stores")+"; remove the files where the stores are gone", nil)
		return
	}
	for _, name := range strange {
		d.find(name, problem, fmt.Sprintf(cure, "the store "+tables[name])+
			" (cowdev doctor DIRECTORY finds its file, cowdev info tells the UUID); remove this file where the store is gone", nil)
	}
}

// mappedFiles returns the files in dir that processes have mapped.
func mappedFiles(dir string) map[string]bool {
	files := map[string]bool{}
	names, _ := filepath.Glob("/proc/[0-9]*/maps")
	for _, name := range names {
		maps, _ := os.ReadFile(name)
		for line := range strings.Lines(string(maps)) {
			if at := strings.Index(line, dir+"/"); at >= 0 {
				files[strings.TrimSuffix(line[at:], "\n")] = true
			}
		}
	}
	return files
}
