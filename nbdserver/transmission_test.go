package nbdserver_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/cowdev/cowdev/block"
	"github.com/cowdev/cowdev/internal/nbd"
	"github.com/cowdev/cowdev/internal/nbdclient"
)

type req = nbdclient.Request

// expectError does a request and fails unless its reply is the error want; the
// connection has to be good for another afterwards.
func expectError(t *testing.T, c *nbdclient.Client, want uint32, r req) *nbdclient.Result {
	t.Helper()
	res, err := c.Do(r)
	if err != nil {
		t.Fatalf("command %d, flags %#x, %d bytes at %d: %v", r.Type, r.Flags, r.Length, r.Offset, err)
	}
	if res.Error != want {
		t.Errorf("command %d, flags %#x, %d bytes at %d: error %d %q, expected %d", r.Type, r.Flags, r.Length, r.Offset, res.Error, res.Text, want)
	}
	if want != 0 && (c.Structured || c.Extended) && res.Text == "" {
		t.Errorf("command %d: error %d without a text", r.Type, res.Error)
	}
	return res
}

// inStyles runs a test in every style of reply over one server.
func inStyles(t *testing.T, dev block.Device, test func(t *testing.T, c *nbdclient.Client)) {
	r := serveDevice(t, dev)
	for _, s := range styles {
		t.Run(s.String(), func(t *testing.T) {
			rt := &rig{t: t, srv: r.srv, socket: r.socket}
			test(t, rt.dial(s, contextsIn(s)...))
		})
	}
}

func contextsIn(s style) []string {
	if s == simple {
		return nil
	}
	return []string{"base:allocation", "cowdev:source"}
}

// payloadFlag is what a WRITE needs in c's style.
func payloadFlag(c *nbdclient.Client) uint16 {
	if c.Extended {
		return nbd.CmdFlagPayloadLen
	}
	return 0
}

func TestTransmissionFlags(t *testing.T) {
	dev := newMemDevice(4096)
	r := serveDevice(t, dev)
	readOnly := newMemDevice(4096)
	readOnly.readOnly = true
	rr := serveDevice(t, readOnly)
	for s, want := range map[style]uint16{simple: 0xd6d, structured: 0xded, extended: 0x1ded} {
		if got := r.dial(s, contextsIn(s)...).Flags; got != want {
			t.Errorf("%v: flags %#x, expected %#x", s, got, want)
		}
		want = want&^(nbd.FlagSendTrim|nbd.FlagSendWriteZeroes|nbd.FlagSendFastZero) | nbd.FlagReadOnly
		if got := rr.dial(s, contextsIn(s)...).Flags; got != want {
			t.Errorf("%v, read-only: flags %#x, expected %#x", s, got, want)
		}
	}
}

func TestPastTheEnd(t *testing.T) {
	inStyles(t, newMemDevice(testSize), func(t *testing.T, c *nbdclient.Client) {
		for _, at := range []uint64{testSize - 511, testSize, testSize + 1, 1 << 63, math.MaxUint64, math.MaxUint64 - 511} {
			for kind, want := range map[uint16]uint32{
				nbd.CmdRead: nbd.EINVAL, nbd.CmdTrim: nbd.EINVAL, nbd.CmdCache: nbd.EINVAL,
				nbd.CmdWriteZeroes: nbd.ENOSPC, nbd.CmdBlockStatus: nbd.EINVAL,
			} {
				expectError(t, c, want, req{Type: kind, Offset: at, Length: 512})
			}
			expectError(t, c, nbd.ENOSPC, req{Type: nbd.CmdWrite, Flags: payloadFlag(c), Offset: at, Payload: make([]byte, 512)})
		}
		expectError(t, c, nbd.EINVAL, req{Type: nbd.CmdTrim, Length: testSize + 1})
		expectError(t, c, nbd.ENOSPC, req{Type: nbd.CmdWriteZeroes, Length: math.MaxUint32})
		expectError(t, c, 0, req{Type: nbd.CmdRead, Offset: testSize - 1, Length: 1})
	})
}

