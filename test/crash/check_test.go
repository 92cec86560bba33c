package crash

// `cowdev check` of the real program over stores that were damaged on purpose,
// byte by byte as docs/format.md has it: each kind is named with its place, and
// none but what is safe to mend is mended, with what was there kept.

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cowdev/cowdev/block"
	"github.com/cowdev/cowdev/cow"
	"github.com/cowdev/cowdev/exception"
	"github.com/cowdev/cowdev/internal/disk"
)

// Where things are in the store under damage, and the statuses of check.
const (
	checkChunk = 64 << 10
	checkLog   = 1 << 20
	tableAt    = 128 << 10

	statusClean, statusProblem, statusDamage, statusRepaired = 0, 1, 8, 10
)

// A damaged is a store of four chunks: 0 whole, 1 in part, 2 zeros, 3 the base's.
type damaged struct {
	t    *testing.T
	path string
	uuid exception.UUID
	log  int64 // offset of the log
	slot int64 // offset of slot 1
}

// newDamaged makes the store as it is closed in order, or as its server's
// death leaves it.
func newDamaged(t *testing.T, dir string, closed bool) *damaged {
	t.Helper()
	d := &damaged{t: t, path: filepath.Join(dir, "cow")}
	f, err := disk.OpenOS(d.path, os.O_RDWR|os.O_CREATE)
	if err != nil {
		t.Fatal(err)
	}
	geo := block.Geometry{Size: 4 * checkChunk, ChunkSize: checkChunk}
	if err := exception.Create(f, exception.Params{Geometry: geo, LogSize: checkLog}); err != nil {
		t.Fatal(err)
	}
	s, err := exception.Open(f, exception.Options{})
	if err != nil {
		t.Fatal(err)
	}
	dev := cow.New(zeros(geo.Size), s, cow.Options{})
	for i, c := range []struct{ off, n int64 }{{0, checkChunk}, {checkChunk, 8192}, {checkChunk + 32768, 4096}} {
		if _, err := dev.WriteAt(bytes.Repeat([]byte{byte(i + 1)}, int(c.n)), c.off); err != nil {
			t.Fatal(err)
		}
		if err := dev.Flush(); err != nil {
			t.Fatal(err)
		}
	}
	if err := dev.Trim(2*checkChunk, checkChunk); err != nil {
		t.Fatal(err)
	}
	d.uuid = s.Header().UUID
	d.slot, _ = s.Locate(s.Entry(0), 0)
	d.log = d.slot - checkLog
	end := s.Close
	if !closed {
		end = s.Abandon
	}
	if err := end(); err != nil {
		t.Fatal(err)
	}
	return d
}

// zeros is a base of zeros.
type zeros int64

func (z zeros) Size() int64 { return int64(z) }

