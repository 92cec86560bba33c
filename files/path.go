package files

import (
	"errors"
	"fmt"
	"io/fs"
	"path"
	"strings"
)

// maxLinks is how many symbolic links a path may lead through, as in Linux.
const maxLinks = 40

// maxDepth is how deep Walk goes; a path of a mounted system is shorter.
const maxDepth = 2048

// Lookup returns the file that path names from the root of fsys, a leading
// slash or not. Symbolic links on the way are followed inside the image, and
// the last one too when follow is set. The error of an absent path is
// fs.ErrNotExist, with the path.
func Lookup(fsys FS, name string, follow bool) (File, error) {
	f, err := lookup(fsys, name, follow)
	if err != nil {
		var pe *fs.PathError
		if errors.As(err, &pe) {
			return nil, err
		}
		return nil, &fs.PathError{Op: "look up", Path: name, Err: err}
	}
	return f, nil
}

func lookup(fsys FS, name string, follow bool) (File, error) {
	root, err := fsys.Root()
	if err != nil {
		return nil, err
	}
	trail := []File{root} // from the root to where we are
	todo := parts(name)
	for links := 0; len(todo) > 0; {
		part := todo[0]
		todo = todo[1:]
		if part == ".." {
			trail = trail[:max(1, len(trail)-1)]
			continue
		}
		here := trail[len(trail)-1]
		if !here.Attr().Mode.IsDir() {
			return nil, fmt.Errorf("%q stands in no directory: %w", part, fs.ErrNotExist)
		}
		f, err := here.Child(part)
		if err != nil {
			return nil, err
		}
		if f.Attr().Mode&fs.ModeSymlink == 0 || (len(todo) == 0 && !follow) {
			trail = append(trail, f)
			continue
		}
		if links++; links > maxLinks {
			return nil, fmt.Errorf("more than %d symbolic links", maxLinks)
		}
		target, err := f.Link()
		if err != nil {
			return nil, err
		}
		if strings.HasPrefix(target, "/") {
			trail = trail[:1]
		}
		todo = append(parts(target), todo...)
	}
	return trail[len(trail)-1], nil
}

// parts cuts a path at its slashes, without empty parts and ".".
func parts(name string) []string {
	var out []string
	for p := range strings.SplitSeq(name, "/") {
		if p != "" && p != "." {
			out = append(out, p)
		}
	}
	return out
}

// Walk calls visit for f, whose path is name, and for every file below it, a
// directory before what it holds and names in order. Links are not followed.
// visit may return fs.SkipDir for a directory that shall not be entered; of
// another file it means nothing. A
// directory that is met twice ends the walk with ErrDamaged.
func Walk(name string, f File, visit func(name string, f File) error) error {
	w := walker{visit: visit, seen: map[uint64]bool{}}
	return w.walk(name, f, 0)
}

type walker struct {
	visit func(name string, f File) error
	seen  map[uint64]bool // directories by ID
}

func (w *walker) walk(name string, f File, depth int) error {
	err := w.visit(name, f)
	switch a := f.Attr(); {
	case errors.Is(err, fs.SkipDir):
		return nil
	case err != nil || !a.Mode.IsDir():
		return err
	case depth > maxDepth || a.ID != 0 && w.seen[a.ID]:
		return loopError(name)
	default:
		w.seen[a.ID] = true
	}
	entries, err := f.ReadDir()
	if err != nil {
		return fmt.Errorf("list %s: %w", name, err)
	}
	for _, e := range entries {
		sub := path.Join(name, e.Name)
		child, err := f.Child(e.Name)
		if err != nil {
			return fmt.Errorf("open %s: %w", sub, err)
		}
		if err := w.walk(sub, child, depth+1); err != nil {
			return err
		}
	}
	return nil
}

func loopError(name string) error {
	return fmt.Errorf("%w: directory %s stands in two places or in itself", ErrDamaged, name)
}