func TestZeroLengths(t *testing.T) {
	inStyles(t, newMemDevice(testSize), func(t *testing.T, c *nbdclient.Client) {
		for _, at := range []uint64{0, 7, testSize} {
			for _, kind := range []uint16{nbd.CmdRead, nbd.CmdTrim, nbd.CmdCache, nbd.CmdWriteZeroes} {
				expectError(t, c, 0, req{Type: kind, Offset: at})
			}
			expectError(t, c, 0, req{Type: nbd.CmdWrite, Flags: payloadFlag(c), Offset: at})
			expectError(t, c, nbd.EINVAL, req{Type: nbd.CmdBlockStatus, Offset: at})
		}
	})
}

func TestReadOnly(t *testing.T) {
	dev := newMemDevice(testSize)
	dev.readOnly = true
	before := bytes.Clone(dev.data)
	inStyles(t, dev, func(t *testing.T, c *nbdclient.Client) {
		expectError(t, c, nbd.EPERM, req{Type: nbd.CmdWrite, Flags: payloadFlag(c), Payload: make([]byte, 300_000)})
		expectError(t, c, nbd.EPERM, req{Type: nbd.CmdTrim, Length: 512})
		expectError(t, c, nbd.EPERM, req{Type: nbd.CmdWriteZeroes, Length: 512})
		expectError(t, c, 0, req{Type: nbd.CmdFlush})
		expectError(t, c, 0, req{Type: nbd.CmdRead, Length: 512})
	})
	if !bytes.Equal(before, dev.data) {
		t.Error("a read-only device was changed")
	}
}

func TestUnknownCommand(t *testing.T) {
	inStyles(t, newMemDevice(testSize), func(t *testing.T, c *nbdclient.Client) {
		for _, kind := range []uint16{8, 9, 255, 1 << 15, math.MaxUint16} {
			expectError(t, c, nbd.EINVAL, req{Type: kind, Length: 512})
		}
	})
}

func TestCommandFlags(t *testing.T) {
	inStyles(t, newMemDevice(testSize), func(t *testing.T, c *nbdclient.Client) {
		chunked := c.Structured || c.Extended
		for kind := uint16(nbd.CmdRead); kind <= nbd.CmdBlockStatus; kind++ {
			if kind == nbd.CmdDisc {
				continue
			}
			for bit := range 16 {
				flag := uint16(1) << bit
				r := req{Type: kind, Flags: flag, Length: 512}
				valid := flag == nbd.CmdFlagFUA
				switch kind {
				case nbd.CmdRead:
					valid = valid || flag == nbd.CmdFlagDF && chunked
				case nbd.CmdWrite:
					r.Payload, r.Flags = make([]byte, 512), flag|payloadFlag(c)
					valid = valid || flag == payloadFlag(c)
				case nbd.CmdFlush:
					r.Length = 0
				case nbd.CmdWriteZeroes:
					valid = valid || flag == nbd.CmdFlagNoHole || flag == nbd.CmdFlagFastZero
				case nbd.CmdBlockStatus:
					valid = (valid || flag == nbd.CmdFlagReqOne) && chunked
				}
				if c.Extended && flag == nbd.CmdFlagPayloadLen && kind != nbd.CmdWrite {
					r.Payload = make([]byte, 512) // is thrown away
					r.Length = 512
				}
				want := uint32(nbd.EINVAL)
				if valid {
					want = 0
				}
				expectError(t, c, want, r)
			}
		}
	})
}

