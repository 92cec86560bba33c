package guest

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// The disks, in the order in which the guest is given them.
const (
	origin = "/dev/vda"
	store  = "/dev/vdb"
)

// A system is one way to make a copy-on-write device of the two disks.
type system interface {
	prepare() error        // a disk that is all zeros, for create
	create() error         // a new store
	open() (string, error) // returns the device
	close() (int64, error) // returns the bytes that the store takes
	destroy() error        // undoes prepare; the disk is discarded afterwards
}

// A System is a system by name.
type System struct {
	Name, Title string
	Commands    string // as they would be typed
	system
}

// Systems returns all that are compared.
func Systems() []System {
	return []System{
		{"dm-4k", "dm-snapshot, 4 KiB", snapshot{8}.commands(), snapshot{8}},
		{"dm-64k", "dm-snapshot, 64 KiB", snapshot{128}.commands(), snapshot{128}},
		{"cowdev-disk", "cowdev on the disk", serveCommands("", store), &server{store: store}},
		{"cowdev-file", "cowdev in a file", serveCommands("mke2fs -q -t ext4 "+store+" && mount "+store+" /mnt && ", storeFile), &server{store: storeFile}},
	}
}

// snapshot is dm-snapshot with a persistent store.
type snapshot struct{ chunk int } // sectors of 512 bytes

// mapped is what devtmpfs calls the only mapped device; there is no udev to
// make /dev/mapper/compared of it.
const mapped = "/dev/dm-0"

func (s snapshot) table() string {
	return fmt.Sprintf("0 %d snapshot %s %s P %d", OriginSize/512, origin, store, s.chunk)
}

func (s snapshot) commands() string {
	return fmt.Sprintf("dmsetup create compared --table '%s'", s.table())
}

func (s snapshot) prepare() error { return nil }

// create lets the kernel write the header, which it does at the first use.
func (s snapshot) create() error {
	if _, err := s.open(); err != nil {
		return err
	}
	_, err := s.close()
	return err
}

func (s snapshot) open() (string, error) {
	return mapped, run("dmsetup", "--noudevsync", "--noudevrules", "create", "compared", "--table", s.table())
}

// close takes from the status line what is allocated, in sectors:
// "0 262144 snapshot 16/2097152 16".
func (s snapshot) close() (int64, error) {
	out, err := exec.Command("dmsetup", "status", "compared").Output()
	var start, length, allocated int64
	if err == nil {
		_, err = fmt.Sscanf(string(out), "%d %d snapshot %d/", &start, &length, &allocated)
	}
	if err != nil {
		err = fmt.Errorf("dmsetup status: %w: %s", err, bytes.TrimSpace(out))
	}
	return allocated * 512, errors.Join(err, run("dmsetup", "--noudevsync", "--noudevrules", "--retry", "remove", "compared"))
}

func (s snapshot) destroy() error { return nil }

// server is cowdev serve with the kernel's nbd driver as its client.
type server struct {
	store   string
	process *exec.Cmd
	said    bytes.Buffer
}

const (
	program   = "/job/cowdev"
	storeFile = "/mnt/store"
	socket    = "/run/compared.sock"
	nbd       = "nbd0"
)

// serveCommands tells how it is done. Identity by sample: otherwise an idle
// server reads all of the base once, in its own time, which is not what any
// load is about.
func serveCommands(before, store string) string {
	return fmt.Sprintf("%scowdev create %s %s && cowdev serve --base-digest=sample --socket %s %s %s && nbd-client -unix %s /dev/%s -b 512",
		before, origin, store, socket, origin, store, socket, nbd)
}

func (s *server) prepare() error {
	if s.store != storeFile {
		return nil
	}
	// Nothing is left to be done in the background.
	if err := run("mke2fs", "-q", "-F", "-t", "ext4", "-E", "lazy_itable_init=0,lazy_journal_init=0", store); err != nil {
		return err
	}
	if err := unix.Mount(store, "/mnt", "ext4", 0, ""); err != nil {
		return fmt.Errorf("mount %s: %w", store, err)
	}
	return nil
}

func (s *server) create() error {
	return run(program, "create", "--quiet", "--base-digest=sample", origin, s.store)
}

func (s *server) open() (string, error) {
	s.said.Reset()
	s.process = exec.Command(program, "serve", "--quiet", "--existing", "--base-digest=sample", "--socket", socket, origin, s.store)
	s.process.Stderr = &s.said
	out, err := s.process.StdoutPipe()
	if err != nil {
		return "", err
	}
	if err := s.process.Start(); err != nil {
		return "", err
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); !strings.HasPrefix(line, "ready") {
		return "", fmt.Errorf("serve: %q, %w", line, errors.Join(err, s.process.Wait(), errors.New(s.said.String())))
	}
	if err := run("nbd-client", "-unix", socket, "/dev/"+nbd, "-b", "512"); err != nil {
		return "", err
	}
	return "/dev/" + nbd, await("the nbd device", func() bool {
		size, _ := os.ReadFile("/sys/block/" + nbd + "/size")
		return strings.TrimSpace(string(size)) == strconv.Itoa(OriginSize/512)
	})
}

func (s *server) close() (int64, error) {
	if err := run("nbd-client", "-d", "/dev/"+nbd); err != nil {
		return 0, err
	}
	if err := await("the nbd device's end", func() bool {
		_, err := os.Stat("/sys/block/" + nbd + "/pid")
		return os.IsNotExist(err)
	}); err != nil {
		return 0, err
	}
	if err := s.process.Process.Signal(syscall.SIGTERM); err != nil {
		return 0, err
	}
	if err := s.process.Wait(); err != nil {
		return 0, fmt.Errorf("serve: %w: %s", err, s.said.String())
	}
	return s.atRest()
}

// atRest is what the file takes; of a disk, the slots in use.
func (s *server) atRest() (int64, error) {
	if s.store == storeFile {
		var st unix.Stat_t
		err := unix.Stat(storeFile, &st)
		return st.Blocks * 512, err
	}
	out, err := exec.Command(program, "info", "--json", s.store).Output()
	if err != nil {
		return 0, fmt.Errorf("info: %w", err)
	}
	var info struct {
		Stored int64 `json:"stored-bytes"`
	}
	err = json.Unmarshal(out, &info)
	return info.Stored, err
}

func (s *server) destroy() error {
	if s.store != storeFile {
		return nil
	}
	return unix.Unmount("/mnt", 0)
}

// run runs a command to its end.
func run(name string, args ...string) error {
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, bytes.TrimSpace(out))
	}
	return nil
}

// await waits for what no descriptor tells of, for half a minute at most.
func await(what string, is func() bool) error {
	for began := time.Now(); !is(); time.Sleep(10 * time.Millisecond) {
		if time.Since(began) > 30*time.Second {
			return fmt.Errorf("waited for %s in vain", what)
		}
	}
	return nil
}
