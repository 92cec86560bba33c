// Golden files hold the format: what was written once must decode for ever,
// and encode to the same bytes.
package exception

import (
	"bytes"
	"encoding/hex"
	"flag"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"testing"

	"github.com/cowdev/cowdev/block"
)

var update = flag.Bool("update", false, "write the golden files anew")

// golden compares p, without the zeros at its end, with testdata/format/name.
func golden(t *testing.T, name string, p []byte) {
	t.Helper()
	path := filepath.Join("..", "testdata", "format", name)
	got := hex.Dump(bytes.TrimRight(p, "\x00"))
	if *update {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s:\n%s\nexpected\n%s", name, got, want)
	}
}

func exampleHeader() *Header {
	return &Header{
		UUID: UUID{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}, Parent: UUID{16, 15, 14},
		Generation: 7, State: Merging, Clean: true, Created: 1234567890123456789,
		Base: []byte("identity"), BaseHint: "base.img",
		Geometry: block.Geometry{Size: 1<<30 + 100, ChunkSize: 64 << 10},
		logLen:   1 << 20, tail: 8192, tailSeq: 99, chain: 0xdeadbeef, epoch: 0x1122334455667788,
	}
}

func TestSuperblockFormat(t *testing.T) {
	h := exampleHeader()
	p := encodeSuper(h, superB)
	golden(t, "superblock.hex", p)
	got, err := decodeSuper(p, superB)
	if err != nil || !reflect.DeepEqual(got, h) {
		t.Errorf("decoded %+v, %v", got, err)
	}
	if _, err := decodeSuper(p, superA); err == nil {
		t.Error("the copy of one place passes at the other")
	}
}

func TestTableFormat(t *testing.T) {
	h := exampleHeader()
	p := make([]byte, sectorSize)
	want := map[int]uint64{
		0:  uint64(makeEntry(straight(1, 0), 0xffff, 0)),
		2:  uint64(makeEntry(straight(99, 15), 0x8000, 0x0001)),
		3:  uint64(makeEntry(homeRow|7, 0x0101, 0)),
		62: uint64(makeEntry(9, 0, 0xffff)),
	}
	encodeSector(p, h.UUID, 5, func(i int) uint64 { return want[i] })
	golden(t, "sector.hex", p)
	got := make(map[int]uint64)
	maps.Insert(got, wordsOf(p))
	if err := h.checkSector(p, 5); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("decoded %v, %v", got, err)
	}
	if err := h.checkSector(p, 6); err == nil {
		t.Error("the sector of one place passes at another")
	}
}

func TestRecordFormat(t *testing.T) {
	h := exampleHeader()
	r := &record{flags: flagBarrier, epoch: h.epoch, seq: 99, prev: h.chain, runs: []run{
		{chunk: 4, count: 1, entry: makeEntry(straight(2, 0), 0x0003, 0), here: 0x0002},
		{chunk: 5, count: 1, entry: makeEntry(homeRow|3, 0x8011, 0), named: 0x8001},
		{chunk: 8, count: 100, entry: makeEntry(0, 0, 0xffff)},
	}, slots: []uint32{40, 41}}
	r.data = bytes.Repeat([]byte("data"), 1024)
	log := make([]byte, h.logLen)
	p := log[8192:][:recordLen(len(r.runs), len(r.slots), len(r.data))]
	copy(p[dataAt(len(r.runs), len(r.slots)):], r.data)
	r.encode(p, h.UUID, 8192)
	golden(t, "record.hex", p)
	got, n, err := decodeRecord(log, h, 8192)
	if err != nil || n != int64(len(p)) || !reflect.DeepEqual(got, r) {
		t.Errorf("decoded %+v, %d, %v", got, n, err)
	}
}

// FuzzDecode decodes arbitrary bytes, as they are and with their checksums made
// right; nothing but an error may come of it.
func FuzzDecode(f *testing.F) {
	h := exampleHeader()
	f.Add(encodeSuper(h, superA))
	f.Fuzz(func(t *testing.T, p []byte) {
		page := make([]byte, 64<<10)
		copy(page, p)
		if g, err := decodeSuper(page[:pageSize], superA); err == nil {
			g.slotOff(1)
		}
		// With the checksum made right, the validation is all there is.
		var u UUID
		copy(u[:], page[40:])
		le.PutUint32(page[pageSize-4:], checksum(u, superA, page[:pageSize-4]))
		if g, err := decodeSuper(page[:pageSize], superA); err == nil {
			g.slotOff(1)
		}
		h.checkSector(page, 0)
		limits := h.limits()
		for _, w := range wordsOf(page) {
			limits.check(0, Entry(w))
		}
		n := int64(le.Uint32(page[24:]))
		if n >= pageSize && n <= int64(len(page)) {
			le.PutUint32(page[40:], 0)
			le.PutUint32(page[40:], checksum(h.UUID, 0, page[:n]))
		}
		decodeRecord(page, h, 0)
	})
}
