package ext4

import (
	"bytes"
	"fmt"
	"math/bits"
)

const (
	superOffset = 1024
	superSize   = 1024
	superMagic  = 0xEF53
)

// ProbeSize is how many bytes from the image's beginning Probe wants.
const ProbeSize = superOffset + superSize

// Probe reports whether head, the first ProbeSize bytes of an image, looks
// like an ext2, ext3 or ext4 file system.
func Probe(head []byte) bool {
	if len(head) < ProbeSize {
		return false
	}
	sb := head[superOffset:]
	return le.Uint16(sb[0x38:]) == superMagic && le.Uint32(sb[0x18:]) <= 6 && le.Uint32(sb[0x4C:]) <= 1
}

// super is the superblock, decoded and checked: every division and shift that
// follows from it is safe.
type super struct {
	inodes         uint32
	blocks         uint64
	freeBlocks     uint64
	freeInodes     uint32
	firstDataBlock uint64
	blockSize      int
	clusterBits    uint // log2 of blocks in a cluster
	blocksPerGroup uint64
	inodesPerGroup uint32
	groups         uint64
	inodeSize      int
	firstIno       uint32
	descSize       int
	reservedGDT    uint64
	firstMetaBG    uint64
	backupGroups   [2]uint32

	compat, incompat, roCompat uint32

	uuid        [16]byte
	label       string
	lastMounted string

	journalIno uint32
	quotaInos  [3]uint32
	orphanIno  uint32
	mmpBlock   uint64
	csumSeed   uint32
}

// parseSuper decodes and checks the superblock raw of an image of size bytes.
func parseSuper(raw []byte, size int64) (*super, error) {
	if le.Uint16(raw[0x38:]) != superMagic {
		return nil, ErrNotExt
	}
	if rev := le.Uint32(raw[0x4C:]); rev > 1 {
		return nil, fmt.Errorf("ext4 revision %d: %w", rev, ErrUnsupported)
	}
	sb := &super{
		inodes:         le.Uint32(raw[0x00:]),
		blocks:         uint64(le.Uint32(raw[0x04:])),
		freeBlocks:     uint64(le.Uint32(raw[0x0C:])),
		freeInodes:     le.Uint32(raw[0x10:]),
		firstDataBlock: uint64(le.Uint32(raw[0x14:])),
		blocksPerGroup: uint64(le.Uint32(raw[0x20:])),
		inodesPerGroup: le.Uint32(raw[0x28:]),
		inodeSize:      128,
		firstIno:       11,
		descSize:       32,
		uuid:           [16]byte(raw[0x68:]),
		label:          cString(raw[0x78:0x88]),
		lastMounted:    cString(raw[0x88:0xC8]),
	}
	if le.Uint32(raw[0x4C:]) == 1 {
		sb.parseDynamic(raw)
	}
	if err := sb.featureError(); err != nil {
		return nil, err
	}
	if sb.hasCsum() {
		if found, sum := le.Uint32(raw[0x3FC:]), crc32c(^uint32(0), raw[:0x3FC]); found != sum {
			return nil, fmt.Errorf("superblock: %w", badSum(found, sum))
		}
	}
	if err := sb.parseGeometry(raw, size); err != nil {
		return nil, fmt.Errorf("superblock: %w", err)
	}
	return sb, nil
}

// parseDynamic reads the fields that revision 1 added.
func (sb *super) parseDynamic(raw []byte) {
	sb.firstIno = le.Uint32(raw[0x54:])
	sb.inodeSize = int(le.Uint16(raw[0x58:]))
	sb.compat = le.Uint32(raw[0x5C:])
	sb.incompat = le.Uint32(raw[0x60:])
	sb.roCompat = le.Uint32(raw[0x64:])
	sb.reservedGDT = uint64(le.Uint16(raw[0xCE:]))
	sb.journalIno = le.Uint32(raw[0xE0:])
	sb.firstMetaBG = uint64(le.Uint32(raw[0x104:]))
	sb.quotaInos = [3]uint32{le.Uint32(raw[0x240:]), le.Uint32(raw[0x244:]), le.Uint32(raw[0x26C:])}
	sb.backupGroups = [2]uint32{le.Uint32(raw[0x24C:]), le.Uint32(raw[0x250:])}
	sb.orphanIno = le.Uint32(raw[0x280:])
	if sb.incompat&incompatMMP != 0 {
		sb.mmpBlock = le.Uint64(raw[0x168:])
	}
	if sb.incompat&incompat64bit != 0 {
		sb.blocks |= uint64(le.Uint32(raw[0x150:])) << 32
		sb.freeBlocks |= uint64(le.Uint32(raw[0x158:])) << 32
		sb.descSize = int(le.Uint16(raw[0xFE:]))
	}
	sb.csumSeed = crc32c(^uint32(0), sb.uuid[:])
	if sb.incompat&incompatCsumSeed != 0 {
		sb.csumSeed = le.Uint32(raw[0x270:])
	}
}

