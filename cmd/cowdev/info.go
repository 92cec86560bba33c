package main

import (
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/cowdev/cowdev/block"
	"github.com/cowdev/cowdev/exception"
	"github.com/cowdev/cowdev/image"
	"github.com/cowdev/cowdev/internal/disk"
)

func infoCommand() *cli.Command {
	return &cli.Command{
		Name:        "info",
		Usage:       "Show what COW holds, and over which base",
		ArgsUsage:   "COW",
		Description: "No lock is taken: of a store that is being served the last committed state is shown.",
		Flags:       []cli.Flag{jsonFlag},
		Action: func(c *cli.Context) error {
			args, err := arguments(c, c.Command.ArgsUsage)
			if err != nil {
				return err
			}
			info, err := lookAt(args[0])
			if err != nil {
				return err
			}
			if c.Bool("json") {
				return printJSON(c.App.Writer, info)
			}
			return info.print(c)
		},
	}
}

// storeInfo is what info prints; the JSON names are part of the interface.
type storeInfo struct {
	File       string    `json:"file"`
	Format     string    `json:"format"`
	Version    int       `json:"format-version"`
	UUID       string    `json:"uuid"`
	State      string    `json:"state"`
	Clean      bool      `json:"clean"`
	ServedBy   []int     `json:"served-by"`
	Generation uint64    `json:"generation"`
	Created    time.Time `json:"created"`
	DeviceSize int64     `json:"virtual-size"`
	ChunkSize  int       `json:"chunk-size"`
	BlockSize  int       `json:"block-size"`
	Chunks     int64     `json:"chunks"`
	Stored     int64     `json:"stored-bytes"`
	Zero       int64     `json:"zero-bytes"`
	FileSize   int64     `json:"file-size"`
	DiskSize   int64     `json:"actual-size"`
	Room       *room     `json:"room,omitempty"`
	Broken     bool      `json:"broken"`
	Base       baseInfo  `json:"base"`

	memory string // where its live table lies, if it is anywhere
}

// baseInfo is what a store remembers of its base.
type baseInfo struct {
	Name     string     `json:"name"`
	Size     int64      `json:"size"`
	Device   bool       `json:"block-device"`
	Modified *time.Time `json:"modified,omitempty"`
	Sample   string     `json:"sample-digest,omitempty"`
	Full     string     `json:"full-digest,omitempty"`
}

// looks is how often a store that changes meanwhile is looked at before it
// counts as damaged.
const looks = 5

