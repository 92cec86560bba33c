package files

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"strings"
	"time"
	"unicode/utf16"

	"golang.org/x/text/encoding/charmap"

	"github.com/cowdev/cowdev/block"
)

// FAT12, FAT16 and FAT32. go-diskfs reads FAT too, but pads files to the end
// of their cluster, cannot open an empty one, refuses a volume whose two
// tables differ (as those of a running machine do), passes over bad sectors
// and never ends on a chain that leads into itself.

const (
	fatEntry   = 32      // bytes of a directory's entry
	maxFATDir  = 2 << 20 // bytes of a directory: the specification's bound
	fatWindow  = 64 << 10
	fatNameLen = 11
)

// Attributes of a directory's entry.
const (
	fatReadOnly = 0x01
	fatVolume   = 0x08
	fatSubdir   = 0x10
	fatLongName = 0x0f
)

// fatGeometry is what the boot sector says; offsets are in bytes.
type fatGeometry struct {
	cluster  int64  // bytes of a cluster
	table    int64  // where the first table begins
	tableLen int64  // and its bytes
	root     int64  // where the root of FAT12 and FAT16 begins
	rootLen  int64  // and its bytes
	data     int64  // where cluster 2 begins
	clusters uint32 // their number
	bits     int    // of an entry of the table: 12, 16, 32
	rootAt   uint32 // FAT32: the root's first cluster
	label    string
	serial   uint32
}

// parseFAT reads the boot sector b.
func parseFAT(b []byte) (fatGeometry, error) {
	le := binary.LittleEndian
	sector, perCluster := int64(le.Uint16(b[11:])), int64(b[13])
	reserved, tables := int64(le.Uint16(b[14:])), int64(b[16])
	total := int64(le.Uint16(b[19:]))
	if total == 0 {
		total = int64(le.Uint32(b[32:]))
	}
	tableSectors := int64(le.Uint16(b[22:]))
	fat32 := tableSectors == 0
	if fat32 {
		tableSectors = int64(le.Uint32(b[36:]))
	}
	if sector < 512 || sector > 4096 || sector&(sector-1) != 0 || perCluster == 0 || perCluster&(perCluster-1) != 0 || reserved == 0 || tables == 0 || tables > 4 || tableSectors == 0 {
		return fatGeometry{}, fmt.Errorf("%w: the boot sector describes no FAT", ErrDamaged)
	}
	g := fatGeometry{cluster: sector * perCluster, table: reserved * sector, tableLen: tableSectors * sector}
	g.root = g.table + tables*g.tableLen
	g.rootLen = (int64(le.Uint16(b[17:]))*fatEntry + sector - 1) / sector * sector
	g.data = g.root + g.rootLen
	n := (total*sector - g.data) / g.cluster
	if n <= 0 || n > 1<<28 {
		return fatGeometry{}, fmt.Errorf("%w: FAT with %d clusters", ErrDamaged, n)
	}
	g.clusters = uint32(n)
	tail := b[36:]
	switch {
	case fat32:
		g.bits, g.rootAt, tail = 32, le.Uint32(b[44:]), b[64:]
	case n < 4085:
		g.bits = 12
	default:
		g.bits = 16
	}
	if tail[2] == 0x29 {
		g.serial, g.label = le.Uint32(tail[3:]), trimLabel(tail[7:18])
	}
	return g, nil
}

// trimLabel returns a label without the spaces and zeros that fill it.
func trimLabel(b []byte) string { return string(bytes.TrimRight(b, " \x00")) }

// fatFS is a FAT file system.
type fatFS struct {
	r block.Reader
	g fatGeometry

	window    []byte // a piece of the table
	windowOff int64  // where in the table it begins
}

func openFAT(r block.Reader, head []byte) (FS, error) {
	g, err := parseFAT(head)
	if err != nil {
		return nil, err
	}
	return &fatFS{r: r, g: g}, nil
}

func (f *fatFS) Info() Info {
	return Info{
		Type: "vfat", Label: f.g.label, BlockSize: int(f.g.cluster),
		UUID: fmt.Sprintf("%04X-%04X", f.g.serial>>16, f.g.serial&0xffff),
	}
}

func (f *fatFS) Root() (File, error) {
	return &fatFile{fs: f, isRoot: true, attr: Attr{
		ID: uint64(f.g.rootAt), Mode: fs.ModeDir | 0o755, Links: 1,
	}, first: f.g.rootAt}, nil
}

// next returns the table's entry of a cluster.
func (f *fatFS) next(cluster uint32) (uint32, error) {
	off := int64(cluster) * int64(f.g.bits) / 8
	if off+4 > f.g.tableLen && off+int64(f.g.bits+7)/8 > f.g.tableLen {
		return 0, fmt.Errorf("%w: cluster %d lies outside the table", ErrDamaged, cluster)
	}
	var b [4]byte
	if err := f.readTable(b[:], off); err != nil {
		return 0, err
	}
	v := binary.LittleEndian.Uint32(b[:])
	switch f.g.bits {
	case 12:
		return v >> (4 * (cluster & 1)) & 0xfff, nil
	case 16:
		return v & 0xffff, nil
	}
	return v & 0x0fffffff, nil
}

