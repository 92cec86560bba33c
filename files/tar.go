package files

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"
	"time"
)

// whiteout is put before the name of a removed file, as OCI's image layers
// have it.
const whiteout = ".wh."

// WriteTar writes what changed as a layer in OCI's convention: the added and
// changed files with all their attributes, the directories that lead to them,
// and an empty file ".wh.NAME" for each NAME that was removed. Of a file with
// several names all are written, the later ones as hard links. Sockets, which
// tar cannot hold, are left out and returned by path.
//
// Applied to the old tree the layer makes the new one.
func (r *Result) WriteTar(w io.Writer, newFS FS) (skipped []string, err error) {
	t := &tarWriter{tar: tar.NewWriter(w), fs: newFS, links: r.Links, names: map[string]File{}}
	if err := t.collect(r.flat); err != nil {
		return nil, err
	}
	if err := t.write(); err != nil {
		return nil, err
	}
	return t.skipped, t.tar.Close()
}

// tarWriter makes a layer.
type tarWriter struct {
	tar     *tar.Writer
	fs      FS
	links   map[uint64][]string
	names   map[string]File // what goes into the layer; nil for a whiteout
	skipped []string
}

// collect decides what goes into the layer.
func (t *tarWriter) collect(changes []*Change) error {
	added, removed := map[string]bool{}, map[string]bool{}
	for _, ch := range changes {
		switch ch.Status {
		case Added:
			added[ch.Path] = true
		case Removed:
			removed[ch.Path] = true
		}
	}
	for _, ch := range changes {
		dir, name := path.Split(ch.Path)
		if strings.HasPrefix(name, whiteout) {
			return fmt.Errorf("%s: a layer cannot hold a name that begins with %q", ch.Path, whiteout)
		}
		switch {
		case ch.Status != Removed:
			if err := t.add(ch.Path, ch.New); err != nil {
				return err
			}
		case !added[ch.Path] && !removed[path.Clean(dir)]:
			t.names[path.Join(dir, whiteout+name)] = nil
			if err := t.addParents(ch.Path); err != nil {
				return err
			}
		}
	}
	return nil
}

// add puts a file into the layer with its other names and the directories
// that lead to them.
func (t *tarWriter) add(name string, f File) error {
	names := []string{name}
	if a := f.Attr(); a.Links > 1 && !a.Mode.IsDir() && len(t.links[a.ID]) > 0 {
		names = t.links[a.ID]
	}
	for _, name := range names {
		t.names[name] = f
		if err := t.addParents(name); err != nil {
			return err
		}
	}
	return nil
}

func (t *tarWriter) addParents(name string) error {
	for dir := path.Dir(name); t.names[dir] == nil; dir = path.Dir(dir) {
		f, err := Lookup(t.fs, dir, false)
		if err != nil {
			return err
		}
		t.names[dir] = f
	}
	return nil
}

// write writes what was collected, in the order of the paths.
func (t *tarWriter) write() error {
	names := make([]string, 0, len(t.names))
	for name := range t.names {
		names = append(names, name)
	}
	slices.SortFunc(names, comparePaths)
	written := map[uint64]string{} // the first name of a file with several
	for _, name := range names {
		f := t.names[name]
		if f == nil {
			if err := t.tar.WriteHeader(&tar.Header{Name: name[1:], Typeflag: tar.TypeReg, Mode: 0o600, Format: tar.FormatPAX}); err != nil {
				return fmt.Errorf("write %s: %w", name, err)
			}
			continue
		}
		first := ""
		if a := f.Attr(); a.Links > 1 && a.ID != 0 && !a.Mode.IsDir() {
			if first = written[a.ID]; first == "" {
				written[a.ID] = name
			}
		}
		if err := t.file(name, f, first); err != nil {
			return fmt.Errorf("write %s: %w", name, err)
		}
	}
	return nil
}

// file writes one name; first is the name it is a hard link to, if any.
func (t *tarWriter) file(name string, f File, first string) error {
	h, err := tarHeader(name, f)
	if err != nil {
		return err
	}
	if h == nil {
		t.skipped = append(t.skipped, name)
		return nil
	}
	if first != "" {
		h.Typeflag, h.Linkname, h.Size = tar.TypeLink, first[1:], 0
		h.PAXRecords = nil
	}
	if err := t.tar.WriteHeader(h); err != nil {
		return err
	}
	if h.Typeflag != tar.TypeReg {
		return nil
	}
	_, err = io.Copy(t.tar, io.NewSectionReader(f, 0, h.Size))
	return err
}

// tarHeader makes the header of a file; nil for a socket.
func tarHeader(name string, f File) (*tar.Header, error) {
	a := f.Attr()
	h := &tar.Header{
		Name: name[1:], Mode: int64(UnixMode(a.Mode) & 0o7777), Uid: int(a.UID), Gid: int(a.GID),
		ModTime: a.Modified, Format: tar.FormatPAX,
	}
	if a.Modified.IsZero() {
		h.ModTime = time.Unix(0, 0)
	}
	switch a.Mode.Type() {
	case 0:
		h.Typeflag, h.Size = tar.TypeReg, a.Size
	case fs.ModeDir:
		h.Typeflag, h.Name = tar.TypeDir, strings.TrimPrefix(name[1:]+"/", "/")
		if h.Name == "" {
			h.Name = "./"
		}
	case fs.ModeSymlink:
		target, err := f.Link()
		if err != nil {
			return nil, err
		}
		h.Typeflag, h.Linkname = tar.TypeSymlink, target
	case fs.ModeDevice:
		h.Typeflag, h.Devmajor, h.Devminor = tar.TypeBlock, int64(a.Major), int64(a.Minor)
	case fs.ModeDevice | fs.ModeCharDevice:
		h.Typeflag, h.Devmajor, h.Devminor = tar.TypeChar, int64(a.Major), int64(a.Minor)
	case fs.ModeNamedPipe:
		h.Typeflag = tar.TypeFifo
	case fs.ModeSocket:
		return nil, nil
	default:
		return nil, errors.New("a file of unknown type")
	}
	xattrs, err := f.Xattrs()
	if err != nil {
		return nil, err
	}
	for key, value := range xattrs {
		if h.PAXRecords == nil {
			h.PAXRecords = map[string]string{}
		}
		h.PAXRecords["SCHILY.xattr."+key] = string(value)
	}
	return h, nil
}
