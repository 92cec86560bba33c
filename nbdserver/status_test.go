package nbdserver_test

import (
	"maps"
	"math"
	"slices"
	"testing"

	"github.com/cowdev/cowdev/block"
	"github.com/cowdev/cowdev/internal/nbd"
	"github.com/cowdev/cowdev/internal/nbdclient"
)

// mixedDevice has every kind of extent.
func mixedDevice() *memDevice {
	dev := newMemDevice(testSize)
	dev.state = []block.Extent{
		{Off: 0, N: 4096},
		{Off: 4096, N: 4096, Hole: true},
		{Off: 8192, N: 8192, State: block.Stored},
		{Off: 16384, N: 4096, State: block.Zero, Hole: true},
		{Off: 20480, N: 4096, State: block.Zero},
		{Off: 24576, N: 1024, State: 7 << 4}, // a deeper layer's, one day
		{Off: 25600, N: testSize - 25600},
	}
	return dev
}

type statuses = []nbdclient.Status

func expectStatus(t *testing.T, got, want map[string]statuses) {
	t.Helper()
	if !maps.EqualFunc(got, want, slices.Equal) {
		t.Errorf("status %v, expected %v", got, want)
	}
}

func TestBlockStatus(t *testing.T) {
	r := serveDevice(t, mixedDevice())
	for _, s := range []style{structured, extended} {
		c := r.dial(s, "base:allocation", "cowdev:source")
		got, err := c.BlockStatus(0, testSize, 0)
		check(t, err)
		expectStatus(t, got, map[string]statuses{
			"base:allocation": {{N: 4096}, {N: 4096, Flags: 3}, {N: 8192}, {N: 4096, Flags: 3}, {N: 4096, Flags: 2}, {N: testSize - 24576}},
			"cowdev:source":   {{N: 8192}, {N: 8192, Flags: 1}, {N: 8192, Flags: 2}, {N: 1024, Flags: 0x70}, {N: testSize - 25600}},
		})
		got, err = c.BlockStatus(5000, 10000, 0)
		check(t, err)
		expectStatus(t, got, map[string]statuses{
			"base:allocation": {{N: 3192, Flags: 3}, {N: 6808}},
			"cowdev:source":   {{N: 3192}, {N: 6808, Flags: 1}},
		})
		got, err = c.BlockStatus(1, testSize-1, nbd.CmdFlagReqOne)
		check(t, err)
		expectStatus(t, got, map[string]statuses{"base:allocation": {{N: 4095}}, "cowdev:source": {{N: 8191}}})
	}
}

func TestBlockStatusOneContext(t *testing.T) {
	c := serveDevice(t, mixedDevice()).dial(structured, "cowdev:source")
	got, err := c.BlockStatus(0, 8193, 0)
	check(t, err)
	expectStatus(t, got, map[string]statuses{"cowdev:source": {{N: 8192}, {N: 1, Flags: 1}}})
}

func TestBlockStatusWithoutContext(t *testing.T) {
	r := serveDevice(t, mixedDevice())
	for _, s := range styles {
		expectError(t, r.dial(s), nbd.EINVAL, req{Type: nbd.CmdBlockStatus, Length: 512})
	}
}

// A device of very many extents is told of piece by piece.
func TestBlockStatusLong(t *testing.T) {
	dev := newMemDevice(testSize)
	for off := int64(0); off < testSize; off += 64 {
		dev.state = append(dev.state, block.Extent{Off: off, N: 64, State: block.State(off / 64 % 2)})
	}
	r := serveDevice(t, dev)
	for _, s := range []style{structured, extended} {
		c := r.dial(s, "cowdev:source")
		off, calls := int64(0), 0
		for ; off < testSize; calls++ {
			got, err := c.BlockStatus(off, testSize-off, 0)
			check(t, err)
			for _, one := range got["cowdev:source"] {
				off += int64(one.N)
			}
		}
		if off != testSize || calls > 40 {
			t.Errorf("%v: %d bytes told of in %d replies", s, off, calls)
		}
	}
}