func TestTooLong(t *testing.T) {
	inStyles(t, newMemDevice(40<<20), func(t *testing.T, c *nbdclient.Client) {
		expectError(t, c, nbd.EOVERFLOW, req{Type: nbd.CmdRead, Length: 32<<20 + 1})
		expectError(t, c, 0, req{Type: nbd.CmdRead, Length: 32 << 20})
		expectError(t, c, nbd.EINVAL, req{Type: nbd.CmdWrite, Flags: payloadFlag(c), Payload: make([]byte, 32<<20+1)})
		expectError(t, c, 0, req{Type: nbd.CmdWrite, Flags: payloadFlag(c), Payload: make([]byte, 32<<20)})
		for _, kind := range []uint16{nbd.CmdTrim, nbd.CmdWriteZeroes, nbd.CmdCache} {
			expectError(t, c, 0, req{Type: kind, Length: 40 << 20})
		}
		check(t, c.Send(c.Encode(req{Type: nbd.CmdWrite, Flags: payloadFlag(c), Length: 64<<20 + 1})))
		expectEnd(t, c)
	})
}

func TestFlushRange(t *testing.T) {
	inStyles(t, newMemDevice(testSize), func(t *testing.T, c *nbdclient.Client) {
		expectError(t, c, nbd.EINVAL, req{Type: nbd.CmdFlush, Length: 1})
		expectError(t, c, nbd.EINVAL, req{Type: nbd.CmdFlush, Offset: 1})
		expectError(t, c, 0, req{Type: nbd.CmdFlush})
	})
}

func TestRequestMagic(t *testing.T) {
	inStyles(t, newMemDevice(testSize), func(t *testing.T, c *nbdclient.Client) {
		good := req{Type: nbd.CmdFlush, Cookie: 5}
		bad := c.Encode(good)
		bad[0]++
		check(t, c.Send(c.Encode(good), bad, c.Encode(good)))
		if m, err := c.Receive(); err != nil || m.Cookie != 5 {
			t.Errorf("the reply to the good request: %+v, %v", m, err)
		}
		expectEnd(t, c)
	})
}

// The wrong request header for what was agreed on ends the connection.
func TestRequestStyle(t *testing.T) {
	r := serveDevice(t, newMemDevice(testSize))
	for _, s := range styles {
		c := r.dial(s)
		c.Extended = !c.Extended
		check(t, c.Send(c.Encode(req{Type: nbd.CmdRead, Length: 512})))
		expectEnd(t, c)
	}
}

func TestCookies(t *testing.T) {
	inStyles(t, newMemDevice(testSize), func(t *testing.T, c *nbdclient.Client) {
		var batch []byte
		cookies := []uint64{1, math.MaxUint64, 0x8000000000000000, 7, 7, 7}
		for _, cookie := range cookies {
			batch = append(batch, c.Encode(req{Type: nbd.CmdFlush, Cookie: cookie})...)
		}
		check(t, c.Send(batch))
		var got []uint64
		for range cookies {
			m, err := c.Receive()
			check(t, err)
			got = append(got, m.Cookie)
		}
		slices.Sort(got)
		slices.Sort(cookies)
		if !slices.Equal(got, cookies) {
			t.Errorf("cookies %x, expected %x", got, cookies)
		}
	})
}

