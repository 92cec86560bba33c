package ext4

import (
	"fmt"
	"io/fs"
	"sync"
	"time"
)

// Bits of Inode.Mode.
const (
	modeType = 0xF000

	ModeFIFO    = 0x1000
	ModeChar    = 0x2000
	ModeDir     = 0x4000
	ModeBlock   = 0x6000
	ModeRegular = 0x8000
	ModeSymlink = 0xA000
	ModeSocket  = 0xC000
)

// Bits of Inode.Flags that this package acts on; the others are as in
// chattr(1) and linux/fs.h.
const (
	FlagEncrypted  = 0x800
	FlagExtents    = 0x80000
	FlagEAInode    = 0x200000
	FlagInlineData = 0x10000000
)

// An Inode is a file of any type. Its exported fields are copies and may be
// read at any time.
type Inode struct {
	Ino        uint32
	Mode       uint16 // type and permissions as in stat(2)
	UID, GID   uint32
	Size       int64  // bytes
	Links      uint32 // 1 in a directory with more subdirectories than can be counted
	Blocks     uint64 // space taken, in units of 512 bytes as in stat(2)
	Flags      uint32
	Generation uint32
	Project    uint32

	Atime, Mtime, Ctime time.Time
	Crtime              time.Time // zero in inodes of 128 bytes

	Major, Minor uint32 // of a device

	fs         *FS
	raw        []byte // as in the inode table
	xattrBlock uint64 // 0 if there is none

	mu   sync.Mutex
	runs []run // nil until first needed
}

// Type returns the file's type, one of the Mode constants.
func (n *Inode) Type() uint16 { return n.Mode & modeType }

// IsDir reports whether n is a directory.
func (n *Inode) IsDir() bool { return n.Type() == ModeDir }

// IsRegular reports whether n is a regular file.
func (n *Inode) IsRegular() bool { return n.Type() == ModeRegular }

// IsSymlink reports whether n is a symbolic link.
func (n *Inode) IsSymlink() bool { return n.Type() == ModeSymlink }

// FileMode returns Mode in the words of package io/fs.
func (n *Inode) FileMode() fs.FileMode {
	m := fs.FileMode(n.Mode & 0o777)
	switch n.Type() {
	case ModeDir:
		m |= fs.ModeDir
	case ModeSymlink:
		m |= fs.ModeSymlink
	case ModeFIFO:
		m |= fs.ModeNamedPipe
	case ModeSocket:
		m |= fs.ModeSocket
	case ModeBlock:
		m |= fs.ModeDevice
	case ModeChar:
		m |= fs.ModeDevice | fs.ModeCharDevice
	case ModeRegular:
	default:
		m |= fs.ModeIrregular
	}
	if n.Mode&0o4000 != 0 {
		m |= fs.ModeSetuid
	}
	if n.Mode&0o2000 != 0 {
		m |= fs.ModeSetgid
	}
	if n.Mode&0o1000 != 0 {
		m |= fs.ModeSticky
	}
	return m
}

// Inode returns the inode numbered ino. The error wraps fs.ErrNotExist for one
// that is not in use.
func (f *FS) Inode(ino uint32) (*Inode, error) {
	raw, err := f.rawInode(ino)
	if err != nil {
		return nil, err
	}
	n, err := f.parseInode(ino, raw)
	if err != nil {
		return nil, err
	}
	inUse := n.Mode != 0
	if inUse && n.Links == 0 {
		inUse, err = f.inodeUsed(ino)
		if err != nil {
			return nil, err
		}
	}
	if !inUse {
		return nil, notExist("inode %d is not in use", ino)
	}
	return n, nil
}

// rawInode returns the bytes of an inode, to be read only.
func (f *FS) rawInode(ino uint32) ([]byte, error) {
	sb := f.sb
	if ino == 0 || ino > sb.inodes {
		return nil, corrupt("inode %d, expected 1 to %d", ino, sb.inodes)
	}
	if raw := f.fc.inode(ino); raw != nil {
		return raw, nil
	}
	g, err := f.group(uint64((ino - 1) / sb.inodesPerGroup))
	if err != nil {
		return nil, fmt.Errorf("inode %d: %w", ino, err)
	}
	off := uint64((ino-1)%sb.inodesPerGroup) * uint64(sb.inodeSize)
	b, err := f.src.block(g.inodeTable + off/uint64(sb.blockSize))
	if err != nil {
		return nil, fmt.Errorf("inode %d: %w", ino, err)
	}
	return b[off%uint64(sb.blockSize):][:sb.inodeSize], nil
}

// parseInode verifies and decodes an inode. It keeps a copy of raw.
func (f *FS) parseInode(ino uint32, raw []byte) (*Inode, error) {
	n := &Inode{Ino: ino, fs: f, raw: append([]byte(nil), raw...)}
	if err := n.verify(); err != nil {
		return nil, fmt.Errorf("inode %d: %w", ino, err)
	}
	n.decode()
	if n.Size < 0 {
		return nil, fmt.Errorf("inode %d: %w", ino, corrupt("size of %d bytes", uint64(n.Size)))
	}
	return n, nil
}

