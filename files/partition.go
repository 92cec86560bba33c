package files

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/diskfs/go-diskfs/partition/gpt"
	"github.com/diskfs/go-diskfs/partition/mbr"

	"github.com/cowdev/cowdev/block"
)

// A Part is a partition. Its number is the one Linux gives it: the index in
// the table, and from 5 on for the logical ones of an MBR.
type Part struct {
	Number int    `json:"number"`
	Off    int64  `json:"start"` // bytes
	N      int64  `json:"length"`
	Type   string `json:"type"` // the type's code
	Name   string `json:"name,omitempty"`
}

// In returns the partition's bytes of r.
func (p Part) In(r block.Reader) block.Reader {
	return section{io.NewSectionReader(r, p.Off, p.N)}
}

// section makes a block.Reader of a SectionReader.
type section struct{ *io.SectionReader }

// maxLogical bounds the chain of logical partitions.
const maxLogical = 128

// maxGPT bounds the entries of a GPT, in bytes: sixteen times the usual.
const maxGPT = 256 << 10

const mbrSector = 512

// Partitions returns the partitions of r's table, GPT or MBR, with its name;
// none and "" when it has no table.
func Partitions(r block.Reader) (parts []Part, table string, err error) {
	defer func() {
		if p := recover(); p != nil {
			parts, table, err = nil, "", fmt.Errorf("%w: partition table: %v", ErrDamaged, p)
		}
	}()
	head := make([]byte, 2*mbrSector)
	if r.Size() < int64(len(head)) {
		return nil, "", nil
	}
	if _, err := r.ReadAt(head, 0); err != nil {
		return nil, "", fmt.Errorf("read the partition table: %w", err)
	}
	if binary.LittleEndian.Uint16(head[510:]) != 0xaa55 {
		return nil, "", nil
	}
	if parts, err := gptParts(r); err != nil || len(parts) > 0 {
		return parts, "gpt", err
	}
	if parts, err = mbrParts(r); err != nil || len(parts) == 0 {
		return nil, "", err
	}
	return parts, "mbr", nil
}

// gptParts reads a GPT with sectors of 512 or of 4096 bytes, from its backup
// where the primary one is damaged.
func gptParts(r block.Reader) ([]Part, error) {
	for _, sector := range []int{512, 4096} {
		if r.Size() < int64(3*sector) {
			continue
		}
		if err := checkGPTSize(r, int64(sector)); err != nil {
			return nil, err
		}
		t, err := gpt.Read(newStorage(r), sector, sector)
		if err != nil {
			continue
		}
		var parts []Part
		for _, p := range t.Partitions {
			part := Part{Number: p.Index, Off: p.GetStart(), N: p.GetSize(), Type: string(p.Type), Name: p.Name}
			if err := part.check(r.Size()); err != nil {
				return nil, err
			}
			parts = append(parts, part)
		}
		return parts, nil
	}
	return nil, nil
}

// checkGPTSize refuses a GPT, at either end of r, whose header asks for more
// memory than its entries can need.
func checkGPTSize(r block.Reader, sector int64) error {
	for _, off := range []int64{sector, (r.Size()/sector - 1) * sector} {
		h := make([]byte, 92)
		if _, err := r.ReadAt(h, off); err != nil {
			return fmt.Errorf("read the partition table: %w", err)
		}
		count, size := binary.LittleEndian.Uint32(h[80:]), binary.LittleEndian.Uint32(h[84:])
		if string(h[:8]) == "EFI PART" && int64(count)*int64(size) > maxGPT {
			return fmt.Errorf("%w: GPT header at %d with %d entries of %d bytes, expected at most %d bytes in all", ErrDamaged, off, count, size, maxGPT)
		}
	}
	return nil
}

// check refuses a partition outside an image of size bytes.
func (p Part) check(size int64) error {
	if p.Off < 0 || p.N <= 0 || p.Off > size || p.N > size-p.Off {
		return fmt.Errorf("%w: partition %d lies at %d with %d bytes, outside an image of %d bytes", ErrDamaged, p.Number, p.Off, p.N, size)
	}
	return nil
}