// FUA and FLUSH are answered after the device's Flush, whether alone, in a
// batch, or behind a slow one.
func TestDurability(t *testing.T) {
	dev := newMemDevice(testSize)
	var mu sync.Mutex
	var done []string
	dev.before = func(op string, off, n int64) error {
		mu.Lock()
		defer mu.Unlock()
		done = append(done, op)
		return nil
	}
	inStyles(t, dev, func(t *testing.T, c *nbdclient.Client) {
		for _, r := range []req{
			{Type: nbd.CmdFlush},
			{Type: nbd.CmdWrite, Flags: nbd.CmdFlagFUA | payloadFlag(c), Payload: make([]byte, 512)},
			{Type: nbd.CmdWrite, Flags: nbd.CmdFlagFUA | payloadFlag(c), Payload: make([]byte, 200_000)},
			{Type: nbd.CmdTrim, Flags: nbd.CmdFlagFUA, Length: 512},
			{Type: nbd.CmdTrim, Flags: nbd.CmdFlagFUA, Length: testSize},
			{Type: nbd.CmdWriteZeroes, Flags: nbd.CmdFlagFUA, Length: 512},
			{Type: nbd.CmdWriteZeroes, Flags: nbd.CmdFlagFUA | nbd.CmdFlagNoHole, Length: 512},
		} {
			mu.Lock()
			done = nil
			mu.Unlock()
			expectError(t, c, 0, r)
			mu.Lock()
			if len(done) == 0 || done[len(done)-1] != "flush" || r.Type != nbd.CmdFlush && len(done) < 2 {
				t.Errorf("command %d: the device did %q before the reply, expected a flush last", r.Type, done)
			}
			mu.Unlock()
		}
	})
	flushes := dev.flushes.Load()
	check(t, serveDevice(t, dev).dial(simple).WriteZeroes(0, 512, 0))
	if dev.flushes.Load() != flushes {
		t.Error("a change without FUA flushed the device")
	}
}

// The errors of a device become those of the specification.
func TestDeviceErrors(t *testing.T) {
	type fault struct {
		on  string
		err error
	}
	var now atomic.Pointer[fault]
	dev := newMemDevice(testSize)
	dev.cold = func(int64, int64) bool { return true }
	dev.before = func(op string, _, _ int64) error {
		if f := now.Load(); f != nil && op == f.on {
			return f.err
		}
		return nil
	}
	wrapped := func(e error) error { return fmt.Errorf("write chunk 7: %w", e) }
	inStyles(t, dev, func(t *testing.T, c *nbdclient.Client) {
		chunked := c.Structured || c.Extended
		for _, e := range []struct {
			err  error
			want uint32
		}{
			{wrapped(syscall.ENOSPC), nbd.ENOSPC},
			{wrapped(syscall.EDQUOT), nbd.ENOSPC},
			{wrapped(syscall.EFBIG), nbd.ENOSPC},
			{wrapped(syscall.EPERM), nbd.EPERM},
			{wrapped(syscall.EROFS), nbd.EPERM},
			{wrapped(syscall.EIO), nbd.EIO},
			{wrapped(syscall.ENOTSUP), nbd.EIO}, // but for fast zeroing, below
			{errors.New("anything"), nbd.EIO},
			{io.EOF, nbd.EIO},
		} {
			failOn := func(op string) { now.Store(&fault{op, e.err}) }
			for op, r := range map[string]req{
				"read":  {Type: nbd.CmdRead, Length: 512},
				"write": {Type: nbd.CmdWrite, Flags: payloadFlag(c), Payload: make([]byte, 512)},
				"flush": {Type: nbd.CmdFlush},
				"trim":  {Type: nbd.CmdTrim, Length: 512},
				"zero":  {Type: nbd.CmdWriteZeroes, Length: 512},
				"cache": {Type: nbd.CmdCache, Length: 512},
			} {
				failOn(op)
				expectError(t, c, e.want, r)
			}
			failOn("write")
			expectError(t, c, e.want, req{Type: nbd.CmdWrite, Flags: payloadFlag(c), Payload: make([]byte, 300_000)})
			failOn("flush")
			expectError(t, c, e.want, req{Type: nbd.CmdWrite, Flags: nbd.CmdFlagFUA | payloadFlag(c), Payload: make([]byte, 512)})
			failOn("extents")
			if chunked {
				expectError(t, c, e.want, req{Type: nbd.CmdBlockStatus, Length: 512})
			}
		}
		now.Store(&fault{"zero", wrapped(syscall.ENOTSUP)})
		expectError(t, c, nbd.ENOTSUP, req{Type: nbd.CmdWriteZeroes, Flags: nbd.CmdFlagFastZero, Length: 512})
		now.Store(nil)
		expectError(t, c, 0, req{Type: nbd.CmdRead, Length: 512})
	})
}

