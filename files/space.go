package files

import (
	"bytes"
	"cmp"
	"fmt"
	"path"
	"slices"

	"github.com/cowdev/cowdev/block"
	"github.com/cowdev/cowdev/files/ext4"
)

// Kind says what bytes of a device are used for.
type Kind uint8

// The kinds, in the order in which reports have them.
const (
	Data      Kind = iota // of files and links, with their extended attributes
	Directory             // entries of directories
	Metadata              // superblock, descriptors, bitmaps, inodes, block maps
	Journal
	Free    // belongs to nothing: a TRIM would give it back
	Outside // of the file system
	Unknown // allocated, but nothing was found that has it
)

var kindNames = [...]string{"file data", "directories", "metadata", "journal", "free", "outside", "unknown"}

func (k Kind) String() string { return kindNames[k] }

// MarshalText makes JSON say the name.
func (k Kind) MarshalText() ([]byte, error) { return []byte(k.String()), nil }

// kindOf returns the kind that ext4's stands for.
func kindOf(k ext4.Kind) Kind {
	switch k {
	case ext4.KindData, ext4.KindSymlink, ext4.KindXattr:
		return Data
	case ext4.KindDirectory:
		return Directory
	case ext4.KindJournal:
		return Journal
	case ext4.KindFree:
		return Free
	case ext4.KindOutside:
		return Outside
	case ext4.KindUnknown:
		return Unknown
	}
	return Metadata
}

// A KindRange is a run of bytes of one kind.
type KindRange struct {
	Off, N int64
	Kind   Kind
}

// Kinds says what the bytes of ranges are used for, from the beginning of the
// file system: runs that cover them, ascending. Only ext file systems can tell.
func Kinds(fsys FS, ranges []block.Extent) ([]KindRange, error) {
	owners, err := ownersOf(fsys, ranges)
	if err != nil {
		return nil, err
	}
	var out []KindRange
	for _, o := range owners {
		k := kindOf(o.Kind)
		if last := len(out) - 1; last >= 0 && out[last].Kind == k && out[last].Off+out[last].N == o.Off {
			out[last].N += o.N
			continue
		}
		out = append(out, KindRange{o.Off, o.N, k})
	}
	return out, nil
}

func ownersOf(fsys FS, ranges []block.Extent) ([]ext4.Owner, error) {
	f, ok := fsys.(extFS)
	if !ok {
		return nil, fmt.Errorf("owners of blocks in %s: %w", fsys.Info().Type, ErrUnsupported)
	}
	return f.Owners(extRanges(ranges), nil)
}

func extRanges(ranges []block.Extent) []ext4.Range {
	list := make([]ext4.Range, len(ranges))
	for i, r := range ranges {
		list[i] = ext4.Range{Off: r.Off, N: r.N}
	}
	return list
}

// Space is what an overlay keeps, in bytes.
type Space struct {
	Stored int64 `json:"stored"`        // in the store
	Equal  int64 `json:"equal-to-base"` // of these: blocks that are as in the base
	Zeros  int64 `json:"zeros"`         // of these: blocks of zeros, not counted as equal
}

func (s *Space) add(o Space) {
	s.Stored += o.Stored
	s.Equal += o.Equal
	s.Zeros += o.Zeros
}

// A KindSpace is the space of a kind.
type KindSpace struct {
	Kind Kind `json:"kind"`
	Space
}

// A PathSpace is the space of a file, or of all below a directory and its own.
type PathSpace struct {
	Path string `json:"path"`
	Space
}

// A SpaceReport says where an overlay's space went.
type SpaceReport struct {
	Total Space       `json:"total"`
	Kinds []KindSpace `json:"kinds"`       // those that have any
	Dirs  []PathSpace `json:"directories"` // most first
	Files []PathSpace `json:"files"`       // most first
}

// spaceBlock is the unit in which stored bytes are found equal or zero.
const spaceBlock = 4096

