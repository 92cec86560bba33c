package vm

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"path"
)

// Modes of a cpio entry's type, as stat(2) has them.
const (
	cpioDir     = 0o040000
	cpioFile    = 0o100000
	cpioSymlink = 0o120000
	cpioChar    = 0o020000
)

// A cpioWriter writes an archive in the "newc" format, which the kernel
// unpacks as its first root. Parents are added as needed.
type cpioWriter struct {
	w    *bufio.Writer
	have map[string]bool
	ino  int
	err  error
}

func newCPIO(w io.Writer) *cpioWriter {
	return &cpioWriter{w: bufio.NewWriterSize(w, 1<<20), have: map[string]bool{"/": true, ".": true}}
}

// has reports whether the archive holds name, an absolute path.
func (c *cpioWriter) has(name string) bool { return c.have[path.Clean(name)] }

func (c *cpioWriter) dir(name string) {
	if name = path.Clean(name); c.have[name] {
		return
	}
	c.entry(name, cpioDir|0o755, 0, 0, 0)
}

func (c *cpioWriter) symlink(target, name string) {
	c.entry(name, cpioSymlink|0o777, int64(len(target)), 0, 0)
	c.data([]byte(target))
}

func (c *cpioWriter) char(name string, major, minor int) {
	c.entry(name, cpioChar|0o600, 0, major, minor)
}

func (c *cpioWriter) bytes(name string, data []byte, perm os.FileMode) {
	c.entry(name, cpioFile|int(perm.Perm()), int64(len(data)), 0, 0)
	c.data(data)
}

// file adds the host's file from, links followed, under name.
func (c *cpioWriter) file(name, from string) error {
	f, err := os.Open(from)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	c.entry(name, cpioFile|int(st.Mode().Perm()), st.Size(), 0, 0)
	if n, err := io.CopyN(c.w, f, st.Size()); err != nil {
		return fmt.Errorf("%s: read %d of %d bytes: %w", from, n, st.Size(), err)
	}
	c.pad(st.Size())
	return c.err
}

// close ends the archive. The kernel takes several, one after the other, when
// each fills whole blocks of 512 bytes.
func (c *cpioWriter) close(written func() int64) error {
	c.header("TRAILER!!!", 0, 0, 0, 0)
	if err := c.w.Flush(); err != nil {
		return err
	}
	if rest := written() % 512; rest != 0 {
		c.put(make([]byte, 512-rest))
	}
	if c.err != nil {
		return c.err
	}
	return c.w.Flush()
}

func (c *cpioWriter) entry(name string, mode int, size int64, major, minor int) {
	name = path.Clean(name)
	if parent := path.Dir(name); !c.have[parent] {
		c.dir(parent)
	}
	c.have[name] = true
	c.ino++
	c.header(name[1:], mode, size, major, minor)
}

// header writes an entry's head: a magic number and 13 fields of eight
// hexadecimal digits, then the name.
func (c *cpioWriter) header(name string, mode int, size int64, major, minor int) {
	head := fmt.Sprintf("070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%s\x00",
		c.ino, mode, 0, 0, 1, 0, size, 0, 0, major, minor, len(name)+1, 0, name)
	c.put([]byte(head))
	c.pad(int64(len(head)))
}

func (c *cpioWriter) data(b []byte) {
	c.put(b)
	c.pad(int64(len(b)))
}

// pad fills up to a multiple of four what had n bytes and began at one.
func (c *cpioWriter) pad(n int64) { c.put(make([]byte, -n&3)) }

func (c *cpioWriter) put(b []byte) {
	if _, err := c.w.Write(b); err != nil && c.err == nil {
		c.err = err
	}
}
