package files

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"strings"
)

// Status says what became of a file.
type Status uint8

// The statuses of a change.
const (
	Added      Status = iota // the path is new
	Removed                  // the path is gone
	Modified                 // another content: bytes, link target or device number
	Renamed                  // a path is gone, a new one has the same file
	Attributes               // the same content, other attributes
)

var statusNames = [...]string{"added", "removed", "modified", "renamed", "attributes"}

func (s Status) String() string { return statusNames[s] }

// MarshalText makes JSON say the name.
func (s Status) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// Aspect is a set of the things in which two files differ.
type Aspect uint16

// The aspects of a difference.
const (
	Content Aspect = 1 << iota // bytes of a regular file
	Target                     // of a symbolic link
	Device                     // major and minor number
	Mode                       // permission bits
	Owner                      // user
	Group
	Time   // of modification
	Xattrs // extended attributes, ACLs among them
	Links  // which other paths are names of the same file
)

var aspectNames = [...]string{"content", "target", "device", "mode", "owner", "group", "mtime", "xattrs", "links"}

// Names returns the aspects in a.
func (a Aspect) Names() []string {
	names := []string{}
	for i, name := range aspectNames {
		if a>>i&1 != 0 {
			names = append(names, name)
		}
	}
	return names
}

func (a Aspect) String() string { return strings.Join(a.Names(), ", ") }

// MarshalJSON makes a list of names.
func (a Aspect) MarshalJSON() ([]byte, error) { return json.Marshal(a.Names()) }

// contents are the aspects that make a file Modified.
const contents = Content | Target | Device

// A Change is a path whose file differs between two trees.
type Change struct {
	Status Status
	Path   string // in the new tree, of a removed file in the old one
	From   string // the path in the old tree, where it is another one
	LinkTo string // where the new file is told by another path already: that path
	Differ Aspect // of a file that is in both

	// Bytes is how many bytes of a regular file's content changed: those that
	// differ and those beyond the shorter content; all of an added or removed
	// file's. A file with several paths counts at one of them.
	Bytes int64

	Old, New File // nil in a tree that has no such file
}

// file returns the new file, of a removed path the old one.
func (c *Change) file() File {
	if c.New != nil {
		return c.New
	}
	return c.Old
}

// Attr returns the attributes of the new file, of a removed path the old one's.
func (c *Change) Attr() Attr { return c.file().Attr() }

// String returns the change as a line of text.
func (c *Change) String() string {
	name := Quote(c.Path)
	if c.Status == Renamed {
		name = Quote(c.From) + " -> " + name
	}
	var notes []string
	differ := c.Differ
	if c.LinkTo != "" {
		notes = append(notes, "link to "+Quote(c.LinkTo))
	} else if differ&Content != 0 {
		notes = append(notes, fmt.Sprintf("%d bytes", c.Bytes))
		differ &^= Content
	}
	if differ != 0 {
		notes = append(notes, differ.String())
	}
	if mode := c.Attr().Mode; len(notes) == 0 && (c.Status == Added || c.Status == Removed) {
		if mode.IsRegular() {
			notes = append(notes, fmt.Sprintf("%d bytes", c.Attr().Size))
		} else {
			notes = append(notes, TypeName(mode))
		}
	}
	if len(notes) == 0 {
		return fmt.Sprintf("%-10s %s", c.Status, name)
	}
	return fmt.Sprintf("%-10s %s  (%s)", c.Status, name, strings.Join(notes, "; "))
}

// MarshalJSON makes an object of the change; times are RFC 3339.
func (c *Change) MarshalJSON() ([]byte, error) {
	v := struct {
		Status Status    `json:"status"`
		Path   string    `json:"path"`
		From   string    `json:"from,omitempty"`
		LinkTo string    `json:"link-to,omitempty"`
		Type   string    `json:"type"`
		Differ Aspect    `json:"differ"`
		Bytes  int64     `json:"bytes-changed"`
		Old    *StatJSON `json:"old,omitempty"`
		New    *StatJSON `json:"new,omitempty"`
	}{c.Status, c.Path, c.From, c.LinkTo, TypeName(c.Attr().Mode), c.Differ, c.Bytes, nil, nil}
	if c.Old != nil {
		v.Old = StatOf(c.Old)
	}
	if c.New != nil {
		v.New = StatOf(c.New)
	}
	return json.Marshal(v)
}

// Quote returns a path as it is, or as a quoted Go string where it holds
// something that does not print.
func Quote(name string) string {
	q := fmt.Sprintf("%q", name)
	if q[1:len(q)-1] == name {
		return name
	}
	return q
}

// differ returns in what the attributes of two files of one kind differ,
// their content aside.
func differ(a, b File) (Aspect, error) {
	var d Aspect
	x, y := a.Attr(), b.Attr()
	for _, t := range []struct {
		aspect Aspect
		same   bool
	}{
		// The permissions of a link mean nothing.
		{Mode, UnixMode(x.Mode) == UnixMode(y.Mode) || x.Mode&fs.ModeSymlink != 0},
		{Owner, x.UID == y.UID},
		{Group, x.GID == y.GID},
		{Time, x.Modified.Equal(y.Modified)},
		{Device, x.Major == y.Major && x.Minor == y.Minor},
	} {
		if !t.same {
			d |= t.aspect
		}
	}
	if x.Mode&fs.ModeSymlink != 0 && !Encrypted(a) && !Encrypted(b) {
		to, err := a.Link()
		if err != nil {
			return 0, err
		}
		now, err := b.Link()
		if err != nil {
			return 0, err
		}
		if to != now {
			d |= Target
		}
	}
	old, err := a.Xattrs()
	if err != nil {
		return 0, err
	}
	now, err := b.Xattrs()
	if err != nil {
		return 0, err
	}
	if !maps.EqualFunc(old, now, bytes.Equal) {
		d |= Xattrs
	}
	return d, nil
}

// A Summary counts changes.
type Summary struct {
	Added      int   `json:"added"`
	Removed    int   `json:"removed"`
	Modified   int   `json:"modified"`
	Renamed    int   `json:"renamed"`
	Attributes int   `json:"attributes"`
	Bytes      int64 `json:"bytes-changed"`
}

// Summary counts the changes.
func (r *Result) Summary() Summary {
	var s Summary
	counts := [...]*int{Added: &s.Added, Removed: &s.Removed, Modified: &s.Modified, Renamed: &s.Renamed, Attributes: &s.Attributes}
	for _, ch := range r.Changes {
		*counts[ch.Status]++
		s.Bytes += ch.Bytes
	}
	return s
}

// sortChanges puts changes in the order of their paths, a removed file before
// one added in its place.
func sortChanges(changes []*Change) {
	slices.SortStableFunc(changes, func(a, b *Change) int {
		return cmp.Or(comparePaths(a.Path, b.Path), -cmp.Compare(a.Status, b.Status))
	})
}

// comparePaths orders a directory right before what it holds.
func comparePaths(a, b string) int {
	for i := 0; i < len(a) && i < len(b); i++ {
		switch {
		case a[i] == b[i]:
		case a[i] == '/':
			return -1
		case b[i] == '/':
			return 1
		default:
			return cmp.Compare(a[i], b[i])
		}
	}
	return cmp.Compare(len(a), len(b))
}
