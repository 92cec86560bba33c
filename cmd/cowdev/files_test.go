package main

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cowdev/cowdev/block"
	"github.com/cowdev/cowdev/cow"
	"github.com/cowdev/cowdev/exception"
	"github.com/cowdev/cowdev/image"
	"github.com/cowdev/cowdev/internal/disk"
	"github.com/cowdev/cowdev/nbdserver"
)

// The verbs that look into file systems, on a base, through its overlay and
// through the overlay's server: the same answers on all ways.

// lookFixture is a base and an overlay in which files changed: etc/passwd was
// edited, etc/new added, gone removed.
type lookFixture struct {
	dir, base, cow, server string
	flags                  []string // of every verb: --partition
}

// newLookFixture makes images that the file system fills, or partitioned ones.
func newLookFixture(t *testing.T, partitioned bool) *lookFixture {
	t.Helper()
	dir, err := os.MkdirTemp("", "look")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	x := &lookFixture{dir: dir, base: filepath.Join(dir, "base.img"), cow: filepath.Join(dir, "cow.img")}
	tree := filepath.Join(dir, "tree")
	must(t, os.MkdirAll(filepath.Join(tree, "etc"), 0o755))
	must(t, os.WriteFile(filepath.Join(tree, "etc/passwd"), []byte("root\nnobody\n"), 0o644))
	must(t, os.WriteFile(filepath.Join(tree, "gone"), []byte("old"), 0o644))
	must(t, os.Symlink("passwd", filepath.Join(tree, "etc/link")))
	tool(t, "mke2fs", "-q", "-F", "-t", "ext4", "-d", tree, x.base, "16M")

	changed := filepath.Join(dir, "changed.img")
	tool(t, "cp", x.base, changed)
	must(t, os.WriteFile(filepath.Join(dir, "passwd"), []byte("root\nsomebody\n"), 0o644))
	must(t, os.WriteFile(filepath.Join(dir, "script"), []byte(
		"rm gone\nrm etc/passwd\nwrite "+dir+"/passwd etc/passwd\nwrite "+dir+"/passwd etc/new\n"), 0o644))
	tool(t, "debugfs", "-w", "-f", filepath.Join(dir, "script"), changed)
	if partitioned {
		x.flags = []string{"--partition", "1"}
		x.partition(t, x.base)
		x.partition(t, changed)
	}
	x.overlay(t, changed)
	return x
}

// partition turns an image into the first partition of a disk.
func (x *lookFixture) partition(t *testing.T, name string) {
	t.Helper()
	content, err := os.ReadFile(name)
	must(t, err)
	const start = 1 << 20
	whole := append(make([]byte, start), content...)
	// By hand: sfdisk would sync every disk of the machine.
	entry := whole[446:]
	entry[4] = 0x83 // Linux
	binary.LittleEndian.PutUint32(entry[8:], start/512)
	binary.LittleEndian.PutUint32(entry[12:], uint32(len(content)/512))
	whole[510], whole[511] = 0x55, 0xaa
	must(t, os.WriteFile(name, whole, 0o644))
	must(t, os.Truncate(name, start+int64(len(content))+start))
}

// overlay makes the store in which the base looks like changed.
func (x *lookFixture) overlay(t *testing.T, changed string) {
	t.Helper()
	if status := run([]string{"cowdev", "create", x.base, x.cow}, io.Discard, os.Stderr); status != 0 {
		t.Fatalf("create: status %d", status)
	}
	base, device, done := x.open(t)
	defer done()
	want, err := os.ReadFile(changed)
	must(t, err)
	const unit = 4096
	have := make([]byte, unit)
	for off := 0; off < len(want); off += unit {
		_, err := base.ReadAt(have, int64(off))
		must(t, err)
		if !bytes.Equal(have, want[off:off+unit]) {
			_, err := device.WriteAt(want[off:off+unit], int64(off))
			must(t, err)
		}
	}
}