// openLooking opens the store at path to look at its last committed state,
// without a lock. The file stays the store's.
func openLooking(path string) (*exception.Store, *disk.OS, error) {
	for try := 1; ; try++ {
		f, err := disk.OpenOS(path, os.O_RDONLY)
		if err != nil {
			return nil, nil, err
		}
		o := exception.Options{ReadOnly: true}
		if len(f.Holders()) == 0 {
			if o.Memory, err = memoryOf(f); err != nil {
				f.Close()
				return nil, nil, err
			}
		}
		s, err := exception.Open(f, o)
		if err == nil {
			return s, f, nil
		}
		// A server may have been in the middle of a checkpoint.
		if try == looks || !errors.Is(err, exception.ErrCorrupt) || len(holdersOf(path)) == 0 {
			return nil, nil, fmt.Errorf("%s: %w", path, err)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// holdersOf returns the processes that have the file at path locked.
func holdersOf(path string) []int {
	f, err := disk.OpenOS(path, os.O_RDONLY)
	if err != nil {
		return nil
	}
	defer f.Close()
	return f.Holders()
}

// lookAt reads what info shows.
func lookAt(path string) (*storeInfo, error) {
	s, f, err := openLooking(path)
	if err != nil {
		return nil, err
	}
	defer s.Close()
	info := &storeInfo{File: absolute(path), Format: "cowdev", Version: exception.Version, ServedBy: append([]int{}, f.Holders()...)}
	if info.FileSize, err = f.Size(); err != nil {
		return nil, err
	}
	if st, err := f.File().Stat(); err == nil {
		info.DiskSize = st.Sys().(*syscall.Stat_t).Blocks * 512
	}
	info.header(s.Header())
	u := usageOf(s)
	info.Chunks, info.Stored, info.Zero = u.chunks, u.stored, u.zero
	memory, err := memoryOf(f)
	if err != nil {
		return nil, err
	}
	info.Broken = memory.Broken(s.Header().UUID)
	info.memory = memory.Path(s.Header().UUID)
	if !f.IsDevice() { // whose path lies on a filesystem that says nothing of it
		if r, err := roomFor(path, info.DeviceSize, u); err == nil {
			info.Room = &r
		}
	}
	return info, nil
}

func (i *storeInfo) header(h exception.Header) {
	i.UUID, i.State, i.Clean, i.Generation = h.UUID.String(), h.State.String(), h.Clean, h.Generation
	i.Created = time.Unix(0, h.Created).UTC()
	i.DeviceSize, i.ChunkSize, i.BlockSize = h.Size, h.ChunkSize, h.BlockSize()
	i.Base.Name = h.BaseHint
	id, err := image.DecodeIdentity(h.Base)
	if err != nil {
		return
	}
	i.Base.Size, i.Base.Device = id.Size, id.Device
	if !id.Device {
		t := time.Unix(0, id.Stamp).UTC()
		i.Base.Modified = &t
	}
	if id.Sample != nil {
		i.Base.Sample = hex.EncodeToString(id.Sample.Root[:])
	}
	if id.Full != nil {
		i.Base.Full = hex.EncodeToString(id.Full.Root[:])
	}
}

func (i *storeInfo) print(c *cli.Context) error {
	t := newTable(c.App.Writer)
	t.line("store", "%s", i.File)
	t.line("state", "%s", i.condition())
	t.line("uuid", "%s", i.UUID)
	t.line("format", "cowdev version %d, generation %d, made %s", i.Version, i.Generation, i.Created.Format(time.RFC3339))
	t.line("device", "%s", size(i.DeviceSize))
	t.line("chunks", "%s, in blocks of %s", size(int64(i.ChunkSize)), short(int64(i.BlockSize)))
	t.line("stored", "%s in %d chunks", size(i.Stored), i.Chunks)
	t.line("zero", "%s", size(i.Zero))
	t.line("file", "%s, %s of them on disk", size(i.FileSize), short(i.DiskSize))
	if i.Room != nil {
		t.line("room", "%v", i.Room)
	}
	t.line("base", "%s, %s", i.Base.Name, size(i.Base.Size))
	if i.Base.Modified != nil {
		t.line("base modified", "%s", i.Base.Modified.Format(time.RFC3339Nano))
	}
	t.line("base digest", "%s", i.Base.digest())
	return t.end()
}

// condition tells the state, and how the store was left.
func (i *storeInfo) condition() string {
	s := i.State
	switch {
	case len(i.ServedBy) > 0:
		s += fmt.Sprintf(", served by pid %d", i.ServedBy[0])
	case !i.Clean:
		s += ", not closed in order; the next serve or merge recovers it"
	}
	if i.Broken {
		s += "; BROKEN since a sync failed: nothing more is written until it is served anew"
	}
	if i.State == exception.Merging.String() {
		s += "; the base is half merged and usable only with this store until merge is run again"
	}
	return s
}

func (b *baseInfo) digest() string {
	switch {
	case b.Full != "":
		return b.Full + " of all of it"
	case b.Sample != "":
		return b.Sample + " of a sample"
	}
	return "not known"
}

// usage is how much of a device a store holds, in bytes.
type usage struct{ chunks, stored, zero int64 }

func usageOf(s *exception.Store) (u usage) {
	g := s.Geometry()
	for c, e := range s.Entries(0) {
		u.chunks++
		u.stored += blockBytes(g, c, e.Stored())
		u.zero += blockBytes(g, c, e.Zero())
	}
	return u
}

// blockBytes returns the bytes of the blocks m of chunk c that exist.
func blockBytes(g block.Geometry, c block.Chunk, m block.Mask) int64 {
	n := m.Count() * g.BlockSize()
	end := g.Len(c)
	if last := (end - 1) / g.BlockSize(); m.Has(last) {
		n -= (last+1)*g.BlockSize() - end
	}
	return int64(n)
}