func (z zeros) ReadAt(p []byte, off int64) (int, error) {
	n := int(max(0, min(int64(len(p)), int64(z)-off)))
	clear(p[:n])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (d *damaged) read(n int, off int64) []byte {
	d.t.Helper()
	f, err := os.Open(d.path)
	if err != nil {
		d.t.Fatal(err)
	}
	defer f.Close()
	p := make([]byte, n)
	if _, err := f.ReadAt(p, off); err != nil {
		d.t.Fatal(err)
	}
	return p
}

func (d *damaged) write(p []byte, off int64) {
	d.t.Helper()
	f, err := os.OpenFile(d.path, os.O_RDWR, 0)
	if err != nil {
		d.t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(p, off); err != nil {
		d.t.Fatal(err)
	}
}

// flip changes one bit.
func (d *damaged) flip(off int64) {
	d.t.Helper()
	p := d.read(1, off)
	p[0] ^= 1
	d.write(p, off)
}

// entry changes the entry of a chunk, with the right checksum.
func (d *damaged) entry(chunk int, change func(e uint64) uint64) {
	d.t.Helper()
	le := binary.LittleEndian
	p := d.read(512, tableAt)
	le.PutUint64(p[chunk*8:], change(le.Uint64(p[chunk*8:])))
	seed := le.AppendUint64(bytes.Clone(d.uuid[:]), 0)
	castagnoli := crc32.MakeTable(crc32.Castagnoli)
	le.PutUint64(seed[16:], tableAt) // sector 0
	sum := crc32.Update(0, castagnoli, seed)
	sum = crc32.Update(sum, castagnoli, p[:504])
	le.PutUint32(p[504:], crc32.Update(sum, castagnoli, p[508:]))
	d.write(p, tableAt)
}

// check runs `cowdev check` and returns its status and what it prints.
func (d *damaged) check(args ...string) (int, string) {
	d.t.Helper()
	cmd := exec.Command(program, append([]string{"check", d.path}, args...)...)
	out, _ := cmd.CombinedOutput()
	return cmd.ProcessState.ExitCode(), string(out)
}

func TestCheckNamesDamage(t *testing.T) {
	// Chunk 0 has the slots 1 to 16, chunk 1 has 17, 18 and 19, by row 0.
	stored := func(b int) uint64 { return 1 << (32 + b) }
	const row = 1 << 31
	straight := func(slot uint64) func(e uint64) uint64 { // block 0 has it, and so on
		return func(e uint64) uint64 { return e&^0xffffffff | (slot + 15) }
	}
	for _, test := range []struct {
		name    string
		crashed bool // not closed in order
		damage  func(*damaged)
		status  int
		says    string
		repair  string // what --repair says; "" where it mends nothing
	}{
		{name: "nothing", damage: func(*damaged) {}, status: statusClean},
		{name: "nothing, after a crash", crashed: true, damage: func(*damaged) {}, status: statusClean},
		{name: "superblock A", damage: func(d *damaged) { d.flip(80) },
			status: statusProblem, says: "superblock at 0", repair: "copy the other superblock over it"},
		{name: "superblock B", damage: func(d *damaged) { d.flip(64<<10 + 80) },
			status: statusProblem, says: "superblock at 65536", repair: "copy the other superblock over it"},
		{name: "table sector", damage: func(d *damaged) { d.flip(tableAt + 9) },
			status: statusDamage, says: "table sector 0: checksum (chunks 0 to 62)"},
		{name: "table sector of rows", damage: func(d *damaged) { d.flip(tableAt + 4096 + 9) },
			status: statusDamage, says: "table sector 8: checksum (rows 0 to 7)"},
		{name: "two chunks with one slot", damage: func(d *damaged) { d.entry(1, straight(2)) },
			status: statusDamage, says: "block 1 of chunk 0 and block 0 of chunk 1 both have slot 2"},
		{name: "two chunks with one row", damage: func(d *damaged) {
			d.entry(2, func(uint64) uint64 { return stored(3) | row })
		}, status: statusDamage, says: "chunks 1 and 2 both have row 0"},
		{name: "row past the end", damage: func(d *damaged) {
			d.entry(1, func(e uint64) uint64 { return e | 4000 })
		}, status: statusDamage, says: "chunk 1: row 4000"},
		{name: "slot past the end", damage: func(d *damaged) { d.entry(1, straight(1000)) },
			status: statusDamage, says: "in slot 1000 lies behind the file's end"},
		{name: "stored in a hole", damage: func(d *damaged) { d.entry(1, straight(30)) },
			status: statusProblem, says: "12288 bytes (12 KiB) of what is stored: zeros, as a sparse copy leaves them"},
		{name: "stored without a slot", damage: func(d *damaged) {
			d.entry(1, func(e uint64) uint64 { return e | stored(6) })
		}, status: statusDamage, says: "chunk 1: slot 0"},
		{name: "stored and zero", damage: func(d *damaged) {
			d.entry(1, func(e uint64) uint64 { return e | 1<<48 })
		}, status: statusDamage, says: "table sector 0"},
		{name: "slot without blocks", damage: func(d *damaged) {
			d.entry(3, func(uint64) uint64 { return 3 })
		}, status: statusDamage, says: "table sector 0"},
		{name: "chunk behind the device", damage: func(d *damaged) {
			d.entry(4, func(uint64) uint64 { return 1 << 48 })
		}, status: statusDamage, says: "table sector 0"},
		{name: "leaked slot", damage: func(d *damaged) { d.write(bytes.Repeat([]byte{9}, 8192), d.slot+4*checkChunk) },
			status: statusProblem, says: "8192 bytes of slots that no chunk has", repair: "give them back"},
		{name: "log record", crashed: true, damage: func(d *damaged) { d.flip(d.log + 30) },
			status: statusDamage, says: "log record 1 at 0, but a later one"},
	} {
		t.Run(test.name, func(t *testing.T) {
			d := newDamaged(t, t.TempDir(), !test.crashed)
			test.damage(d)
			before := d.all()
			status, out := d.check()
			if status != test.status || !strings.Contains(out, test.says) {
				t.Fatalf("status %d, expected %d with %q:\n%s", status, test.status, test.says, out)
			}
			if !bytes.Equal(d.all(), before) {
				t.Error("check changed the store")
			}
			d.repair(test.status, test.repair, before)
		})
	}
}

func (d *damaged) all() []byte {
	d.t.Helper()
	p, err := os.ReadFile(d.path)
	if err != nil {
		d.t.Fatal(err)
	}
	return p
}

// repair runs `check --repair` on a store that check left with a status. If it
// says what it mended, the store must be clean then and the bytes as they were
// before kept beside it; if not, nothing may be changed.
func (d *damaged) repair(status int, says string, before []byte) {
	d.t.Helper()
	kept := func() []string {
		names, err := filepath.Glob(d.path + ".repair-*")
		if err != nil {
			d.t.Fatal(err)
		}
		return names
	}
	got, out := d.check("--repair")
	if says == "" {
		if got != status || !bytes.Equal(d.all(), before) || len(kept()) > 0 {
			d.t.Fatalf("--repair ended with status %d, expected %d and nothing changed; kept %v:\n%s", got, status, kept(), out)
		}
		return
	}
	if got != statusRepaired || !strings.Contains(out, "repaired: "+says) {
		d.t.Fatalf("--repair ended with status %d, expected %d with %q:\n%s", got, statusRepaired, says, out)
	}
	names := kept()
	if len(names) != 1 {
		d.t.Fatalf("--repair kept %v, expected one file", names)
	}
	// Its words and bytes make the store what it was.
	p, err := os.ReadFile(names[0])
	if err != nil {
		d.t.Fatal(err)
	}
	for len(p) > 0 {
		line, rest, _ := bytes.Cut(p, []byte("\n"))
		var n, off int64
		if _, err := fmt.Sscanf(string(line), "%d bytes at %d:", &n, &off); err != nil {
			d.t.Fatalf("%s: line %q: %v", names[0], line, err)
		}
		if !bytes.Equal(rest[:n], before[off:off+n]) {
			d.t.Errorf("%s: %d bytes at %d are not those that were there", names[0], n, off)
		}
		p = rest[n+1:]
	}
	if got, out := d.check(); got != statusClean {
		d.t.Errorf("after the repair: status %d:\n%s", got, out)
	}
}