// The payload form of a block status chooses among the contexts.
func TestBlockStatusFilter(t *testing.T) {
	r := serveDevice(t, mixedDevice())
	c := r.dial(extended, "base:allocation", "cowdev:source")
	ask := func(c *nbdclient.Client, off, length uint64, ids ...uint32) req {
		p := nbdclient.Uint64(length)
		for _, id := range ids {
			p = append(p, nbdclient.Uint32(id)...)
		}
		return req{Type: nbd.CmdBlockStatus, Flags: nbd.CmdFlagPayloadLen, Offset: off, Payload: p}
	}
	var source uint32
	for id, name := range c.Contexts {
		if name == "cowdev:source" {
			source = id
		}
	}
	res := expectError(t, c, 0, ask(c, 4096, 8192, source))
	expectStatus(t, res.Status, map[string]statuses{"cowdev:source": {{N: 4096}, {N: 4096, Flags: 1}}})
	res = expectError(t, c, 0, ask(c, 0, 4096, 2, 1))
	if len(res.Status) != 2 {
		t.Errorf("both contexts asked for, %d answered", len(res.Status))
	}
	for _, bad := range []req{
		ask(c, 0, 4096),
		ask(c, 0, 4096, 1, 1),
		ask(c, 0, 4096, 0),
		ask(c, 0, 4096, 3),
		ask(c, 0, 4096, math.MaxUint32),
		ask(c, 0, 0, 1),
		ask(c, 0, testSize+1, 1),
		ask(c, testSize, 1, 1),
		ask(c, 0, math.MaxUint64, 1),
		{Type: nbd.CmdBlockStatus, Flags: nbd.CmdFlagPayloadLen, Payload: make([]byte, 13)},
		{Type: nbd.CmdBlockStatus, Flags: nbd.CmdFlagPayloadLen, Payload: make([]byte, 1)},
		{Type: nbd.CmdBlockStatus, Flags: nbd.CmdFlagPayloadLen, Payload: make([]byte, 1<<20)},
	} {
		expectError(t, c, nbd.EINVAL, bad)
	}
	one := r.dial(extended, "cowdev:source")
	expectError(t, one, nbd.EINVAL, ask(one, 0, 4096, 1)) // not selected
}

// hugeDevice is all zero and larger than 32 bits can tell.
type hugeDevice struct{ *memDevice }

const hugeSize = 1 << 43

func (hugeDevice) Size() int64 { return hugeSize }

func (hugeDevice) ReadAt(p []byte, off int64) (int, error) {
	clear(p)
	return len(p), nil
}

func (hugeDevice) Trim(off, n int64) error { return nil }

func (hugeDevice) WriteZeroes(off, n int64, flags block.ZeroFlags) error { return nil }

func (hugeDevice) Extents(off, n int64, limit int) ([]block.Extent, error) {
	return []block.Extent{{Off: off, N: n, Hole: true}}, nil
}

// Extended headers carry lengths of 64 bits.
func TestExtendedLengths(t *testing.T) {
	c := serveDevice(t, plainDevice{hugeDevice{newMemDevice(512)}}).dial(extended, "base:allocation")
	for _, kind := range []uint16{nbd.CmdTrim, nbd.CmdWriteZeroes, nbd.CmdCache} {
		expectError(t, c, 0, req{Type: kind, Length: hugeSize})
	}
	got, err := c.BlockStatus(0, hugeSize, 0)
	check(t, err)
	expectStatus(t, got, map[string]statuses{"base:allocation": {{N: hugeSize, Flags: 3}}})
	expectError(t, c, nbd.EOVERFLOW, req{Type: nbd.CmdRead, Length: 1 << 33})
	expectError(t, c, nbd.EINVAL, req{Type: nbd.CmdWrite, Length: 512})
	expectError(t, c, 0, req{Type: nbd.CmdRead, Offset: hugeSize - 512, Length: 512})
	check(t, c.Send(c.Encode(req{Type: nbd.CmdWrite, Flags: nbd.CmdFlagPayloadLen, Length: 1 << 33})))
	expectEnd(t, c)
}

// PAYLOAD_LEN without extended headers is an unknown flag, and the payload of
// a write comes all the same.
func TestPayloadFlagWithoutExtendedHeaders(t *testing.T) {
	for _, s := range []style{simple, structured} {
		c := serveDevice(t, newMemDevice(testSize)).dial(s)
		expectError(t, c, nbd.EINVAL, req{Type: nbd.CmdWrite, Flags: nbd.CmdFlagPayloadLen, Payload: make([]byte, 100_000)})
		expectError(t, c, nbd.EINVAL, req{Type: nbd.CmdRead, Flags: nbd.CmdFlagPayloadLen, Length: 512})
	}
}