// parseGeometry reads and checks what the layout follows from.
func (sb *super) parseGeometry(raw []byte, size int64) error {
	logBlock, logCluster := le.Uint32(raw[0x18:]), le.Uint32(raw[0x1C:])
	if logBlock > 6 {
		return corrupt("block size of 1024<<%d bytes, expected at most 64 KiB", logBlock)
	}
	sb.blockSize = 1024 << logBlock
	if sb.roCompat&roCompatBigalloc != 0 {
		if logCluster < logBlock || logCluster > 20 {
			return corrupt("cluster size of 1024<<%d bytes with blocks of %d", logCluster, sb.blockSize)
		}
		sb.clusterBits = uint(logCluster - logBlock)
	}
	perBitmap := uint64(sb.blockSize) * 8
	perInodeTable := uint64(sb.inodesPerGroup) * uint64(sb.inodeSize)
	switch {
	case sb.inodeSize < 128 || sb.inodeSize > sb.blockSize || bits.OnesCount(uint(sb.inodeSize)) != 1:
		return corrupt("inode size of %d bytes, expected a power of two from 128 to %d", sb.inodeSize, sb.blockSize)
	case sb.descSize < 32 || sb.descSize > 1024 || sb.descSize > sb.blockSize || bits.OnesCount(uint(sb.descSize)) != 1:
		return corrupt("group descriptors of %d bytes, expected a power of two from 32", sb.descSize)
	case sb.incompat&incompat64bit != 0 && sb.descSize < 64:
		return corrupt("group descriptors of %d bytes, expected at least 64 with the feature 64bit", sb.descSize)
	case sb.blocksPerGroup == 0 || sb.blocksPerGroup>>sb.clusterBits > perBitmap || sb.blocksPerGroup%(1<<sb.clusterBits) != 0:
		return corrupt("%d blocks in a group, expected 1 to %d clusters", sb.blocksPerGroup, perBitmap)
	case sb.inodesPerGroup == 0 || uint64(sb.inodesPerGroup) > perBitmap || perInodeTable/uint64(sb.blockSize) > sb.blocksPerGroup:
		return corrupt("%d inodes in a group of %d blocks", sb.inodesPerGroup, sb.blocksPerGroup)
	case sb.blocks <= sb.firstDataBlock || sb.firstDataBlock > 1:
		return corrupt("%d blocks of which the first is %d", sb.blocks, sb.firstDataBlock)
	case sb.blocks > uint64(size)/uint64(sb.blockSize):
		return corrupt("%d blocks of %d bytes, but the image has only %d bytes", sb.blocks, sb.blockSize, size)
	}
	sb.groups = (sb.blocks - sb.firstDataBlock + sb.blocksPerGroup - 1) / sb.blocksPerGroup
	if sb.groups > maxGroups {
		return fmt.Errorf("%d block groups, more than %d: %w", sb.groups, maxGroups, ErrUnsupported)
	}
	if uint64(sb.inodes) > sb.groups*uint64(sb.inodesPerGroup) {
		return corrupt("%d inodes, expected at most %d in %d groups", sb.inodes, sb.groups*uint64(sb.inodesPerGroup), sb.groups)
	}
	return nil
}

// hasCsum reports whether metadata carries CRC32C checksums.
func (sb *super) hasCsum() bool { return sb.roCompat&roCompatMetadataCsum != 0 }

// validRun reports whether the n blocks from first on lie in the file system.
func (sb *super) validRun(first, n uint64) bool {
	return first > 0 && first >= sb.firstDataBlock && first < sb.blocks && n <= sb.blocks-first
}

// firstBlock returns the first block of group g.
func (sb *super) firstBlock(g uint64) uint64 { return sb.firstDataBlock + g*sb.blocksPerGroup }

// groupBlocks returns how many blocks group g has.
func (sb *super) groupBlocks(g uint64) uint64 {
	return min(sb.blocksPerGroup, sb.blocks-sb.firstBlock(g))
}

// groupOf returns the group that block b lies in; b is at least firstDataBlock.
func (sb *super) groupOf(b uint64) uint64 { return (b - sb.firstDataBlock) / sb.blocksPerGroup }

// cString returns the bytes before the first zero.
func cString(p []byte) string {
	if i := bytes.IndexByte(p, 0); i >= 0 {
		p = p[:i]
	}
	return string(p)
}
