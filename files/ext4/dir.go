package ext4

import (
	"bytes"
	"errors"
	"fmt"
)

// errStop ends a walk early; it never leaves the package.
var errStop = errors.New("stop")

// Types in directory entries.
var direntTypes = [...]uint16{0, ModeRegular, ModeDir, ModeChar, ModeBlock, ModeFIFO, ModeSocket, ModeSymlink}

// A Dirent is an entry of a directory.
type Dirent struct {
	Name []byte // any bytes but '/' and 0; valid until the callback returns
	Ino  uint32
	Type uint16 // one of the Mode constants, or 0 where the file system does not say
}

// ReadDir calls fn for each entry of the directory but "." and "..", in the
// order they lie in, until fn returns an error, which it then returns.
// Names are unique on a sound file system only.
func (f *FS) ReadDir(dir *Inode, fn func(Dirent) error) error {
	return f.readDir(dir, func(e Dirent) error {
		if isDot(e.Name) {
			return nil
		}
		return fn(e)
	})
}

func isDot(name []byte) bool {
	return len(name) > 0 && len(name) <= 2 && name[0] == '.' && name[len(name)-1] == '.'
}

// readDir calls fn for all entries, fast commits applied.
func (f *FS) readDir(dir *Inode, fn func(Dirent) error) error {
	if !dir.IsDir() {
		return fmt.Errorf("inode %d: %w", dir.Ino, ErrNotDir)
	}
	if err := dir.readable(); err != nil {
		return err
	}
	var inFn error
	err := f.fc.readDir(f, dir, func(e Dirent) error {
		inFn = fn(e)
		return inFn
	})
	if err != nil && inFn == nil {
		return fmt.Errorf("directory %d: %w", dir.Ino, err)
	}
	return err
}

// readStored calls fn for all entries in the directory's own blocks.
func (f *FS) readStored(dir *Inode, fn func(Dirent) error) error {
	if dir.Flags&FlagInlineData != 0 {
		return f.readInlineDir(dir, fn)
	}
	if dir.Size > maxDirSize {
		return corrupt("directory of %d bytes, expected at most %d", dir.Size, int64(maxDirSize))
	}
	runs, err := dir.blockRuns()
	if err != nil {
		return err
	}
	blocks := uint64(dir.Size+int64(f.sb.blockSize)-1) / uint64(f.sb.blockSize)
	for _, r := range runs {
		if r.unwritten {
			continue
		}
		for i := uint64(0); i < r.n && r.logical+i < blocks; i++ {
			if err := f.readDirBlock(dir, r.phys+i, fn); err != nil {
				return err
			}
		}
	}
	return nil
}

// readDirBlock reads the entries of one block. Blocks of the hash index look
// like blocks with one unused entry.
func (f *FS) readDirBlock(dir *Inode, b uint64, fn func(Dirent) error) error {
	p, err := f.src.block(b)
	if err != nil {
		return err
	}
	if f.sb.hasCsum() {
		if err := verifyDirBlock(p, dir.seed()); err != nil {
			return fmt.Errorf("block %d: %w", b, err)
		}
	}
	return f.entries(p, fn)
}

// entries calls fn for each used entry in p.
func (f *FS) entries(p []byte, fn func(Dirent) error) error {
	const header = 8
	for off := 0; off+header <= len(p); {
		e := p[off:]
		size := recLen(e, len(p))
		nameLen := int(e[6])
		typ := int(e[7])
		if f.sb.incompat&incompatFiletype == 0 {
			nameLen, typ = int(le.Uint16(e[6:])), 0
		}
		if size < header || size%4 != 0 || size > len(e) || header+nameLen > size {
			return corrupt("entry at byte %d of %d bytes with a name of %d", off, size, nameLen)
		}
		if ino := le.Uint32(e); ino != 0 && nameLen != 0 {
			d := Dirent{Name: e[header : header+nameLen : header+nameLen], Ino: ino}
			if typ < len(direntTypes) {
				d.Type = direntTypes[typ]
			}
			if bytes.IndexByte(d.Name, '/') >= 0 || bytes.IndexByte(d.Name, 0) >= 0 {
				return corrupt("name %q with a slash or zero", d.Name)
			}
			if err := fn(d); err != nil {
				return err
			}
		}
		off += size
	}
	return nil
}

// recLen decodes an entry's length in a block of size bytes: 16 bits cannot
// hold 65536, which is written as 0 or 65535.
func recLen(e []byte, size int) int {
	n := int(le.Uint16(e[4:]))
	switch {
	case size < 1<<16:
		return n
	case n == 0 || n == 0xFFFF:
		return size
	}
	return n&^3 | n&3<<16
}

// readInlineDir reads a directory that lies in its inode: the parent's number,
// then entries; more entries in the attribute system.data.
func (f *FS) readInlineDir(dir *Inode, fn func(Dirent) error) error {
	more, err := dir.inlineXattr()
	if err != nil {
		return err
	}
	blk := dir.iblock()
	dots := []Dirent{{[]byte("."), dir.Ino, ModeDir}, {[]byte(".."), le.Uint32(blk), ModeDir}}
	for _, d := range dots {
		if err := fn(d); err != nil {
			return err
		}
	}
	if err := f.entries(blk[4:], fn); err != nil {
		return err
	}
	return f.entries(more, fn)
}

// verifyDirBlock checks the checksum of a directory block: of entries, which
// ends in a tail that looks like an unused entry, or of the hash index.
func verifyDirBlock(p []byte, seed uint32) error {
	const tailSize = 12
	if at := indexCountAt(p); at > 0 {
		return verifyIndexBlock(p, at, seed)
	}
	tail := p[len(p)-tailSize:]
	if le.Uint32(tail) != 0 || le.Uint16(tail[4:]) != tailSize || tail[6] != 0 || tail[7] != 0xDE {
		return corrupt("no checksum at the end")
	}
	if found, sum := le.Uint32(tail[8:]), crc32c(seed, p[:len(p)-tailSize]); found != sum {
		return badSum(found, sum)
	}
	return nil
}

// indexCountAt returns where a block of the hash index counts its entries, or
// 0 if p is not one.
func indexCountAt(p []byte) int {
	first := recLen(p, len(p))
	if le.Uint32(p) == 0 && first == len(p) {
		return 8
	}
	if first != 12 || recLen(p[12:], len(p)) != len(p)-12 {
		return 0
	}
	if le.Uint32(p[24:]) != 0 || p[29] != 8 {
		return 0
	}
	return 32
}

// verifyIndexBlock checks the checksum of a block of the hash index: it covers
// the entries in use and the tail after the room for entries.
func verifyIndexBlock(p []byte, countAt int, seed uint32) error {
	limit, count := int(le.Uint16(p[countAt:])), int(le.Uint16(p[countAt+2:]))
	tailAt := countAt + limit*8
	if count > limit || tailAt+8 > len(p) {
		return corrupt("hash index of %d entries with room for %d", count, limit)
	}
	sum := crc32c(seed, p[:countAt+count*8])
	sum = crc32c(sum, p[tailAt:tailAt+4])
	sum = crc32cUint32(sum, 0)
	if found := le.Uint32(p[tailAt+4:]); found != sum {
		return badSum(found, sum)
	}
	return nil
}