// mbrParts reads the four entries of an MBR and the logical partitions of an
// extended one.
func mbrParts(r block.Reader) ([]Part, error) {
	t, err := mbr.Read(newStorage(r), mbrSector, mbrSector)
	if err != nil {
		return nil, nil // no MBR: any other boot sector ends with the same two bytes
	}
	var parts []Part
	for _, p := range t.Partitions {
		part := Part{Number: p.Index, Off: p.GetStart(), N: p.GetSize(), Type: fmt.Sprintf("%02x", byte(p.Type))}
		switch {
		case p.Type == mbr.Empty || p.Size == 0:
			continue
		case part.check(r.Size()) != nil:
			return nil, nil // a boot sector's code, not a table
		}
		parts = append(parts, part)
		if extended(byte(p.Type)) {
			logical, err := logicalParts(r, part)
			if err != nil {
				return nil, err
			}
			parts = append(parts, logical...)
		}
	}
	slices.SortFunc(parts, func(a, b Part) int { return cmp.Compare(a.Number, b.Number) })
	return parts, nil
}

// extended reports whether a type's partition holds logical ones.
func extended(typ byte) bool { return typ == 0x05 || typ == 0x0f || typ == 0x85 }

// logicalParts follows the chain of boot records in an extended partition.
// Each holds one logical partition, relative to the record, and the next
// record, relative to the extended partition.
func logicalParts(r block.Reader, ext Part) ([]Part, error) {
	var parts []Part
	at := ext.Off
	for range maxLogical {
		b := make([]byte, mbrSector)
		if _, err := r.ReadAt(b, at); err != nil {
			return nil, fmt.Errorf("read the logical partitions at %d: %w", at, err)
		}
		if binary.LittleEndian.Uint16(b[510:]) != 0xaa55 {
			return parts, nil
		}
		here, next := b[446:462], b[462:478]
		if n := entrySectors(here, 12); n > 0 {
			p := Part{Number: 5 + len(parts), Off: at + entrySectors(here, 8), N: n, Type: fmt.Sprintf("%02x", here[4])}
			if err := p.check(r.Size()); err != nil {
				return nil, err
			}
			parts = append(parts, p)
		}
		if !extended(next[4]) || entrySectors(next, 12) == 0 {
			return parts, nil
		}
		if at = ext.Off + entrySectors(next, 8); at >= ext.Off+ext.N {
			return nil, fmt.Errorf("%w: the chain of logical partitions leaves its extended one at %d", ErrDamaged, at)
		}
	}
	return nil, fmt.Errorf("%w: more than %d logical partitions", ErrDamaged, maxLogical)
}

// entrySectors returns the number of sectors at byte i of an MBR's entry, as
// bytes.
func entrySectors(entry []byte, i int) int64 {
	return int64(binary.LittleEndian.Uint32(entry[i:])) * mbrSector
}

// ErrNoPartition says that the image has no partition of that number.
var ErrNoPartition = errors.New("no such partition")

// Choose returns the partition of that number of r.
func Choose(r block.Reader, number int) (Part, error) {
	parts, table, err := Partitions(r)
	if err != nil {
		return Part{}, err
	}
	if table == "" {
		return Part{}, fmt.Errorf("partition %d: %w: the image has no partition table", number, ErrNoPartition)
	}
	for _, p := range parts {
		if p.Number == number {
			return p, nil
		}
	}
	return Part{}, fmt.Errorf("partition %d: %w: the %s table has %s", number, ErrNoPartition, table, numbers(parts))
}

// numbers lists the numbers of parts.
func numbers(parts []Part) string {
	s := ""
	for i, p := range parts {
		if i > 0 {
			s += ", "
		}
		s += fmt.Sprint(p.Number)
	}
	return s
}
