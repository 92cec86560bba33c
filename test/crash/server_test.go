package crash

// The real program as the host of a walk: `cowdev serve` over a FUSE file.

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/cowdev/cowdev/block"
	"github.com/cowdev/cowdev/exception"
	"github.com/cowdev/cowdev/image"
	"github.com/cowdev/cowdev/internal/crash"
	"github.com/cowdev/cowdev/internal/disk"
	"github.com/cowdev/cowdev/internal/disktest"
	"github.com/cowdev/cowdev/internal/nbd"
	"github.com/cowdev/cowdev/internal/nbdclient"
)

// patience is how long anything is waited for.
const patience = time.Minute

// program is the binary under test, built by TestMain.
var program string

func TestMain(m *testing.M) { os.Exit(testMain(m)) }

func testMain(m *testing.M) int {
	dir, err := os.MkdirTemp("", "cowdev-crash-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	program = filepath.Join(dir, "cowdev")
	if out, err := command(5*time.Minute, "go", "build", "-o", program, "github.com/cowdev/cowdev/cmd/cowdev"); err != nil {
		fmt.Fprintf(os.Stderr, "build of cowdev: %v\n%s", err, out)
		return 1
	}
	return m.Run()
}

// command runs a command to its end, at most for a time, and returns what it
// prints.
func command(limit time.Duration, name string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 10 * time.Second
	out, err := cmd.CombinedOutput()
	if ctx.Err() != nil {
		err = fmt.Errorf("%s: not done within %v", name, limit)
	}
	return string(out), err
}

// exitStatus returns the status that a command's error tells, -1 for another.
func exitStatus(err error) int {
	var ee *exec.ExitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &ee):
		return ee.ExitCode()
	}
	return -1
}

// A known is a device with the bytes that it must read as.
type known struct {
	dev     *nbdDevice
	content []byte
	stamp   uint64 // of the last write
}

// newKnown returns a known of size zeros, without its device.
func newKnown(size int) known { return known{content: make([]byte, size), stamp: crash.BaseStamp} }

// write writes n bytes at off, and remembers them if they were taken.
func (k *known) write(off int64, n int) error {
	k.stamp++
	p := make([]byte, n)
	crash.Stamp(p, off, k.stamp)
	_, err := k.dev.WriteAt(p, off)
	if err == nil {
		copy(k.content[off:], p)
	}
	return err
}

// A server is a running `cowdev serve`.
type server struct {
	cmd    *exec.Cmd
	socket string
	exited chan struct{} // closed when it is

	mu   sync.Mutex
	said []string // lines on stderr
}

// serve starts `cowdev serve` and waits until it is ready.
func serve(dir string, args ...string) (*server, error) {
	s := &server{socket: filepath.Join(dir, "s"), exited: make(chan struct{})}
	os.Remove(s.socket)
	s.cmd = exec.Command(program, append([]string{"serve", "--quiet", "--socket", s.socket}, args...)...)
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	s.cmd.Stderr = s
	if err := s.cmd.Start(); err != nil {
		return nil, err
	}
	ready := make(chan error, 1)
	go func() {
		line, err := bufio.NewReader(out).ReadString('\n')
		if err == nil && !strings.HasPrefix(line, "ready: ") {
			err = fmt.Errorf("it says %q", line)
		}
		ready <- err
		s.cmd.Wait()
		close(s.exited)
	}()
	select {
	case err = <-ready:
	case <-time.After(patience):
		err = fmt.Errorf("nothing within %v", patience)
	}
	if err != nil {
		s.kill()
		s.wait()
		return nil, fmt.Errorf("cowdev serve is not ready: %w\n%s", err, s.stderr())
	}
	return s, nil
}

// Write takes what the server says on stderr.
func (s *server) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.said = append(s.said, string(p))
	return len(p), nil
}

func (s *server) stderr() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return strings.Join(s.said, "")
}

// kill is kill -9. It may be called any number of times.
func (s *server) kill() {
	select {
	case <-s.exited: // its number may be another's by now
	default:
		syscall.Kill(-s.cmd.Process.Pid, syscall.SIGKILL)
	}
}

// wait waits for the end of the process.
func (s *server) wait() error {
	select {
	case <-s.exited:
		return nil
	case <-time.After(patience):
		return fmt.Errorf("cowdev serve (pid %d) did not end within %v", s.cmd.Process.Pid, patience)
	}
}

// close ends the server in order.
func (s *server) close() error {
	s.cmd.Process.Signal(syscall.SIGTERM)
	if err := s.wait(); err != nil {
		return err
	}
	if code := s.cmd.ProcessState.ExitCode(); code != 0 {
		return s.failure(code)
	}
	return nil
}

// failure returns what the server said at last, with the error number of it.
func (s *server) failure(code int) error {
	lines := strings.Split(strings.TrimSpace(s.stderr()), "\n")
	last := lines[len(lines)-1]
	for _, no := range []syscall.Errno{syscall.EIO, syscall.ENOSPC} {
		if strings.Contains(last, no.Error()) {
			return fmt.Errorf("cowdev serve ended with status %d: %s (%w)", code, last, no)
		}
	}
	return fmt.Errorf("cowdev serve ended with status %d: %s", code, s.stderr())
}

// dial connects to the server.
func (s *server) dial() (*nbdDevice, error) {
	c, err := nbdclient.Dial("unix", s.socket)
	if err != nil {
		return nil, err
	}
	if err := c.Go(""); err != nil {
		c.Close()
		return nil, err
	}
	return &nbdDevice{c}, nil
}

// nbdDevice is an export as a block.Device.
type nbdDevice struct{ c *nbdclient.Client }