// readTable fills b from the table, through the window.
func (f *fatFS) readTable(b []byte, off int64) error {
	if f.window == nil || off < f.windowOff || off+int64(len(b)) > f.windowOff+int64(len(f.window)) {
		window := make([]byte, min(fatWindow, f.g.tableLen-off)+int64(len(b)))
		if _, err := f.r.ReadAt(window, f.g.table+off); err != nil {
			return fmt.Errorf("read the FAT at %d: %w", f.g.table+off, cutShort(err))
		}
		f.window, f.windowOff = window, off
	}
	copy(b, f.window[off-f.windowOff:])
	return nil
}

// chain returns where the clusters of a file lie, in bytes of the image, as
// runs; at most want bytes of it. A chain that ends before is as it is.
func (f *fatFS) chain(first uint32, want int64) ([]fatRun, error) {
	end := uint32(1)<<min(f.g.bits, 28) - 8
	var runs []fatRun
	cluster := first
	for have := int64(0); have < want && cluster < end; have += f.g.cluster {
		if cluster < 2 || cluster-2 >= f.g.clusters {
			return nil, fmt.Errorf("%w: a chain leads to cluster %d of %d", ErrDamaged, cluster, f.g.clusters)
		}
		at := f.g.data + int64(cluster-2)*f.g.cluster
		if last := len(runs) - 1; last >= 0 && runs[last].at+runs[last].n == at {
			runs[last].n += f.g.cluster
		} else {
			runs = append(runs, fatRun{off: have, at: at, n: f.g.cluster})
		}
		var err error
		if cluster, err = f.next(cluster); err != nil {
			return nil, err
		}
	}
	return runs, nil
}

// A fatRun is a run of a file's bytes: where in the file, where in the image.
type fatRun struct{ off, at, n int64 }

// fatFile is a file of a fatFS.
type fatFile struct {
	fs     *fatFS
	attr   Attr
	isRoot bool
	first  uint32 // cluster; 0 for an empty file

	runs     []fatRun
	haveRuns bool
	children map[string]*fatFile
}

func (f *fatFile) Attr() Attr                         { return f.attr }
func (f *fatFile) Link() (string, error)              { return "", kindError("target", f.attr.Mode) }
func (f *fatFile) Xattrs() (map[string][]byte, error) { return nil, nil }

func (f *fatFile) ReadAt(p []byte, off int64) (int, error) {
	if f.attr.Mode.IsDir() {
		return 0, kindError("content", f.attr.Mode)
	}
	n, atEnd := clip(p, off, f.attr.Size)
	if err := f.locate(f.attr.Size); err != nil {
		return 0, err
	}
	if err := f.read(p[:n], off); err != nil {
		return 0, err
	}
	if atEnd {
		return n, io.EOF
	}
	return n, nil
}

// locate finds the file's runs, once.
func (f *fatFile) locate(size int64) error {
	if f.haveRuns || size == 0 {
		return nil
	}
	runs, err := f.fs.chain(f.first, size)
	if err != nil {
		return err
	}
	f.runs, f.haveRuns = runs, true
	return nil
}

// read fills p from the runs.
func (f *fatFile) read(p []byte, off int64) error {
	for len(p) > 0 {
		i, found := slices.BinarySearchFunc(f.runs, off, func(r fatRun, off int64) int { return cmp.Compare(r.off, off) })
		if !found {
			i--
		}
		if i < 0 || off >= f.runs[i].off+f.runs[i].n {
			return fmt.Errorf("%w: the file's chain ends before byte %d", ErrDamaged, off)
		}
		r := f.runs[i]
		n := min(int64(len(p)), r.off+r.n-off)
		if _, err := f.fs.r.ReadAt(p[:n], r.at+off-r.off); err != nil {
			return cutShort(err)
		}
		p, off = p[n:], off+n
	}
	return nil
}

func (f *fatFile) ReadDir() ([]Entry, error) {
	if err := f.load(); err != nil {
		return nil, err
	}
	entries := make([]Entry, 0, len(f.children))
	for name, c := range f.children {
		entries = append(entries, Entry{Name: name, ID: c.attr.ID, Type: c.attr.Mode.Type()})
	}
	slices.SortFunc(entries, func(a, b Entry) int { return cmp.Compare(a.Name, b.Name) })
	return entries, nil
}

// Child prefers the name as it is written to one that differs in case.
func (f *fatFile) Child(name string) (File, error) {
	if err := f.load(); err != nil {
		return nil, err
	}
	if c, ok := f.children[name]; ok {
		return c, nil
	}
	for other, c := range f.children {
		if strings.EqualFold(other, name) {
			return c, nil
		}
	}
	return nil, fs.ErrNotExist
}

