package ext4

import (
	"fmt"
	"sync"
	"sync/atomic"

	lru "github.com/hashicorp/golang-lru/v2"

	"github.com/cowdev/cowdev/block"
)

// RootIno is the inode of the root directory.
const RootIno = 2

// Inodes with a fixed meaning.
const (
	badBlocksIno = 1
	resizeIno    = 7
	journalIno   = 8
)

// An FS is an open file system. It holds no file and needs no closing.
type FS struct {
	sb          *super
	src         *source
	tableBlocks uint64 // of one group's inode table
	recovered   Recovery
	fc          *fastCommit // nil without fast commits

	layout func() ([]metaRange, error) // computed once

	dirs       *lru.Cache[uint32, dirIndex]
	dirEntries atomic.Int64 // in dirs

	pathMu sync.Mutex
	paths  map[uint32]string // of directories
}

// Info describes a file system.
type Info struct {
	Type        string // ext2, ext3 or ext4, by its features
	BlockSize   int    // bytes
	ClusterSize int    // bytes; the unit of allocation, BlockSize but with bigalloc
	InodeSize   int    // bytes
	Size        int64  // bytes, as the superblock has it; the image may be larger
	Free        int64  // bytes
	Inodes      uint32
	FreeInodes  uint32
	UUID        [16]byte
	Label       string
	LastMounted string   // where, as the kernel noted it
	Features    []string // mke2fs's names
	Recovery    Recovery // what was replayed from the journal
}

// Recovery says what replaying the journal did.
type Recovery struct {
	Needed       bool // the file system was not unmounted cleanly
	Transactions int
	Blocks       int // blocks whose content is taken from the journal
	FastCommits  int // operations replayed from fast commits
}

// Open opens the file system that begins at r's first byte, replaying its
// journal in memory if it needs that. It reads a few blocks, and the used part
// of the journal when there is something to replay.
func Open(r block.Reader) (*FS, error) {
	if r.Size() < ProbeSize {
		return nil, ErrNotExt
	}
	raw := make([]byte, superSize)
	if err := newSource(r, 1024).readImage(raw, superOffset); err != nil {
		return nil, fmt.Errorf("superblock: %w", err)
	}
	sb, err := parseSuper(raw, r.Size())
	if err != nil {
		return nil, err
	}
	f := newFS(sb, newSource(r, sb.blockSize))
	if sb.incompat&incompatRecover != 0 {
		if err := f.recover(); err != nil {
			return nil, fmt.Errorf("journal: %w", err)
		}
	}
	if _, err := f.Inode(RootIno); err != nil {
		return nil, fmt.Errorf("root directory: %w", err)
	}
	return f, nil
}

func newFS(sb *super, src *source) *FS {
	f := &FS{sb: sb, src: src, paths: map[uint32]string{RootIno: ""}}
	var err error
	f.dirs, err = lru.NewWithEvict(dirCacheSize, func(_ uint32, d dirIndex) { f.dirEntries.Add(-int64(len(d))) })
	if err != nil {
		panic(err) // only for a size below 1
	}
	f.tableBlocks = (uint64(sb.inodesPerGroup)*uint64(sb.inodeSize) + uint64(sb.blockSize) - 1) / uint64(sb.blockSize)
	f.layout = sync.OnceValues(f.computeLayout)
	return f
}

// rereadSuper takes the superblock as the journal left it.
func (f *FS) rereadSuper() error {
	raw := make([]byte, superSize)
	if err := f.src.read(raw, superOffset); err != nil {
		return fmt.Errorf("superblock: %w", err)
	}
	sb, err := parseSuper(raw, f.src.r.Size())
	if err != nil {
		return fmt.Errorf("after the replay: %w", err)
	}
	if sb.blockSize != f.sb.blockSize || sb.inodesPerGroup != f.sb.inodesPerGroup || sb.inodeSize != f.sb.inodeSize {
		return corrupt("the replay changes the sizes of blocks or inodes")
	}
	f.sb = sb
	return nil
}

// Info returns what the superblock says.
func (f *FS) Info() Info {
	sb := f.sb
	i := Info{
		Type:        "ext2",
		BlockSize:   sb.blockSize,
		ClusterSize: sb.blockSize << sb.clusterBits,
		InodeSize:   sb.inodeSize,
		Size:        int64(sb.blocks) * int64(sb.blockSize),
		Free:        int64(min(sb.freeBlocks, sb.blocks)) * int64(sb.blockSize),
		Inodes:      sb.inodes,
		FreeInodes:  sb.freeInodes,
		UUID:        sb.uuid,
		Label:       sb.label,
		LastMounted: sb.lastMounted,
		Recovery:    f.recovered,
	}
	if sb.compat&compatHasJournal != 0 {
		i.Type = "ext3"
	}
	if sb.incompat&^(incompatFiletype|incompatRecover|incompatMetaBG) != 0 || sb.roCompat&^7 != 0 {
		i.Type = "ext4"
	}
	i.Features = appendFeatures(i.Features, sb.compat, "compat", compatNames)
	i.Features = appendFeatures(i.Features, sb.incompat, "incompat", incompatNames)
	i.Features = appendFeatures(i.Features, sb.roCompat, "ro_compat", roCompatNames)
	return i
}
