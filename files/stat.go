package files

import (
	"fmt"
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
}

// StatOf returns what JSON says of f. A link whose target cannot be read has
// none.
func StatOf(f File) *StatJSON {
	a := f.Attr()
	s := &StatJSON{
		Type: TypeName(a.Mode), ID: a.ID, Mode: fmt.Sprintf("%04o", UnixMode(a.Mode)&0o7777),
		UID: a.UID, GID: a.GID, Links: a.Links, Size: a.Size,
		Modified: timeOrNil(a.Modified), Changed: timeOrNil(a.Changed), Accessed: timeOrNil(a.Accessed), Born: timeOrNil(a.Born),
	}
	if TypeName(a.Mode) == "symbolic link" {
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