// load reads a directory's entries, once.
func (f *fatFile) load() error {
	if f.children != nil {
		return nil
	}
	if !f.attr.Mode.IsDir() {
		return kindError("entries", f.attr.Mode)
	}
	b, err := f.dirBytes()
	if err != nil {
		return err
	}
	children := map[string]*fatFile{}
	var long longName
	for ; len(b) >= fatEntry && b[0] != 0; b = b[fatEntry:] {
		e := b[:fatEntry]
		switch {
		case e[0] == 0xe5: // deleted
			long = longName{}
		case e[11]&0x3f == fatLongName:
			long.add(e)
		case e[11]&fatVolume != 0 || e[0] == '.':
			long = longName{}
		default:
			name := long.take(e)
			if err := checkName(name); err != nil {
				return err
			}
			children[name] = f.fs.fileOf(e)
		}
	}
	f.children = children
	return nil
}

// dirBytes returns the entries' bytes.
func (f *fatFile) dirBytes() ([]byte, error) {
	if f.isRoot && f.fs.g.bits != 32 {
		b := make([]byte, f.fs.g.rootLen)
		_, err := f.fs.r.ReadAt(b, f.fs.g.root)
		return b, cutShort(err)
	}
	if err := f.locate(maxFATDir); err != nil {
		return nil, err
	}
	n := int64(0)
	for _, r := range f.runs {
		n += r.n
	}
	b := make([]byte, n)
	return b, f.read(b, 0)
}

// fileOf makes a file of a directory's entry. Its times, in a zone that the
// volume does not tell, are taken as UTC.
func (f *fatFS) fileOf(e []byte) *fatFile {
	le := binary.LittleEndian
	c := &fatFile{fs: f, first: uint32(le.Uint16(e[26:]))}
	if f.g.bits == 32 {
		c.first |= uint32(le.Uint16(e[20:])) << 16
	}
	c.attr = Attr{
		ID: uint64(c.first), Links: 1, Mode: 0o755, Size: int64(le.Uint32(e[28:])),
		Modified: fatTime(le.Uint16(e[24:]), le.Uint16(e[22:])),
		Accessed: fatTime(le.Uint16(e[18:]), 0),
		Born:     fatTime(le.Uint16(e[16:]), le.Uint16(e[14:])),
	}
	if e[11]&fatReadOnly != 0 {
		c.attr.Mode = 0o555
	}
	if e[11]&fatSubdir != 0 {
		c.attr.Mode |= fs.ModeDir
		c.attr.Size = 0
	}
	return c
}

// fatTime returns the time of a date and a time of day; no date, no time.
func fatTime(date, day uint16) time.Time {
	if date == 0 {
		return time.Time{}
	}
	return time.Date(1980+int(date>>9), time.Month(date>>5&15), int(date&31),
		int(day>>11), int(day>>5&63), int(day&31)*2, 0, time.UTC)
}

// A longName gathers the entries that stand, last first, before the one they
// name.
type longName struct {
	units [20 * 13]uint16
	left  int // entries to come
	n     int // units in all
	sum   byte
}

// add takes an entry of a long name.
func (l *longName) add(e []byte) {
	order := int(e[0] & 0x3f)
	if e[0]&0x40 != 0 {
		*l = longName{left: order, n: order * 13, sum: e[13]}
	}
	if order == 0 || order > 20 || order != l.left || e[13] != l.sum {
		*l = longName{}
		return
	}
	l.left--
	at := l.units[(order-1)*13:]
	for i, off := range []int{1, 3, 5, 7, 9, 14, 16, 18, 20, 22, 24, 28, 30} {
		at[i] = binary.LittleEndian.Uint16(e[off:])
	}
}

// take returns the name of entry e: the long one when it belongs to e.
func (l *longName) take(e []byte) string {
	long := *l
	*l = longName{}
	if long.n == 0 || long.left != 0 || long.sum != shortSum(e[:fatNameLen]) {
		return shortName(e)
	}
	units := long.units[:long.n]
	if end := slices.Index(units, 0); end >= 0 {
		units = units[:end]
	}
	return string(utf16.Decode(units))
}

// shortSum is the checksum that ties a long name to its short one.
func shortSum(name []byte) byte {
	var sum byte
	for _, c := range name {
		sum = sum>>1 | sum<<7
		sum += c
	}
	return sum
}

// shortName returns the 8.3 name of an entry, in lower case where it says so.
func shortName(e []byte) string {
	raw := slices.Clone(e[:fatNameLen])
	if raw[0] == 0x05 {
		raw[0] = 0xe5
	}
	base, ext := oem(raw[:8]), oem(raw[8:])
	if e[12]&0x08 != 0 {
		base = strings.ToLower(base)
	}
	if e[12]&0x10 != 0 {
		ext = strings.ToLower(ext)
	}
	if ext == "" {
		return base
	}
	return base + "." + ext
}

// oem decodes bytes of a short name, in the code page that Linux assumes.
func oem(b []byte) string {
	s, _ := charmap.CodePage437.NewDecoder().Bytes(bytes.TrimRight(b, " "))
	return string(s)
}