func TestZeroFlags(t *testing.T) {
	dev := newMemDevice(testSize)
	inStyles(t, dev, func(t *testing.T, c *nbdclient.Client) {
		dev.mu.Lock()
		dev.zeroed, dev.trims = nil, 0
		dev.mu.Unlock()
		for _, flags := range []uint16{0, nbd.CmdFlagFUA, nbd.CmdFlagNoHole, nbd.CmdFlagFastZero, nbd.CmdFlagNoHole | nbd.CmdFlagFastZero} {
			expectError(t, c, 0, req{Type: nbd.CmdWriteZeroes, Flags: flags, Length: 512})
		}
		expectError(t, c, 0, req{Type: nbd.CmdTrim, Length: 512})
		dev.mu.Lock()
		defer dev.mu.Unlock()
		want := []block.ZeroFlags{0, 0, block.NoHole, block.FastZero, block.NoHole | block.FastZero}
		if !slices.Equal(dev.zeroed, want) || dev.trims != 1 {
			t.Errorf("the device was told %v and %d trims, expected %v and 1", dev.zeroed, dev.trims, want)
		}
	})
}

// A read that cannot be finished is an error that says where, and a large
// simple one sends no header before it is known to be good.
func TestReadErrors(t *testing.T) {
	const bad = 2<<20 + 4096
	dev := newMemDevice(testSize)
	dev.cold = func(int64, int64) bool { return true }
	dev.before = func(op string, off, n int64) error {
		if op == "read" && off <= bad && bad < off+n {
			return syscall.EIO
		}
		return nil
	}
	inStyles(t, dev, func(t *testing.T, c *nbdclient.Client) {
		for _, r := range []req{
			{Type: nbd.CmdRead, Offset: bad, Length: 1},
			{Type: nbd.CmdRead, Offset: bad - 4096, Length: 8192},
			{Type: nbd.CmdRead, Length: testSize},
		} {
			res := expectError(t, c, nbd.EIO, r)
			if c.Structured || c.Extended {
				if res.ErrorAt < r.Offset || res.ErrorAt > bad || res.Covered != int(res.ErrorAt-r.Offset) {
					t.Errorf("read of %d at %d: %d bytes good, error at %d; the bad byte is %d", r.Length, r.Offset, res.Covered, res.ErrorAt, bad)
				}
				r.Flags = nbd.CmdFlagDF
				if res := expectError(t, c, nbd.EIO, r); res.Covered != 0 {
					t.Errorf("unfragmented read of %d: %d bytes and then an error", r.Length, res.Covered)
				}
			}
		}
		expectError(t, c, 0, req{Type: nbd.CmdRead, Length: bad})
	})
}

func TestDontFragment(t *testing.T) {
	dev := newMemDevice(testSize)
	dev.state = []block.Extent{{N: 1 << 20}, {Off: 1 << 20, N: testSize - 1<<20, State: block.Zero, Hole: true}}
	clear(dev.data[1<<20:])
	inStyles(t, dev, func(t *testing.T, c *nbdclient.Client) {
		if !c.Structured && !c.Extended {
			t.Skip("simple replies have no fragments")
		}
		for _, n := range []uint64{1, 65536, 1 << 20, testSize} {
			res := expectError(t, c, 0, req{Type: nbd.CmdRead, Flags: nbd.CmdFlagDF, Length: n})
			if res.Chunks[0].Type != nbd.ReplyOffsetData || len(res.Chunks) != 1 || !bytes.Equal(res.Data, dev.data[:n]) {
				t.Errorf("read of %d with DF: %d chunks, or not the bytes", n, len(res.Chunks))
			}
		}
	})
}

