package ext4

import "fmt"

// bit reports whether bit i of a bitmap is set.
func bit(bitmap []byte, i uint64) bool { return bitmap[i/8]>>(i%8)&1 != 0 }

// inodeBitmap returns the bitmap of group g's inodes, to be read only; nil if
// none was ever used.
func (f *FS) inodeBitmap(g uint64, d group) ([]byte, error) {
	if d.flags&groupInodeUninit != 0 {
		return nil, nil
	}
	p, err := f.src.block(d.inodeBitmap)
	if err == nil {
		err = f.verifyBitmap(p, int(f.sb.inodesPerGroup+7)/8, d.inodeBitmapSum)
	}
	if err != nil {
		return nil, fmt.Errorf("group %d: inode bitmap: %w", g, err)
	}
	return p, nil
}

// inodeUsed reports whether the bitmap has the inode in use.
func (f *FS) inodeUsed(ino uint32) (bool, error) {
	if used, known := f.fc.used(ino); known {
		return used, nil
	}
	g := uint64((ino - 1) / f.sb.inodesPerGroup)
	d, err := f.group(g)
	if err != nil {
		return false, err
	}
	p, err := f.inodeBitmap(g, d)
	if err != nil || p == nil {
		return false, err
	}
	return bit(p, uint64((ino-1)%f.sb.inodesPerGroup)), nil
}

// blockBitmap returns the bitmap of group g's clusters, to be read only.
func (f *FS) blockBitmap(g uint64) ([]byte, error) {
	d, err := f.group(g)
	if err != nil {
		return nil, err
	}
	if d.flags&groupBlockUninit != 0 {
		return f.initialBitmap(g, d), nil
	}
	p, err := f.src.block(d.blockBitmap)
	if err == nil {
		err = f.verifyBitmap(p, int(f.sb.blocksPerGroup>>f.sb.clusterBits)/8, d.blockBitmapSum)
	}
	if err != nil {
		return nil, fmt.Errorf("group %d: block bitmap: %w", g, err)
	}
	return p, nil
}

// initialBitmap returns the bitmap of a group that nothing was allocated in
// yet: only its own metadata is in use.
func (f *FS) initialBitmap(g uint64, d group) []byte {
	sb := f.sb
	p := make([]byte, sb.blockSize)
	first, n := sb.firstBlock(g), sb.groupBlocks(g)
	mark := func(b, count uint64) {
		for ; count > 0; b, count = b+1, count-1 {
			if b >= first && b < first+n {
				i := (b - first) >> sb.clusterBits
				p[i/8] |= 1 << (i % 8)
			}
		}
	}
	mark(first, sb.headBlocks(g))
	mark(d.blockBitmap, 1)
	mark(d.inodeBitmap, 1)
	mark(d.inodeTable, f.tableBlocks)
	return p
}

// headBlocks returns how many blocks at the beginning of group g hold the
// superblock or a copy, group descriptors and room for more of them.
func (sb *super) headBlocks(g uint64) uint64 {
	var n uint64
	if sb.hasSuper(g) {
		n = 1
	}
	perBlock := uint64(sb.blockSize / sb.descSize)
	if sb.metaBG(g / perBlock) {
		if in := g % perBlock; in == 0 || in == 1 || in == perBlock-1 {
			n++
		}
		return n
	}
	if n > 0 {
		gdt := sb.descBlocks()
		if sb.incompat&incompatMetaBG != 0 {
			gdt = min(gdt, sb.firstMetaBG)
		}
		n += gdt + sb.reservedGDT
	}
	return n
}

// Free reports whether the byte at off of the image belongs to no file and no
// metadata. Bytes after the file system's end are not free: they are not its.
func (f *FS) Free(off int64) (bool, error) {
	b := uint64(off) / uint64(f.sb.blockSize)
	if off < 0 || b < f.sb.firstDataBlock || b >= f.sb.blocks {
		return false, nil
	}
	return f.freeBlock(b)
}

// freeBlock reports whether the bitmap, fast commits applied, has block b
// free.
func (f *FS) freeBlock(b uint64) (bool, error) {
	if f.fc.usesBlock(b) {
		return false, nil
	}
	g := f.sb.groupOf(b)
	p, err := f.blockBitmap(g)
	if err != nil {
		return false, err
	}
	return !bit(p, (b-f.sb.firstBlock(g))>>f.sb.clusterBits), nil
}
