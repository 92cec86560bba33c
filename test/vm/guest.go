package vm

import (
	"bufio"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// guestInit is the first process of a guest.
//
//go:embed guest/init.sh
var guestInit string

// Options say what a guest is given.
type Options struct {
	Dir      string            // of the caller, for what the guest's qemu needs on disk
	Files    map[string]string // by their name below /job: files of the host
	Programs []string          // of the host, by name, with their libraries: what few guests need
	Script   string            // run by bash, in /job
	Disks    []string          // raw files of the host, changed in place
	Memory   int               // MiB, default 1536
	// Line is told every line the script prints, in order, by one goroutine.
	Line func(line string)
}

// A Machine is a running guest.
type Machine struct {
	cmd     *exec.Cmd
	console string
	errors  strings.Builder // of qemu
	ready   chan struct{}
	done    chan struct{} // qemu ended, and the fields below are set
	status  int           // of the script, -1 while unknown
	err     error
	cut     sync.Once
}

// ErrNoResult says that a guest stopped before its script ended: a panic, a
// power cut, or a time limit.
var ErrNoResult = errors.New("the guest stopped without a result")

// Boot starts a guest and returns at once. It is killed when ctx ends.
func (img *Image) Boot(ctx context.Context, o Options) (*Machine, error) {
	initrd := filepath.Join(o.Dir, "initrd")
	if err := img.writeInitrd(ctx, initrd, o); err != nil {
		return nil, err
	}
	m := &Machine{
		console: filepath.Join(o.Dir, "console"),
		ready:   make(chan struct{}),
		done:    make(chan struct{}),
		status:  -1,
	}
	m.cmd = exec.CommandContext(ctx, img.qemu, img.args(initrd, m.console, o)...)
	m.cmd.Env = append(os.Environ(), "TMPDIR="+o.Dir)
	m.cmd.Stderr = &m.errors
	m.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	m.cmd.WaitDelay = 5 * time.Second
	out, in, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer in.Close()
	m.cmd.ExtraFiles = []*os.File{in} // descriptor 3
	if err := m.cmd.Start(); err != nil {
		out.Close()
		return nil, err
	}
	go m.follow(out, o.Line)
	return m, nil
}

// writeInitrd writes the root and, as a second archive behind it, the test's
// files.
func (img *Image) writeInitrd(ctx context.Context, name string, o Options) error {
	root, err := os.Open(img.root)
	if err != nil {
		return err
	}
	defer root.Close()
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := io.Copy(f, root); err != nil {
		return err
	}
	c := newCPIO(f)
	c.dir("/job")
	c.bytes("/job/run.sh", []byte(o.Script), 0o644)
	for to, from := range o.Files {
		if err := c.file(filepath.Join("/job", to), from); err != nil {
			return err
		}
	}
	for _, name := range o.Programs {
		p, err := lookTool(name)
		if err != nil {
			return err
		}
		if err := addBinary(ctx, c, p); err != nil {
			return err
		}
	}
	if err := c.close(func() int64 { n, _ := f.Seek(0, io.SeekCurrent); return n }); err != nil {
		return err
	}
	return f.Close()
}

func (img *Image) args(initrd, console string, o Options) []string {
	memory := o.Memory
	if memory == 0 {
		memory = 1536
	}
	args := []string{
		"-M", "q35,sata=off,smbus=off,usb=off,vmport=off,graphics=off",
		"-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", strconv.Itoa(memory),
		"-kernel", img.kernel, "-initrd", initrd,
		"-append", "console=ttyS0 rdinit=/init reboot=t panic=-1 quiet loglevel=6 mitigations=off random.trust_cpu=on tsc=reliable",
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-serial", "file:" + console,
		"-device", "virtio-rng-pci", "-device", "virtio-serial-pci",
		// Not the chardev "stdio": it counts as closed at the end of its input.
		"-chardev", "file,id=out,path=/dev/fd/3", "-device", "virtserialport,chardev=out,name=out",
	}
	for i, disk := range o.Disks {
		id := fmt.Sprintf("d%d", i)
		// What the guest flushed is in the host's page cache, and that is all
		// a cut of the guest's power is about.
		args = append(args, "-drive", "id="+id+",file="+disk+",if=none,format=raw,cache=unsafe,discard=unmap",
			"-device", "virtio-blk-pci,drive="+id)
	}
	return args
}

// follow reads what the script prints until qemu ends.
func (m *Machine) follow(out *os.File, line func(string)) {
	defer out.Close()
	ready := sync.OnceFunc(func() { close(m.ready) })
	s := bufio.NewScanner(out)
	s.Buffer(nil, 1<<20)
	for s.Scan() {
		text := strings.TrimRight(s.Text(), "\r")
		if text == "ready" {
			ready()
		}
		if code, ok := strings.CutPrefix(text, "exit "); ok {
			if n, err := strconv.Atoi(code); err == nil {
				m.status = n
			}
		}
		if line != nil {
			line(text)
		}
	}
	m.err = m.cmd.Wait()
	close(m.done)
}

// WaitReady waits for the line "ready", at most for limit, and says whether
// it came.
func (m *Machine) WaitReady(limit time.Duration) bool {
	select {
	case <-m.ready:
		return true
	case <-m.done:
	case <-time.After(limit):
	}
	return false
}

// Wait waits for the guest to end and returns the status of its script. The
// error wraps ErrNoResult when there is none.
func (m *Machine) Wait() (status int, err error) {
	<-m.done
	if m.status >= 0 {
		return m.status, nil
	}
	return -1, fmt.Errorf("%w (qemu: %v %s)", ErrNoResult, m.err, strings.TrimSpace(m.errors.String()))
}

// Cut ends the guest at once, as a power cut does, and returns when it is
// gone.
func (m *Machine) Cut() {
	m.cut.Do(func() { m.cmd.Process.Kill() })
	<-m.done
}

// CPU returns the processor time that the guest has taken, once it is gone.
func (m *Machine) CPU() time.Duration {
	<-m.done
	return m.cmd.ProcessState.UserTime() + m.cmd.ProcessState.SystemTime()
}

// Console returns what the guest's kernel has logged so far.
func (m *Machine) Console() string {
	b, _ := os.ReadFile(m.console)
	return string(b)
}