// open opens the pair as a device.
func (x *lookFixture) open(t *testing.T) (*image.Base, *cow.Device, func()) {
	t.Helper()
	base, err := image.Open(x.base, image.Options{})
	must(t, err)
	f, err := disk.OpenOS(x.cow, os.O_RDWR)
	must(t, err)
	must(t, f.Lock(false))
	store, err := exception.Open(f, exception.Options{})
	must(t, err)
	return base, cow.New(base, store, cow.Options{}), func() { must(t, errors.Join(store.Close(), base.Close())) }
}

// serve serves the pair until the test ends.
func (x *lookFixture) serve(t *testing.T) {
	t.Helper()
	_, device, done := x.open(t)
	x.server = filepath.Join(x.dir, "s")
	l, err := net.Listen("unix", x.server)
	must(t, err)
	s, err := nbdserver.New(nbdserver.Config{Exports: []nbdserver.Export{{Device: block.Device(device)}}})
	must(t, err)
	ended := make(chan struct{})
	go func() { defer close(ended); _ = s.Serve(l) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := s.Shutdown(ctx); err != nil {
			t.Errorf("shut the server down: %v", err)
		}
		<-ended
		done()
	})
}

// cowdev runs a command line and returns what it prints; the status must be
// the one given.
func (x *lookFixture) cowdev(t *testing.T, status int, args ...string) string {
	t.Helper()
	var out, messages bytes.Buffer
	args = append(args, x.flags...)
	if got := run(append([]string{"cowdev"}, args...), &out, &messages); got != status {
		t.Errorf("cowdev %s: status %d, expected %d\n%s%s", strings.Join(args, " "), got, status, out.String(), messages.String())
	}
	return out.String()
}