// extra returns how many bytes after the first 128 hold fixed fields.
func (n *Inode) extra() int {
	if len(n.raw) <= 128 {
		return 0
	}
	extra := int(le.Uint16(n.raw[0x80:]))
	if extra > len(n.raw)-128 || extra%4 != 0 {
		return 0
	}
	return extra
}

// has reports whether the fixed field of size bytes at off is there.
func (n *Inode) has(off, size int) bool { return off+size <= 128+n.extra() }

// seed is where checksums of what belongs to the inode begin.
func (n *Inode) seed() uint32 {
	return crc32c(crc32cUint32(n.fs.sb.csumSeed, n.Ino), n.raw[0x64:0x68])
}

// verify checks the inode's checksum. Inodes out of fast commits have none:
// the fast commit's own checksum covers them.
func (n *Inode) verify() error {
	const lo, hi = 0x7C, 0x82
	if !n.fs.sb.hasCsum() || n.fs.fc.inode(n.Ino) != nil {
		return nil
	}
	found := uint32(le.Uint16(n.raw[lo:]))
	sum := crc32cWithout(n.seed(), n.raw[:128], lo, 2)
	mask := uint32(0xFFFF)
	if len(n.raw) > 128 {
		if n.has(hi, 2) {
			found |= uint32(le.Uint16(n.raw[hi:])) << 16
			mask = 0xFFFFFFFF
			sum = crc32cWithout(sum, n.raw[128:], hi-128, 2)
		} else {
			sum = crc32c(sum, n.raw[128:])
		}
	}
	if sum &= mask; sum != found && !allZero(n.raw) {
		return badSum(found, sum)
	}
	return nil
}

// allZero reports whether p holds nothing but zeros, as the inodes of a table
// that was never used.
func allZero(p []byte) bool {
	for _, b := range p {
		if b != 0 {
			return false
		}
	}
	return true
}

func (n *Inode) decode() {
	raw, sb := n.raw, n.fs.sb
	n.Mode = le.Uint16(raw[0x00:])
	n.UID = uint32(le.Uint16(raw[0x02:])) | uint32(le.Uint16(raw[0x78:]))<<16
	n.GID = uint32(le.Uint16(raw[0x18:])) | uint32(le.Uint16(raw[0x7A:]))<<16
	n.Links = uint32(le.Uint16(raw[0x1A:]))
	n.Flags = le.Uint32(raw[0x20:])
	n.Generation = le.Uint32(raw[0x64:])
	n.Size = int64(le.Uint32(raw[0x04:]))
	if n.IsRegular() || n.IsDir() && sb.incompat&incompatLargeDir != 0 {
		n.Size |= int64(le.Uint32(raw[0x6C:])) << 32
	}
	n.xattrBlock = uint64(le.Uint32(raw[0x68:]))
	if sb.incompat&incompat64bit != 0 {
		n.xattrBlock |= uint64(le.Uint16(raw[0x76:])) << 32
	}
	n.decodeBlocks()
	n.Atime = n.time(0x08, 0x8C)
	n.Ctime = n.time(0x0C, 0x84)
	n.Mtime = n.time(0x10, 0x88)
	if n.has(0x90, 4) {
		n.Crtime = n.time(0x90, 0x94)
	}
	if n.has(0x9C, 4) {
		n.Project = le.Uint32(raw[0x9C:])
	}
	if t := n.Type(); t == ModeBlock || t == ModeChar {
		n.decodeDevice()
	}
}

// decodeBlocks sets Blocks, whose unit depends on features and flags.
func (n *Inode) decodeBlocks() {
	const flagHugeFile = 0x40000
	n.Blocks = uint64(le.Uint32(n.raw[0x1C:]))
	if n.fs.sb.roCompat&roCompatHugeFile != 0 {
		n.Blocks |= uint64(le.Uint16(n.raw[0x74:])) << 32
		if n.Flags&flagHugeFile != 0 {
			n.Blocks *= uint64(n.fs.sb.blockSize / 512)
		}
	}
	if n.Flags&FlagInlineData != 0 && n.IsRegular() {
		n.Blocks += uint64(n.Size+511) / 512 // as the kernel tells it
	}
}

// time decodes the seconds at off and, where it is there, the field at
// extraOff: two more bits of seconds and the nanoseconds.
func (n *Inode) time(off, extraOff int) time.Time {
	sec := int64(int32(le.Uint32(n.raw[off:])))
	var nsec int64
	if n.has(extraOff, 4) {
		extra := le.Uint32(n.raw[extraOff:])
		sec += int64(extra&3) << 32
		nsec = int64(extra >> 2)
	}
	return time.Unix(sec, nsec)
}

// decodeDevice reads a device's numbers, from the old place or the new.
func (n *Inode) decodeDevice() {
	blk := n.iblock()
	if dev := le.Uint32(blk); dev != 0 {
		n.Major, n.Minor = dev>>8&0xFF, dev&0xFF
		return
	}
	dev := le.Uint32(blk[4:])
	n.Major, n.Minor = dev>>8&0xFFF, dev&0xFF|dev>>12&0xFFF00
}

// iblock returns the 60 bytes that hold the block map, or short data.
func (n *Inode) iblock() []byte { return n.raw[0x28:0x64] }