// Large reads answer holes as holes.
func TestSparseRead(t *testing.T) {
	dev := newMemDevice(testSize)
	dev.state = []block.Extent{
		{N: 100_000},
		{Off: 100_000, N: 3_000_000, Hole: true},
		{Off: 3_100_000, N: testSize - 3_100_000, State: block.Stored},
	}
	clear(dev.data[100_000:3_100_000])
	inStyles(t, dev, func(t *testing.T, c *nbdclient.Client) {
		res := expectError(t, c, 0, req{Type: nbd.CmdRead, Length: testSize})
		if !bytes.Equal(res.Data, dev.data) || res.Covered != testSize {
			t.Errorf("%d bytes came, or not the right ones", res.Covered)
		}
		holes := 0
		for _, m := range res.Chunks {
			if m.Type == nbd.ReplyOffsetHole {
				holes++
			}
		}
		if chunked := c.Structured || c.Extended; chunked != (holes > 0) {
			t.Errorf("%d hole chunks", holes)
		}
	})
}

// The chunks of a large read begin and end at multiples of 512 bytes, but for
// its own ends.
func TestUnalignedRead(t *testing.T) {
	dev := newMemDevice(testSize)
	inStyles(t, dev, func(t *testing.T, c *nbdclient.Client) {
		const off, n = 7, 3 << 20
		res := expectError(t, c, 0, req{Type: nbd.CmdRead, Offset: off, Length: n})
		if !bytes.Equal(res.Data, dev.data[off:off+n]) || res.Covered != n {
			t.Errorf("%d bytes came, or not the right ones", res.Covered)
		}
		for _, m := range res.Chunks {
			if m.Simple {
				continue
			}
			at := binary.BigEndian.Uint64(m.Payload)
			if end := at + uint64(len(m.Payload)-8); at != off && at%512 != 0 || end != off+n && end%512 != 0 {
				t.Errorf("chunk from %d to %d", at, end)
			}
		}
	})
}

func TestCache(t *testing.T) {
	dev := newMemDevice(testSize)
	c := serveDevice(t, dev).dial(simple)
	check(t, c.Cache(4096, 8192))
	dev.mu.Lock()
	defer dev.mu.Unlock()
	if want := []block.Extent{{Off: 4096, N: 8192}}; !slices.Equal(dev.cached, want) {
		t.Errorf("the device was told %v, expected %v", dev.cached, want)
	}
}

// DISC is obeyed after everything before it has been answered.
func TestDisconnect(t *testing.T) {
	release := make(chan struct{})
	dev := newMemDevice(testSize)
	dev.cold = func(off, _ int64) bool { return off == 0 }
	dev.before = func(op string, off, _ int64) error {
		if op == "read" {
			<-release
		}
		return nil
	}
	inStyles(t, dev, func(t *testing.T, c *nbdclient.Client) {
		slow := req{Type: nbd.CmdRead, Cookie: 1, Length: 512}
		warm := req{Type: nbd.CmdRead, Cookie: 2, Offset: 512, Length: 512}
		c.Expect(slow)
		c.Expect(warm)
		check(t, c.Send(c.Encode(slow), c.Encode(warm), c.Encode(req{Type: nbd.CmdDisc})))
		if m, err := c.Receive(); err != nil || m.Cookie != 2 {
			t.Errorf("first reply %+v, %v; expected that of the quick read", m, err)
		}
		release <- struct{}{}
		if m, err := c.Receive(); err != nil || m.Cookie != 1 {
			t.Errorf("second reply %+v, %v", m, err)
		}
		expectEnd(t, c)
	})
}

// A client that closes its sending half still gets its replies.
func TestHalfClosed(t *testing.T) {
	c := serveDevice(t, newMemDevice(testSize)).dial(simple)
	_, err := c.Request(req{Type: nbd.CmdRead, Length: 512})
	check(t, err)
	check(t, c.Conn.(interface{ CloseWrite() error }).CloseWrite())
	if m, err := c.Receive(); err != nil || len(m.Payload) != 512 {
		t.Errorf("reply %+v, %v", m, err)
	}
	expectEnd(t, c)
}