func tool(t *testing.T, name string, args ...string) {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		path = filepath.Join("/usr/sbin", name)
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = time.Second
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestLookInto(t *testing.T) {
	t.Run("whole", func(t *testing.T) { testLookInto(t, newLookFixture(t, false)) })
	t.Run("partition", func(t *testing.T) { testLookInto(t, newLookFixture(t, true)) })
}

func testLookInto(t *testing.T, x *lookFixture) {
	if got := x.cowdev(t, 0, "ls", x.base, "/etc"); got != "link\npasswd\n" {
		t.Errorf("ls of the base: %q", got)
	}
	if got := x.cowdev(t, 0, "cat", x.base, "/etc/link"); got != "root\nnobody\n" {
		t.Errorf("cat of the base: %q", got)
	}
	x.overlaid(t, x.base, "--cow", x.cow)
	x.changed(t, x.cow)

	x.serve(t)
	x.overlaid(t, x.server)
	x.changed(t, "nbd+unix:///?socket="+x.server)
	x.cowdev(t, exitLocked, "ls", "--cow", x.cow, x.base)

	other := filepath.Join(x.dir, "other.img")
	tool(t, "cp", x.base, other)
	f, err := os.OpenFile(other, os.O_WRONLY, 0)
	must(t, err)
	_, err = f.WriteAt([]byte("another base"), 8192)
	must(t, errors.Join(err, f.Close()))
	x.cowdev(t, exitWrongBase, "why", other, x.server)
}

// overlaid looks at the changed files.
func (x *lookFixture) overlaid(t *testing.T, device string, flags ...string) {
	t.Helper()
	with := func(verb string, args ...string) []string {
		return append(append([]string{verb}, flags...), append([]string{device}, args...)...)
	}
	if got := x.cowdev(t, 0, with("ls", "/etc")...); got != "link\nnew\npasswd\n" {
		t.Errorf("ls: %q", got)
	}
	if got := x.cowdev(t, 0, with("cat", "/etc/link")...); got != "root\nsomebody\n" {
		t.Errorf("cat: %q", got)
	}
	var st struct {
		Type    string
		Size    int64
		Overlay int64 `json:"overlay-bytes"`
	}
	must(t, json.Unmarshal([]byte(x.cowdev(t, 0, with("stat", "/etc/new", "--json")...)), &st))
	if st.Type != "regular file" || st.Size != 14 || st.Overlay < 1024 {
		t.Errorf("stat: %+v", st)
	}
	out := t.TempDir()
	x.cowdev(t, 0, with("cp", "-r", "/etc", out)...)
	if got, err := os.ReadFile(filepath.Join(out, "etc/link")); err != nil || string(got) != "root\nsomebody\n" {
		t.Errorf("cp: %q, %v", got, err)
	}
	x.cowdev(t, exitFile, with("cp", "/etc/new", filepath.Join(out, "etc/new"))...)
	x.cowdev(t, exitFile, with("cat", "/nothing")...)
	x.cowdev(t, exitUsage, with("cp", "/etc", out)...)
}

// changed asks what changed, of the overlay at cowPath.
func (x *lookFixture) changed(t *testing.T, cowPath string) {
	t.Helper()
	got := x.cowdev(t, exitFailure, "diff", "--files", x.base, cowPath)
	for _, want := range []string{"added      /etc/new", "modified   /etc/passwd", "removed    /gone"} {
		if !strings.Contains(got, want) {
			t.Errorf("diff --files has no line %q:\n%s", want, got)
		}
	}
	if all := x.cowdev(t, exitFailure, "diff", "--files", "--all", x.base, cowPath); all != got {
		t.Errorf("diff --files --all:\n%s\nexpected\n%s", all, got)
	}
	if got := x.cowdev(t, exitFailure, "diff", "--files", "--content", x.base, cowPath); !strings.Contains(got, "-nobody\n+somebody\n") {
		t.Errorf("diff --content:\n%s", got)
	}
	if got := x.cowdev(t, exitFailure, "diff", "--files", "--stat", x.base, cowPath); !strings.Contains(got, "1 added, 1 removed, 1 modified") {
		t.Errorf("diff --stat:\n%s", got)
	}
	var js struct {
		Changes []struct{ Path, Status string }
		Summary struct{ Added int }
	}
	must(t, json.Unmarshal([]byte(x.cowdev(t, exitFailure, "diff", "--files", "--json", x.base, cowPath)), &js))
	if js.Summary.Added != 1 || len(js.Changes) < 3 {
		t.Errorf("diff --json: %+v", js)
	}
	names := map[string]bool{}
	for r := tar.NewReader(strings.NewReader(x.cowdev(t, exitFailure, "diff", "--files", "--tar", "-", x.base, cowPath))); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		must(t, err)
		names[h.Name] = true
	}
	if !names[".wh.gone"] || !names["etc/new"] || !names["etc/passwd"] || names["etc/link"] {
		t.Errorf("the layer holds %v", names)
	}
	var why struct {
		Total              struct{ Stored int64 }
		Files, Directories []struct{ Path string }
	}
	must(t, json.Unmarshal([]byte(x.cowdev(t, 0, "why", "--json", x.base, cowPath)), &why))
	if why.Total.Stored == 0 || len(why.Files) < 2 || len(why.Directories) < 2 {
		t.Errorf("why: %+v", why)
	}
}

