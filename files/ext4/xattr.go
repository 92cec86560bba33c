package ext4

import (
	"errors"
	"fmt"
	"slices"
	"strings"
)

const xattrMagic = 0xEA020000

// Indexes that stand for the beginning of an attribute's name.
const (
	xattrUser        = 1
	xattrACLAccess   = 2
	xattrACLDefault  = 3
	xattrTrusted     = 4
	xattrSecurity    = 6
	xattrSystem      = 7
	xattrRichACL     = 8
	inlineDataName   = "data" // with xattrSystem: the rest of inline data
	xattrEntrySize   = 16
	xattrBlockHeader = 32
	xattrInodeHeader = 4
)

// An Xattr is an extended attribute, as getxattr(2) shows it: POSIX ACLs are
// converted from their form on disk.
type Xattr struct {
	Name  string
	Value []byte
}

// Xattrs returns the inode's extended attributes, sorted by name.
func (n *Inode) Xattrs() ([]Xattr, error) {
	var out []Xattr
	total := 0
	err := n.eachXattr(func(e xattrEntry) error {
		name, ok := e.fullName()
		if !ok {
			return nil
		}
		value, err := n.xattrValue(e)
		if err != nil {
			return fmt.Errorf("attribute %s: %w", name, err)
		}
		if total += len(name) + len(value); total > maxXattrTotal {
			return corrupt("attributes of more than %d bytes", maxXattrTotal)
		}
		out = append(out, Xattr{name, value})
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("inode %d: %w", n.Ino, err)
	}
	slices.SortFunc(out, func(a, b Xattr) int { return strings.Compare(a.Name, b.Name) })
	return out, nil
}

// eachXattr calls fn for the attributes in the inode, then for those in the
// attribute block.
func (n *Inode) eachXattr(fn func(xattrEntry) error) error {
	if at := 128 + n.extra(); n.extra() > 0 && at+xattrInodeHeader <= len(n.raw) && le.Uint32(n.raw[at:]) == xattrMagic {
		body := n.raw[at+xattrInodeHeader:]
		if err := eachXattrIn(body, body, fn); err != nil {
			return err
		}
	}
	if n.xattrBlock == 0 {
		return nil
	}
	p, err := n.readXattrBlock()
	if err == nil {
		err = eachXattrIn(p[xattrBlockHeader:], p, fn)
	}
	if err != nil && !errors.Is(err, errStop) {
		return fmt.Errorf("attribute block %d: %w", n.xattrBlock, err)
	}
	return err
}

// readXattrBlock returns the attribute block, verified.
func (n *Inode) readXattrBlock() ([]byte, error) {
	sb := n.fs.sb
	if !sb.validRun(n.xattrBlock, 1) {
		return nil, corrupt("outside of the file system")
	}
	p, err := n.fs.src.block(n.xattrBlock)
	if err != nil {
		return nil, err
	}
	if le.Uint32(p) != xattrMagic {
		return nil, corrupt("begins with %#08x, expected %#08x", le.Uint32(p), uint32(xattrMagic))
	}
	if sb.hasCsum() {
		const sumAt = 0x10
		sum := crc32c(sb.csumSeed, le.AppendUint64(nil, n.xattrBlock))
		sum = crc32cWithout(sum, p, sumAt, 4)
		if found := le.Uint32(p[sumAt:]); found != sum {
			return nil, badSum(found, sum)
		}
	}
	return p, nil
}

// An xattrEntry is an attribute as it lies in an inode or block.
type xattrEntry struct {
	index    byte
	name     string
	valueIno uint32 // the inode that holds the value, or 0
	size     uint32 // of the value, in bytes
	hash     uint32
	value    []byte // where valueIno is 0
}

// eachXattrIn decodes the entries that begin at p's first byte; values lie at
// offsets from the beginning of base.
func eachXattrIn(p, base []byte, fn func(xattrEntry) error) error {
	for len(p) >= 4 && le.Uint32(p) != 0 {
		if len(p) < xattrEntrySize || len(p) < xattrEntrySize+int(p[0]) {
			return corrupt("attribute entry is cut off")
		}
		nameLen := int(p[0])
		e := xattrEntry{
			index:    p[1],
			name:     string(p[xattrEntrySize : xattrEntrySize+nameLen]),
			valueIno: le.Uint32(p[4:]),
			size:     le.Uint32(p[8:]),
			hash:     le.Uint32(p[12:]),
		}
		if off := int64(le.Uint16(p[2:])); e.valueIno == 0 && e.size > 0 {
			if off+int64(e.size) > int64(len(base)) {
				return corrupt("attribute %q: value of %d bytes at %d, expected to end at %d", e.name, e.size, off, len(base))
			}
			e.value = base[off : off+int64(e.size)]
		}
		if err := fn(e); err != nil {
			return err
		}
		p = p[min(len(p), (xattrEntrySize+nameLen+3)&^3):]
	}
	return nil
}

// fullName returns the name as listxattr(2) shows it; false for attributes
// that it does not show.
func (e xattrEntry) fullName() (string, bool) {
	switch e.index {
	case xattrUser:
		return "user." + e.name, true
	case xattrACLAccess:
		return "system.posix_acl_access", true
	case xattrACLDefault:
		return "system.posix_acl_default", true
	case xattrTrusted:
		return "trusted." + e.name, true
	case xattrSecurity:
		return "security." + e.name, true
	case xattrRichACL:
		return "system.richacl", true
	case xattrSystem:
		return "system." + e.name, e.name != inlineDataName
	}
	return "", false
}

// xattrValue returns a copy of the value, as getxattr(2) shows it.
func (n *Inode) xattrValue(e xattrEntry) ([]byte, error) {
	switch {
	case e.valueIno != 0:
		return n.fs.xattrInodeValue(e)
	case e.index == xattrACLAccess || e.index == xattrACLDefault:
		return convertACL(e.value)
	}
	return append([]byte{}, e.value...), nil
}

// xattrInodeValue reads a value that has an inode of its own.
func (f *FS) xattrInodeValue(e xattrEntry) ([]byte, error) {
	if e.size > maxXattrValue {
		return nil, corrupt("value of %d bytes, expected at most %d", e.size, maxXattrValue)
	}
	n, err := f.Inode(e.valueIno)
	if err != nil {
		return nil, err
	}
	if n.Flags&FlagEAInode == 0 || !n.IsRegular() || n.Size != int64(e.size) {
		return nil, corrupt("inode %d does not hold a value of %d bytes", e.valueIno, e.size)
	}
	value := make([]byte, e.size)
	if err := n.readFull(value, 0); err != nil {
		return nil, err
	}
	return value, nil
}

// inlineXattr returns the part of inline data that lies after the block map.
func (n *Inode) inlineXattr() (data []byte, err error) {
	err = n.eachXattr(func(e xattrEntry) error {
		if e.index != xattrSystem || e.name != inlineDataName || e.valueIno != 0 {
			return nil
		}
		data = e.value
		return errStop
	})
	if err != nil && !errors.Is(err, errStop) {
		return nil, err
	}
	return data, nil
}

// convertACL turns a POSIX ACL from its form on disk, where entries that need
// no id have none, into that of getxattr(2).
func convertACL(p []byte) ([]byte, error) {
	const (
		onDisk, shown = 1, 2 // versions
		user, group   = 2, 8 // tags of entries with an id
	)
	if len(p) < 4 || le.Uint32(p) != onDisk {
		return nil, corrupt("access control list of an unknown version")
	}
	out := le.AppendUint32(nil, shown)
	for p = p[4:]; len(p) > 0; {
		if len(p) < 4 {
			return nil, corrupt("access control list is cut off")
		}
		tag, id := le.Uint16(p), ^uint32(0)
		out = append(out, p[:4]...)
		p = p[4:]
		if tag == user || tag == group {
			if len(p) < 4 {
				return nil, corrupt("access control list is cut off")
			}
			id = le.Uint32(p)
			p = p[4:]
		}
		out = le.AppendUint32(out, id)
	}
	return out, nil
}
