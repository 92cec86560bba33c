package ext4

import (
	"errors"
	"fmt"
	"io/fs"
	"iter"
)

// scanSize is how many bytes of an inode table are read at once.
const scanSize = 256 << 10

// Inodes returns all inodes in use, those of the file system itself included,
// in order of their numbers. An inode that cannot be read is told as an error,
// and the walk goes on. It reads the used parts of the inode tables.
func (f *FS) Inodes() iter.Seq2[*Inode, error] {
	return func(yield func(*Inode, error) bool) {
		for g := range f.sb.groups {
			for n, err := range f.groupInodes(g) {
				if !yield(n, err) {
					return
				}
			}
		}
	}
}

// groupInodes returns the inodes in use of group g.
func (f *FS) groupInodes(g uint64) iter.Seq2[*Inode, error] {
	return func(yield func(*Inode, error) bool) {
		used, d, err := f.usedInodes(g)
		if err != nil {
			yield(nil, err)
			return
		}
		perRead := max(scanSize/f.sb.inodeSize, 1)
		for len(used) > 0 {
			// One read takes the inodes up to perRead after the first.
			n := 1
			for n < len(used) && int(used[n]-used[0]) < perRead {
				n++
			}
			if !f.yieldInodes(g, d, used[:n], yield) {
				return
			}
			used = used[n:]
		}
	}
}

// yieldInodes reads the part of group g's inode table that holds the inodes
// with the given indexes, and yields them. It returns false to stop.
func (f *FS) yieldInodes(g uint64, d group, used []uint32, yield func(*Inode, error) bool) bool {
	size := f.sb.inodeSize
	p := make([]byte, int(used[len(used)-1]-used[0]+1)*size)
	at := int64(d.inodeTable)*int64(f.sb.blockSize) + int64(used[0])*int64(size)
	if err := f.src.read(p, at); err != nil {
		return yield(nil, fmt.Errorf("group %d: inode table: %w", g, err))
	}
	for _, i := range used {
		ino := uint32(g)*f.sb.inodesPerGroup + i + 1
		raw := p[int(i-used[0])*size:][:size]
		if changed := f.fc.inode(ino); changed != nil {
			raw = changed
		}
		n, err := f.parseInode(ino, raw)
		if err == nil && n.Mode == 0 && ino != badBlocksIno {
			continue
		}
		if !yield(n, err) {
			return false
		}
	}
	return true
}

// usedInodes returns the indexes in group g of the inodes in use, in order.
func (f *FS) usedInodes(g uint64) ([]uint32, group, error) {
	d, err := f.group(g)
	if err != nil {
		return nil, d, err
	}
	bitmap, err := f.inodeBitmap(g, d)
	if err != nil {
		return nil, d, err
	}
	var used []uint32
	for i := range f.sb.inodesPerGroup {
		ino := uint64(g)*uint64(f.sb.inodesPerGroup) + uint64(i) + 1
		if ino > uint64(f.sb.inodes) {
			break
		}
		in := bitmap != nil && i < f.sb.inodesPerGroup-d.unusedInodes && bit(bitmap, uint64(i))
		if now, known := f.fc.used(uint32(ino)); known {
			in = now
		}
		if in {
			used = append(used, i)
		}
	}
	return used, d, nil
}

// isNotExist reports whether err says that an inode is not in use.
func isNotExist(err error) bool { return errors.Is(err, fs.ErrNotExist) }