// A directory that is encrypted is named in one line, all else is seen, and the
// status is that of what cannot be read.
func TestLookEncrypted(t *testing.T) {
	dir := t.TempDir()
	x := &lookFixture{dir: dir, base: filepath.Join(dir, "base.img"), cow: filepath.Join(dir, "cow.img")}
	tree := filepath.Join(dir, "tree")
	must(t, os.MkdirAll(filepath.Join(tree, "secret"), 0o755))
	must(t, os.WriteFile(filepath.Join(tree, "secret/name"), []byte("content"), 0o644))
	must(t, os.WriteFile(filepath.Join(tree, "plain"), []byte("plain"), 0o644))
	tool(t, "mke2fs", "-q", "-F", "-t", "ext4", "-O", "encrypt", "-d", tree, x.base, "16M")
	for _, name := range []string{"secret", "secret/name"} {
		tool(t, "debugfs", "-w", "-R", "set_inode_field "+name+" flags 0x80800", x.base)
	}
	changed := filepath.Join(dir, "changed.img")
	tool(t, "cp", x.base, changed)
	tool(t, "debugfs", "-w", "-R", "write "+filepath.Join(tree, "plain")+" new", changed)
	tool(t, "debugfs", "-w", "-R", "set_inode_field secret/name mtime 20200101", changed)
	x.overlay(t, changed)

	expect := func(stdout, message string, args ...string) {
		t.Helper()
		var out, messages bytes.Buffer
		got := run(append([]string{"cowdev"}, args...), &out, &messages)
		if got != exitFile || out.String() != stdout || messages.String() != message {
			t.Errorf("cowdev %s: status %d, expected %d\n%s%s\nexpected\n%s%s", strings.Join(args, " "), got, exitFile, &out, &messages, stdout, message)
		}
	}
	told := "cowdev: /secret: encrypted, not looked into\n"
	expect("added      /new  (5 bytes)\n", told, "diff", "--files", x.base, x.cow)
	expect("added      /new  (5 bytes)\n", told, "diff", "--files", "--all", x.base, x.cow)
	if out := x.cowdev(t, exitFile, "diff", "--files", "--json", x.base, x.cow); !strings.Contains(out, "\"encrypted\": [\n    \"/secret\"\n  ]") {
		t.Errorf("JSON does not name what is encrypted:\n%s", out)
	}
	expect("/\n/lost+found\n/plain\n/secret\n", told, "ls", "--recursive", x.base, "/")
	x.cowdev(t, exitDone, "ls", x.base, "/")
	to := filepath.Join(dir, "to")
	expect("", "cowdev: "+to+"/secret: encrypted, not looked into\n", "cp", "--recursive", x.base, "/", to)
	if p, err := os.ReadFile(filepath.Join(to, "plain")); err != nil || string(p) != "plain" {
		t.Errorf("the file beside what is encrypted holds %q, %v", p, err)
	}
}

func TestLookUsage(t *testing.T) {
	x := newLookFixture(t, false)
	x.cowdev(t, exitUsage, "ls")
	x.cowdev(t, exitUsage, "cat", x.base)
	x.cowdev(t, exitUsage, "why", x.base, x.cow, "--top", "-1")
	x.cowdev(t, exitFile, "ls", filepath.Join(x.dir, "nothing"))
	x.cowdev(t, exitFile, "ls", filepath.Join(x.dir, "passwd"))
	x.cowdev(t, exitFile, "ls", "--partition", "1", x.base)
	x.cowdev(t, exitUsage, "diff", "--files", "--stat", "--json", x.base, x.cow)
}

// Where cp puts a file, and what it says where it cannot.
func TestCopyTo(t *testing.T) {
	x := newLookFixture(t, false)
	t.Chdir(t.TempDir())
	copied := func(status int, message string, args ...string) {
		t.Helper()
		var stderr bytes.Buffer
		got := run(append([]string{"cowdev", "cp", x.base, "/etc/passwd"}, args...), io.Discard, &stderr)
		if got != status || stderr.String() != message {
			t.Errorf("cp to %q: status %d, expected %d\n%sexpected\n%s", args, got, status, stderr.String(), message)
		}
	}
	must(t, os.Mkdir("dir", 0o700))
	for _, dest := range []string{"new/", "new/.", "new/.."} {
		copied(exitFile, "cowdev: "+dest+": expected a directory that exists; make it first: not a directory\n", dest)
	}
	if _, err := os.Lstat("new"); err == nil {
		t.Error("new/ made a file called new")
	}
	copied(exitDone, "", "dir/")
	copied(exitDone, "", "dir/other")
	copied(exitFile, "cowdev: "+x.base+": copy to dir/passwd: file exists; --force replaces files and symbolic links\n", "dir")
	copied(exitFile, "cowdev: "+x.base+": copy to dir/other: file exists; --force replaces files and symbolic links\n", "dir/other")
	copied(exitDone, "", "dir/other", "--force")
	must(t, os.Symlink(x.base, "dir/base"))
	copied(exitUsage, "cowdev: cp: dir/base is "+x.base+" itself; give another name\n", "dir/base", "--force")
	copied(exitFile, "cowdev: dir/other/: expected a directory that exists; make it first: not a directory\n", "dir/other/")
}
