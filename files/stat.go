package files

import (
	"fmt"
	"io/fs"
	"time"
)

// StatJSON is what JSON says of a file.
type StatJSON struct {
	Type     string     `json:"type"`
	ID       uint64     `json:"inode,omitempty"`
	Mode     string     `json:"mode"` // octal, with set-id and sticky bits
	UID      uint32     `json:"uid"`
	GID      uint32     `json:"gid"`
	Links    uint32     `json:"links"`
	Size     int64      `json:"size"`
	Device   string     `json:"device,omitempty"` // major:minor
	Target   string     `json:"target,omitempty"`
	Modified *time.Time `json:"modified,omitempty"`
	Changed  *time.Time `json:"changed,omitempty"`
	Accessed *time.Time `json:"accessed,omitempty"`
	Born     *time.Time `json:"born,omitempty"`

	mode fs.FileMode
}

// FileMode returns the mode and type.
func (s *StatJSON) FileMode() fs.FileMode { return s.mode }

// StatOf returns what JSON says of f. A link whose target cannot be read has
// none.
func StatOf(f File) *StatJSON {
	a := f.Attr()
	s := &StatJSON{
		Type: TypeName(a.Mode), ID: a.ID, Mode: fmt.Sprintf("%04o", UnixMode(a.Mode)&0o7777),
		UID: a.UID, GID: a.GID, Links: a.Links, Size: a.Size, mode: a.Mode,
		Modified: timeOrNil(a.Modified), Changed: timeOrNil(a.Changed), Accessed: timeOrNil(a.Accessed), Born: timeOrNil(a.Born),
	}
	if a.Mode&fs.ModeSymlink != 0 {
		s.Target, _ = f.Link()
	}
	if a.Major != 0 || a.Minor != 0 {
		s.Device = fmt.Sprintf("%d:%d", a.Major, a.Minor)
	}
	return s
}

// timeOrNil returns a time that is known, in UTC, else nil.
func timeOrNil(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	t = t.UTC()
	return &t
}

// A Place is a run of a file's bytes and where it lies, in bytes from the
// beginning of the file system.
type Place struct {
	Off       int64 `json:"offset"` // in the file
	Start     int64 `json:"start"`
	N         int64 `json:"length"`
	Unwritten bool  `json:"unwritten,omitempty"` // reads as zeros
}

// End returns the offset after the place.
func (p Place) End() int64 { return p.Start + p.N }

// Places returns where a file's bytes lie; what is left out is a hole, or in
// the inode. The error is ErrUnsupported for other than ext file systems.
func Places(f File) ([]Place, error) {
	x, ok := f.(*extFile)
	if !ok {
		return nil, fmt.Errorf("places of a file: %w", ErrUnsupported)
	}
	if !x.IsRegular() && !x.IsDir() {
		return nil, nil
	}
	extents, err := x.Extents()
	if err != nil {
		return nil, err
	}
	out := make([]Place, len(extents))
	for i, e := range extents {
		out[i] = Place{Off: e.Off, Start: e.Phys, N: e.N, Unwritten: e.Unwritten}
	}
	return out, nil
}
