// Demo is the helper of scripts/demo: it does without root or packages what a
// user would do with mkfs and mount.
//
//	demo image FILE DIR     make FILE, an ext4 filesystem with the files of DIR
//	demo put SOCKET PATH    write standard input to a new file at PATH in the
//	                        filesystem that a server exports at SOCKET
package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"time"

	"github.com/diskfs/go-diskfs/backend"
	"github.com/diskfs/go-diskfs/backend/file"
	"github.com/diskfs/go-diskfs/filesystem/ext4"

	"github.com/cowdev/cowdev/internal/nbdclient"
)

const imageSize = 64 << 20

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	switch {
	case len(args) == 3 && args[0] == "image":
		return makeImage(args[1], os.DirFS(args[2]))
	case len(args) == 3 && args[0] == "put":
		return put(args[1], args[2], os.Stdin)
	}
	return errors.New("usage: demo image FILE DIR | demo put SOCKET PATH")
}

func makeImage(name string, from fs.FS) error {
	storage, err := file.CreateFromPath(name, imageSize)
	if err != nil {
		return err
	}
	defer storage.Close()
	fsys, err := ext4.Create(storage, imageSize, 0, 512, nil)
	if err != nil {
		return err
	}
	return fs.WalkDir(from, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || name == "." {
			return err
		}
		if d.IsDir() {
			return fsys.Mkdir(name)
		}
		if !d.Type().IsRegular() {
			return nil
		}
		f, err := from.Open(name)
		if err != nil {
			return err
		}
		defer f.Close()
		return write(fsys, path.Join("/", name), f)
	})
}

// put writes a file through NBD: every block that the filesystem changes goes
// to the server as a write request.
func put(socket, name string, content io.Reader) error {
	c, err := nbdclient.Dial("unix", socket)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.Go(""); err != nil {
		return err
	}
	fsys, err := ext4.Read(&remote{Client: c}, c.Size, 0, 512)
	if err != nil {
		return err
	}
	if err := write(fsys, name, content); err != nil {
		return err
	}
	if err := c.Flush(); err != nil {
		return err
	}
	return c.Disconnect()
}

func write(fsys *ext4.FileSystem, name string, content io.Reader) error {
	f, err := fsys.OpenFile(name, os.O_CREATE|os.O_RDWR)
	if err != nil {
		return err
	}
	if _, err := io.Copy(f, content); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return f.Close()
}

// remote is a server's export as the storage of a filesystem.
type remote struct {
	*nbdclient.Client
	pos int64
}

var _ backend.WritableFile = (*remote)(nil)

func (r *remote) Stat() (fs.FileInfo, error)              { return remoteInfo{r.Size}, nil }
func (r *remote) Sys() (*os.File, error)                  { return nil, backend.ErrNotSuitable }
func (r *remote) Writable() (backend.WritableFile, error) { return r, nil }
func (r *remote) Path() string                            { return "" }
func (r *remote) Close() error                            { return nil }

func (r *remote) Read(p []byte) (int, error) {
	n, err := r.ReadAt(p, r.pos)
	r.pos += int64(n)
	return n, err
}

func (r *remote) Seek(off int64, whence int) (int64, error) {
	switch whence {
	case io.SeekCurrent:
		off += r.pos
	case io.SeekEnd:
		off += r.Size
	}
	r.pos = off
	return off, nil
}

// remoteInfo says that the export is a regular file, as far as a filesystem is
// concerned.
type remoteInfo struct{ size int64 }

func (i remoteInfo) Name() string       { return "export" }
func (i remoteInfo) Size() int64        { return i.size }
func (i remoteInfo) Mode() fs.FileMode  { return 0o600 }
func (i remoteInfo) ModTime() time.Time { return time.Time{} }
func (i remoteInfo) IsDir() bool        { return false }
func (i remoteInfo) Sys() any           { return nil }
