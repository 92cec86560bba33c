package files

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/cowdev/cowdev/block"
)

// Open finds the file system that fills r and opens it. The error wraps
// ErrNoFS where there is none that this package can read, and says what there
// is instead.
func Open(r block.Reader) (FS, error) {
	head := make([]byte, min(probeSize, max(r.Size(), 0)))
	if _, err := r.ReadAt(head, 0); err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("look for a file system: %w", err)
	}
	for _, k := range known {
		if !k.matches(head) {
			continue
		}
		if k.open == nil {
			return nil, fmt.Errorf("%w: this is %s, of which files cannot be read here; %s", ErrNoFS, k.name, k.advice)
		}
		fsys, err := k.open(r, head)
		if err != nil {
			return nil, fmt.Errorf("open the %s file system: %w", k.name, err)
		}
		return fsys, nil
	}
	parts, table, err := Partitions(r)
	if err != nil {
		return nil, err
	}
	if len(parts) > 0 {
		return nil, fmt.Errorf("%w: a %s partition table fills the image, name one of its partitions %s with --partition N", ErrNoFS, table, numbers(parts))
	}
	return nil, fmt.Errorf("%w: neither a known file system nor a partition table is at its beginning", ErrNoFS)
}

// probeSize covers every magic of known.
const probeSize = 68 << 10

// A kind is a file system, or another content, that is told by a magic.
type kind struct {
	name   string
	magics []magic
	test   func(head []byte) bool // instead of magics
	open   func(r block.Reader, head []byte) (FS, error)
	advice string // where open is nil
}

type magic struct {
	off   int
	bytes string
}

const mountAdvice = "`cowdev mount` gets at them where there is root"

// known is searched in order: what carries the most certain magic first, FAT,
// which has none, last. ISO 9660 stands before the partition tables because a
// hybrid image has both.
var known = []kind{
	{name: "ext", magics: []magic{{1080, "\x53\xef"}}, open: openExt},
	{name: "squashfs", magics: []magic{{0, "hsqs"}}, open: openSquashfs},
	{name: "ISO 9660", magics: []magic{{32769, "CD001"}}, open: openISO},
	{name: "XFS", magics: []magic{{0, "XFSB"}}, advice: mountAdvice},
	{name: "btrfs", magics: []magic{{65536 + 64, "_BHRfS_M"}}, advice: mountAdvice},
	{name: "f2fs", magics: []magic{{1024, "\x10\x20\xf5\xf2"}}, advice: mountAdvice},
	{name: "bcachefs", magics: []magic{{4096 + 24, "\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81"}}, advice: mountAdvice},
	{name: "EROFS", magics: []magic{{1024, "\xe2\xe1\xf5\xe0"}}, advice: mountAdvice},
	{name: "NTFS", magics: []magic{{3, "NTFS    "}}, advice: mountAdvice},
	{name: "exFAT", magics: []magic{{3, "EXFAT   "}}, advice: mountAdvice},
	{name: "an encrypted LUKS volume", magics: []magic{{0, "LUKS\xba\xbe"}}, advice: "`cowdev attach` it and open it with cryptsetup"},
	{name: "an LVM physical volume", magics: []magic{{512, "LABELONE"}, {0, "LABELONE"}}, advice: "`cowdev attach` it and activate its volume group"},
	{name: "swap space", magics: []magic{{4086, "SWAPSPACE2"}}, advice: "it holds no files"},
	{name: "a qcow2 image", magics: []magic{{0, "QFI\xfb"}}, advice: "convert it with qemu-img to raw"},
	{name: "FAT", test: looksFAT, open: openFAT},
}

func (k kind) matches(head []byte) bool {
	if k.test != nil {
		return k.test(head)
	}
	for _, m := range k.magics {
		if end := m.off + len(m.bytes); end <= len(head) && bytes.Equal(head[m.off:end], []byte(m.bytes)) {
			return true
		}
	}
	return false
}

// looksFAT reports whether the boot sector describes a FAT file system: a
// jump, and numbers that can be true.
func looksFAT(head []byte) bool {
	if len(head) < 512 || head[0] != 0xeb && head[0] != 0xe9 || binary.LittleEndian.Uint16(head[510:]) != 0xaa55 {
		return false
	}
	g, err := parseFAT(head)
	return err == nil && g.clusters > 0
}