// Why says for what the overlay of a device keeps the given ranges in its
// store. base and view are the device without and with it, cut to the file
// system that fsys is of view; ranges, from its beginning, may reach beyond
// it. It reads the ranges on both sides. Without a file system (nil), or with
// one that cannot tell, all is of unknown kind.
func Why(base, view block.Reader, fsys FS, ranges []block.Extent) (*SpaceReport, error) {
	f, ext := fsys.(extFS)
	var owners []ext4.Owner
	if ext {
		var err error
		if owners, err = ownersOf(f, ranges); err != nil {
			return nil, err
		}
	} else {
		for _, r := range extRanges(ranges) {
			owners = append(owners, ext4.Owner{Range: r, Kind: ext4.KindUnknown})
		}
	}
	a := &accounts{base: base, view: view, inodes: map[uint32]*Space{}}
	for _, o := range owners {
		if err := a.charge(o); err != nil {
			return nil, err
		}
	}
	r := &SpaceReport{Total: a.total, Kinds: []KindSpace{}, Dirs: []PathSpace{}, Files: []PathSpace{}}
	for k, s := range a.kinds {
		if s != (Space{}) {
			r.Kinds = append(r.Kinds, KindSpace{Kind(k), s})
		}
	}
	if !ext {
		return r, nil
	}
	return r, a.name(f, r)
}

// accounts sums up space.
type accounts struct {
	base, view block.Reader
	total      Space
	kinds      [len(kindNames)]Space
	inodes     map[uint32]*Space
	buf        [2][1 << 20]byte
}

// charge puts an owner's bytes to its accounts.
func (a *accounts) charge(o ext4.Owner) error {
	s := Space{Stored: o.N}
	for off := o.Off; off < o.Off+o.N; {
		n := min(int64(len(a.buf[0])), o.Off+o.N-off)
		x, y := a.buf[0][:n], a.buf[1][:n]
		if err := readFull(a.base, x, off); err != nil {
			return fmt.Errorf("read the base at %d: %w", off, err)
		}
		if err := readFull(a.view, y, off); err != nil {
			return fmt.Errorf("read the overlay at %d: %w", off, err)
		}
		off += n
		for len(x) > 0 {
			k := min(spaceBlock, len(x))
			switch {
			case bytes.Equal(x[:k], y[:k]):
				s.Equal += int64(k)
			case isZero(y[:k]):
				s.Zeros += int64(k)
			}
			x, y = x[k:], y[k:]
		}
	}
	a.total.add(s)
	a.kinds[kindOf(o.Kind)].add(s)
	if kind := kindOf(o.Kind); o.Ino != 0 && (kind == Data || kind == Directory) {
		if a.inodes[o.Ino] == nil {
			a.inodes[o.Ino] = &Space{}
		}
		a.inodes[o.Ino].add(s)
	}
	return nil
}

// name turns inodes into paths, by the first path where there are several, and
// sums up directories. What is encrypted stays a number.
func (a *accounts) name(f extFS, r *SpaceReport) error {
	inos := make([]uint32, 0, len(a.inodes))
	for ino, s := range a.inodes {
		if f.anyEncrypted([]uint32{ino}) {
			r.Files = append(r.Files, PathSpace{fmt.Sprintf("inode %d, encrypted", ino), *s})
			continue
		}
		inos = append(inos, ino)
	}
	slices.Sort(inos)
	paths, err := f.paths(inos)
	if err != nil {
		return err
	}
	dirs := map[string]*Space{}
	for _, ino := range inos {
		s := *a.inodes[ino]
		list := paths[ino]
		if len(list) == 0 {
			r.Files = append(r.Files, PathSpace{fmt.Sprintf("inode %d, removed but open", ino), s})
			continue
		}
		n, err := f.Inode(ino)
		if err != nil {
			return err
		}
		dir := list[0]
		if !n.IsDir() {
			r.Files = append(r.Files, PathSpace{list[0], s})
			dir = path.Dir(list[0])
		}
		for ; ; dir = path.Dir(dir) {
			if dirs[dir] == nil {
				dirs[dir] = &Space{}
			}
			dirs[dir].add(s)
			if dir == "/" {
				break
			}
		}
	}
	for dir, s := range dirs {
		r.Dirs = append(r.Dirs, PathSpace{dir, *s})
	}
	for _, list := range [][]PathSpace{r.Dirs, r.Files} {
		slices.SortFunc(list, func(a, b PathSpace) int {
			return cmp.Or(cmp.Compare(b.Stored, a.Stored), comparePaths(a.Path, b.Path))
		})
	}
	return nil
}
