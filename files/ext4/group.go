package ext4

import (
	"fmt"
)

// Flags of a group descriptor.
const (
	groupInodeUninit = 1 // the inode bitmap and table were never written
	groupBlockUninit = 2 // the block bitmap was never written
)

// A group is a decoded group descriptor.
type group struct {
	blockBitmap, inodeBitmap, inodeTable uint64

	blockBitmapSum, inodeBitmapSum uint32

	unusedInodes uint32 // at the table's end, never used
	usedDirs     uint32
	flags        uint16
}

// group reads, verifies and checks the descriptor of group g.
func (f *FS) group(g uint64) (group, error) {
	sb := f.sb
	perBlock := uint64(sb.blockSize / sb.descSize)
	at := f.descBlock(g / perBlock)
	b, err := f.src.block(at)
	if err != nil {
		return group{}, fmt.Errorf("group %d: descriptor: %w", g, err)
	}
	raw := b[g%perBlock*uint64(sb.descSize):][:sb.descSize]
	if err := f.verifyDesc(raw, g); err != nil {
		return group{}, fmt.Errorf("group %d: descriptor: %w", g, err)
	}
	d := parseDesc(raw)
	if !sb.hasCsum() && sb.roCompat&roCompatGDTCsum == 0 {
		d.flags, d.unusedInodes = 0, 0 // as the kernel: not believed without a checksum
	}
	d.unusedInodes = min(d.unusedInodes, sb.inodesPerGroup)
	if !sb.validRun(d.blockBitmap, 1) || !sb.validRun(d.inodeBitmap, 1) || !sb.validRun(d.inodeTable, f.tableBlocks) {
		return group{}, fmt.Errorf("group %d: descriptor: %w", g, corrupt(
			"bitmaps at blocks %d and %d, inode table at %d, expected below %d", d.blockBitmap, d.inodeBitmap, d.inodeTable, sb.blocks))
	}
	return d, nil
}

func parseDesc(raw []byte) group {
	d := group{
		blockBitmap:    uint64(le.Uint32(raw[0x00:])),
		inodeBitmap:    uint64(le.Uint32(raw[0x04:])),
		inodeTable:     uint64(le.Uint32(raw[0x08:])),
		usedDirs:       uint32(le.Uint16(raw[0x10:])),
		flags:          le.Uint16(raw[0x12:]),
		blockBitmapSum: uint32(le.Uint16(raw[0x18:])),
		inodeBitmapSum: uint32(le.Uint16(raw[0x1A:])),
		unusedInodes:   uint32(le.Uint16(raw[0x1C:])),
	}
	if len(raw) >= 64 {
		d.blockBitmap |= uint64(le.Uint32(raw[0x20:])) << 32
		d.inodeBitmap |= uint64(le.Uint32(raw[0x24:])) << 32
		d.inodeTable |= uint64(le.Uint32(raw[0x28:])) << 32
		d.usedDirs |= uint32(le.Uint16(raw[0x30:])) << 16
		d.unusedInodes |= uint32(le.Uint16(raw[0x32:])) << 16
		d.blockBitmapSum |= uint32(le.Uint16(raw[0x38:])) << 16
		d.inodeBitmapSum |= uint32(le.Uint16(raw[0x3A:])) << 16
	}
	return d
}

// verifyDesc checks the checksum of the descriptor raw of group g.
func (f *FS) verifyDesc(raw []byte, g uint64) error {
	const sumAt = 0x1E
	num := le.AppendUint32(nil, uint32(g))
	var sum uint16
	switch {
	case f.sb.hasCsum():
		sum = uint16(crc32cWithout(crc32c(f.sb.csumSeed, num), raw, sumAt, 2))
	case f.sb.roCompat&roCompatGDTCsum != 0:
		sum = crc16(crc16(crc16(0xFFFF, f.sb.uuid[:]), num), raw[:sumAt])
		if len(raw) > 32 {
			sum = crc16(sum, raw[sumAt+2:])
		}
	default:
		return nil
	}
	if found := le.Uint16(raw[sumAt:]); found != sum {
		return badSum(uint32(found), uint32(sum))
	}
	return nil
}

// verifyBitmap checks the n bytes of a bitmap that count against the checksum
// in its group's descriptor.
func (f *FS) verifyBitmap(bitmap []byte, n int, found uint32) error {
	if !f.sb.hasCsum() {
		return nil
	}
	sum := crc32c(f.sb.csumSeed, bitmap[:n])
	if f.sb.descSize < 64 {
		sum &= 0xFFFF
	}
	if sum != found {
		return badSum(found, sum)
	}
	return nil
}

// metaBG reports whether block i of the descriptors lies in its own meta
// group rather than after the superblock.
func (sb *super) metaBG(i uint64) bool {
	return sb.incompat&incompatMetaBG != 0 && i >= sb.firstMetaBG
}

// descBlock returns the block that holds block i of the group descriptors.
func (f *FS) descBlock(i uint64) uint64 {
	sb := f.sb
	if !sb.metaBG(i) {
		at := sb.firstDataBlock + 1 + i
		if sb.blockSize == 1024 && sb.firstDataBlock == 0 {
			at++ // block 0 is the boot block, the superblock is block 1
		}
		return at
	}
	g := i * uint64(sb.blockSize/sb.descSize)
	at := sb.firstBlock(g)
	if sb.hasSuper(g) {
		at++
	}
	if sb.blockSize == 1024 && sb.firstDataBlock == 0 && g == 0 {
		at++
	}
	return at
}

// descBlocks returns how many blocks the group descriptors take.
func (sb *super) descBlocks() uint64 {
	perBlock := uint64(sb.blockSize / sb.descSize)
	return (sb.groups + perBlock - 1) / perBlock
}

// hasSuper reports whether group g begins with the superblock or a copy.
func (sb *super) hasSuper(g uint64) bool {
	switch {
	case g == 0:
		return true
	case sb.compat&compatSparseSuper2 != 0:
		return g == uint64(sb.backupGroups[0]) || g == uint64(sb.backupGroups[1])
	case g == 1 || sb.roCompat&roCompatSparseSuper == 0:
		return true
	}
	return powerOf(g, 3) || powerOf(g, 5) || powerOf(g, 7)
}

// powerOf reports whether v is a power of base.
func powerOf(v, base uint64) bool {
	for v > 1 && v%base == 0 {
		v /= base
	}
	return v == 1
}