var _ block.BatchWriter = (*nbdDevice)(nil)

func (d *nbdDevice) Size() int64    { return d.c.Size }
func (d *nbdDevice) ReadOnly() bool { return d.c.Flags&nbd.FlagReadOnly != 0 }

func (d *nbdDevice) ReadAt(p []byte, off int64) (int, error) {
	n, err := d.c.ReadAt(p, off)
	return n, deviceError(err)
}

func (d *nbdDevice) WriteAt(p []byte, off int64) (int, error) {
	n, err := d.c.WriteAt(p, off)
	return n, deviceError(err)
}

// WriteBatch sends all of w at once, which the server gathers.
func (d *nbdDevice) WriteBatch(w []block.Write) {
	var data [][]byte
	var off []int64
	for _, w := range w {
		data, off = append(data, w.Data), append(off, w.Off)
	}
	errs, err := d.c.WriteAll(data, off)
	for i := range w {
		w[i].Err = err
		if err == nil {
			w[i].Err = deviceError(errs[i])
		}
	}
}

func (d *nbdDevice) WriteZeroes(off, n int64, flags block.ZeroFlags) error {
	var f uint16
	if flags&block.NoHole != 0 {
		f |= nbd.CmdFlagNoHole
	}
	if flags&block.FastZero != 0 {
		f |= nbd.CmdFlagFastZero
	}
	return deviceError(d.c.WriteZeroes(off, n, f))
}

func (d *nbdDevice) Trim(off, n int64) error  { return deviceError(d.c.Trim(off, n, 0)) }
func (d *nbdDevice) Flush() error             { return deviceError(d.c.Flush()) }
func (d *nbdDevice) Cache(off, n int64) error { return deviceError(d.c.Cache(off, n)) }

func (d *nbdDevice) Extents(int64, int64, int) ([]block.Extent, error) {
	return nil, errors.New("not asked for")
}

// deviceError turns an error of the protocol into the errno it carries.
func deviceError(err error) error {
	var ce *nbdclient.CommandError
	if errors.As(err, &ce) {
		return fmt.Errorf("%w: %w", err, syscall.Errno(ce.Errno))
	}
	return err
}

// programHost runs the device of a walk in the real program. The base is a
// file, the store's file is seen through FUSE.
type programHost struct {
	mount *mount
	dir   string // of the socket and the base
	base  string
	uuid  exception.UUID
	shm   exception.Shared // what the program has for the store
}

// storeInode is the number of the file in which all stores of a walk lie: the
// live table is found by it.
const storeInode = 1 << 40

func newProgramHost(t *testing.T, m *mount) *programHost {
	dir, err := os.MkdirTemp("", "cowdev-") // short, for the socket
	if err != nil {
		t.Fatal(err)
	}
	h := &programHost{mount: m, dir: dir, base: filepath.Join(dir, "base.img")}
	f, err := disk.OpenOS(m.showAs(disktest.New(1), storeInode), os.O_RDONLY)
	if err == nil {
		h.shm.File, err = f.Identity()
		f.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		os.RemoveAll(dir)
		h.NewMemory()
	})
	return h
}

// Params writes the base, and names it in the store.
func (h *programHost) Params(p *exception.Params) error {
	base := make([]byte, p.Size)
	crash.Stamp(base, 0, crash.BaseStamp)
	if err := os.WriteFile(h.base, base, 0o600); err != nil {
		return err
	}
	b, err := image.Open(h.base, image.Options{})
	if err != nil {
		return err
	}
	defer b.Close()
	id, err := b.Identify(image.DigestSample)
	if err != nil {
		return err
	}
	p.Base = id.Encode()
	p.UUID = exception.UUID{} // a random one: the memory is shared with other tests
	for i := range p.UUID {
		p.UUID[i] = byte(time.Now().UnixNano() >> (i % 8 * 8))
	}
	h.uuid = p.UUID
	return nil
}

func (h *programHost) NewMemory() exception.Memory {
	os.Remove(h.shm.Path(h.uuid))
	return h.shm
}

func (h *programHost) Start(f *disktest.File, m exception.Memory) (crash.Session, error) {
	s, err := exception.Open(f.Fork(nil), exception.Options{Memory: m})
	if err != nil {
		return nil, err
	}
	adopted := s.Adopted()
	if err := s.Abandon(); err != nil {
		return nil, err
	}
	server, err := serve(h.dir, "--existing", "--base-digest=sample", "--format=raw", h.base, h.mount.showAs(f, storeInode))
	if err != nil {
		return nil, err
	}
	return &programSession{host: h, server: server, adopted: adopted}, nil
}

type programSession struct {
	host    *programHost
	server  *server
	adopted bool
	clients []*nbdDevice
}

func (s *programSession) Device(int) (block.Device, error) {
	d, err := s.server.dial()
	if err == nil {
		s.clients = append(s.clients, d)
	}
	return d, err
}

func (s *programSession) Adopted() bool { return s.adopted }
func (s *programSession) Broken() bool  { return s.host.shm.Broken(s.host.uuid) }

// Memory is never told of the living: the file would have to be read while
// the program writes it.
func (s *programSession) Memory() exception.Memory { return nil }

func (s *programSession) Die() exception.Memory {
	s.server.kill()
	return s.host.shm
}

func (s *programSession) Close() error {
	s.hangUp()
	return s.server.close()
}

func (s *programSession) Bury() {
	s.hangUp()
	s.server.kill()
	s.server.wait()
}

func (s *programSession) hangUp() {
	for _, c := range s.clients {
		c.c.Close()
	}
	s.clients = nil
}
