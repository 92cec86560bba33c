package ext4

import (
	"fmt"
	"io"
)

// ReadAt reads the file's content, zeros in holes and unwritten extents,
// following io.ReaderAt. It reads regular files; a directory's or symbolic
// link's bytes can be had too.
func (n *Inode) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("inode %d: read at %d", n.Ino, off)
	}
	if err := n.readable(); err != nil {
		return 0, err
	}
	if off >= n.Size {
		return 0, io.EOF
	}
	want := len(p)
	p = p[:min(int64(len(p)), n.Size-off)]
	if err := n.readFull(p, off); err != nil {
		return 0, fmt.Errorf("inode %d: %w", n.Ino, err)
	}
	if len(p) < want {
		return len(p), io.EOF
	}
	return len(p), nil
}

// Reader returns a reader of the whole file.
func (n *Inode) Reader() *io.SectionReader { return io.NewSectionReader(n, 0, n.Size) }

// readable refuses what cannot be read.
func (n *Inode) readable() error {
	if n.Flags&FlagEncrypted != 0 {
		return fmt.Errorf("inode %d: %w", n.Ino, ErrEncrypted)
	}
	return nil
}

// readFull fills p, which ends inside the file, from offset off on.
func (n *Inode) readFull(p []byte, off int64) error {
	if n.Flags&FlagInlineData != 0 {
		return n.readInline(p, off)
	}
	runs, err := n.blockRuns()
	if err != nil {
		return err
	}
	bs := int64(n.fs.sb.blockSize)
	for i := findRun(runs, uint64(off/bs)); len(p) > 0; i++ {
		start, end := off+int64(len(p)), off+int64(len(p))
		if i < len(runs) {
			start = min(end, max(off, int64(runs[i].logical)*bs))
			end = min(end, int64(runs[i].logical+runs[i].n)*bs)
		}
		clear(p[:start-off])
		data := p[start-off : end-off]
		if i < len(runs) && runs[i].unwritten {
			clear(data)
		} else if len(data) > 0 {
			at := (int64(runs[i].phys)-int64(runs[i].logical))*bs + start
			if err := n.fs.src.read(data, at); err != nil {
				return err
			}
		}
		p, off = p[end-off:], end
	}
	return nil
}

// inlineData returns the content of a file that has it in the inode: the block
// map's bytes, then the attribute system.data.
func (n *Inode) inlineData() ([]byte, error) {
	more, err := n.inlineXattr()
	if err != nil {
		return nil, err
	}
	return append(append([]byte(nil), n.iblock()...), more...), nil
}

func (n *Inode) readInline(p []byte, off int64) error {
	data, err := n.inlineData()
	if err != nil {
		return err
	}
	clear(p)
	if off < int64(len(data)) {
		copy(p, data[off:])
	}
	return nil
}

// fastSymlink reports whether a symbolic link's target is in the inode's block
// map.
func (n *Inode) fastSymlink() bool {
	return n.Flags&(FlagExtents|FlagInlineData) == 0 && n.Size < int64(len(n.iblock()))
}

// Symlink returns the target of a symbolic link.
func (n *Inode) Symlink() (string, error) {
	if !n.IsSymlink() {
		return "", fmt.Errorf("inode %d: not a symbolic link", n.Ino)
	}
	if err := n.readable(); err != nil {
		return "", err
	}
	if n.Size > maxSymlink {
		return "", fmt.Errorf("inode %d: %w", n.Ino, corrupt("symbolic link of %d bytes, expected at most %d", n.Size, maxSymlink))
	}
	if n.fastSymlink() {
		return string(n.iblock()[:n.Size]), nil
	}
	p := make([]byte, n.Size)
	if err := n.readFull(p, 0); err != nil {
		return "", fmt.Errorf("inode %d: %w", n.Ino, err)
	}
	return string(p), nil
}
