package attach

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cowdev/cowdev/internal/disk"
)

// Drivers of a State.
const (
	DriverNBD  = "nbd"
	DriverLoop = "loop"
)

// A State is what other processes have to know of an attached device.
type State struct {
	Device      string        `json:"device"` // /dev/nbd3
	Driver      string        `json:"driver"`
	UUID        string        `json:"uuid"`            // the store's
	File        string        `json:"file,omitempty"`  // of an nbd device: what tells the store's from its copies
	PID         int           `json:"pid"`             // of the process that holds the device
	Born        uint64        `json:"born,omitempty"`  // when PID began, see Born; its number may be another's later
	Owner       string        `json:"owner,omitempty"` // of an nbd device, see OwnerNBD
	ServerPID   int           `json:"server_pid,omitempty"`
	Executable  string        `json:"executable"` // of PID
	Base        string        `json:"base"`
	COW         string        `json:"cow"`
	Size        int64         `json:"size"`
	Connections int           `json:"connections,omitempty"`
	BlockSize   int           `json:"block_size"`
	Timeout     time.Duration `json:"timeout_ns,omitempty"`
	DeadTimeout time.Duration `json:"dead_timeout_ns,omitempty"`
	Flags       []string      `json:"flags,omitempty"` // of the command line, for who opens the store again
	FuseDir     string        `json:"fuse_dir,omitempty"`
	Mounts      []string      `json:"mounts,omitempty"` // made by cowdev mount
	Started     time.Time     `json:"started"`
	Failure     string        `json:"failure,omitempty"` // why the store was not closed in order, where PID could still tell
}

// Alive reports whether the process that holds the device lives.
func (s *State) Alive() bool {
	born := Born(s.PID)
	return born != 0 && (s.Born == 0 || s.Born == born)
}

// SameHolder reports whether s and t tell of devices that one process holds.
func (s *State) SameHolder(t *State) bool { return s.PID == t.PID && s.Born == t.Born }

// Born returns when process pid began, in ticks since the boot, and 0 where
// there is none or it is a zombie. A number is given to another process some
// day, and in another container at once; with this the two are told apart.
func Born(pid int) uint64 {
	if pid <= 0 {
		return 0
	}
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	// Behind the program's name, which may hold anything.
	f := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	const state, start = 0, 19
	if len(f) <= start || f[state] == "Z" || f[state] == "X" {
		return 0
	}
	born, _ := strconv.ParseUint(f[start], 10, 64)
	return born
}

// Gone reports whether the device that s tells of is there no more: its name
// may be that of another device now.
func (s *State) Gone() bool {
	switch s.Driver {
	case DriverNBD:
		index, err := NBDIndex(s.Device)
		owner := OwnerNBD(index)
		return err != nil || owner == "" || s.Owner != "" && s.Owner != owner
	case DriverLoop:
		return LoopBack(s.Device) != clip(FusePath(s.FuseDir))
	}
	return false
}

// DefaultStates is where states are kept: it is empty after a boot, as the
// devices are gone.
const DefaultStates States = "/run/cowdev"

// ErrNotAttached says that no state tells of what was asked for.
var ErrNotAttached = errors.New("not attached")

// States is a directory of states, a file for each device.
type States string

func (d States) path(device string) string {
	return filepath.Join(string(d), filepath.Base(device)+".json")
}

// Save writes s, in the place of what was said of its device.
func (d States) Save(s *State) error {
	if err := os.MkdirAll(string(d), 0o755); err != nil {
		return err
	}
	unlock, err := d.lock()
	if err != nil {
		return err
	}
	defer unlock()
	return d.write(s)
}

// lock keeps other processes from changing what is kept, until unlock.
func (d States) lock() (unlock func() error, err error) {
	dir, err := os.Open(string(d))
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX); err != nil {
		dir.Close()
		return nil, fmt.Errorf("lock %s: %w", d, err)
	}
	return dir.Close, nil
}

func (d States) write(s *State) error {
	b, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	path := d.path(s.Device)
	tmp := fmt.Sprintf("%s.%d", path, os.Getpid())
	if err := os.WriteFile(tmp, append(b, '\n'), 0o644); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}

// Update changes what is kept of a device, which no other process does
// meanwhile. It wraps ErrNotAttached where nothing is.
func (d States) Update(device string, change func(*State)) error {
	unlock, err := d.lock()
	if err != nil {
		return err
	}
	defer unlock()
	s, err := d.Find(device)
	if err != nil {
		return err
	}
	change(s)
	return d.write(s)
}

// Remove forgets what the process of s told of a device. What another has told
// since of a device of the same name stays.
func (d States) Remove(s *State) error {
	unlock, err := d.lock()
	if err != nil {
		return ifThere(err)
	}
	defer unlock()
	now, err := read(d.path(s.Device))
	if err != nil || !now.SameHolder(s) {
		return ifThere(err)
	}
	return ifThere(os.Remove(d.path(s.Device)))
}

// ifThere returns err unless it says that a file does not exist.
func ifThere(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

func read(path string) (*State, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	s := new(State)
	return s, json.Unmarshal(b, s)
}

// List returns all states, by the device's name. Files that are none are
// skipped.
func (d States) List() ([]*State, error) {
	names, err := filepath.Glob(filepath.Join(string(d), "*.json"))
	if err != nil {
		return nil, err
	}
	var states []*State
	for _, name := range names {
		s, err := read(name)
		if err == nil && d.path(s.Device) == name { // else gone meanwhile
			states = append(states, s)
		}
	}
	slices.SortFunc(states, func(a, b *State) int { return cmp.Compare(a.Device, b.Device) })
	return states, nil
}

// Find returns the state of a device, of the device that a store is attached
// to, or of the one on which DIR was mounted by cowdev; of several, one whose
// process lives, if any does. It wraps ErrNotAttached when there is none.
func (d States) Find(what string) (*State, error) {
	states, err := d.List()
	if err != nil {
		return nil, err
	}
	path := what
	if abs, err := filepath.Abs(what); err == nil {
		path = abs
	}
	var found *State
	for _, s := range states {
		if s.Device != path && s.COW != path && !slices.Contains(s.Mounts, path) && !disk.SameFile(s.COW, path) {
			continue
		}
		if s.Alive() {
			return s, nil
		}
		if found == nil {
			found = s
		}
	}
	if found == nil {
		return nil, fmt.Errorf("%s: %w, or not by cowdev", what, ErrNotAttached)
	}
	return found, nil
}

// Mounted returns the state of the device that cowdev mounted at dir, an
// absolute path without links: the one on top where several are. Where nothing
// is mounted any more it is one that was. It wraps ErrNotAttached when there is
// none, or something else is on top.
func (d States) Mounted(dir string) (*State, error) {
	states, err := d.List()
	if err != nil {
		return nil, err
	}
	top := MountedAt(dir)
	for _, s := range states {
		if slices.Contains(s.Mounts, dir) && (top == "" || slices.Contains(withLoops(s.Device), top)) {
			return s, nil
		}
	}
	if top != "" {
		return nil, fmt.Errorf("%s: %s is mounted there, %w by cowdev mount", dir, top, ErrNotAttached)
	}
	return nil, fmt.Errorf("%s: %w by cowdev mount", dir, ErrNotAttached)
}

func writeProc(name, value string) error { return os.WriteFile(name, []byte(value), 0) }
