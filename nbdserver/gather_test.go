package nbdserver_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"slices"
	"syscall"
	"testing"

	"github.com/cowdev/cowdev/block"
	"github.com/cowdev/cowdev/internal/nbd"
)

// batchDevice is a memDevice that notes how many writes it is handed together.
type batchDevice struct {
	*memDevice
	batches []int
}

func (d *batchDevice) WriteBatch(w []block.Write) {
	d.mu.Lock()
	d.batches = append(d.batches, len(w))
	d.mu.Unlock()
	for i := range w {
		_, w[i].Err = d.WriteAt(w[i].Data, w[i].Off)
	}
}

// Short writes that arrive together are handed to the device together, before
// anything that came after them is done, and each has its own answer.
func TestGather(t *testing.T) {
	for _, s := range styles {
		t.Run(s.String(), func(t *testing.T) {
			dev := &batchDevice{memDevice: newMemDevice(testSize)}
			bad := errors.Join(syscall.ENOSPC)
			dev.before = func(op string, off, _ int64) error {
				if op == "write" && off == 3*4096 {
					return bad
				}
				return nil
			}
			c := serveDevice(t, dev).dial(s)
			var batch []byte
			asked := make(map[uint64]req)
			ask := func(r req) {
				r.Cookie = uint64(len(asked) + 1)
				if r.Type == nbd.CmdWrite {
					r.Flags |= payloadFlag(c)
				}
				asked[r.Cookie] = r
				c.Expect(r)
				batch = append(batch, c.Encode(r)...)
			}
			fill := func(v byte, n int) []byte { return bytes.Repeat([]byte{v}, n) }
			for i, block := range []uint64{0, 1, 2, 3, 12} {
				ask(req{Type: nbd.CmdWrite, Offset: block * 4096, Payload: fill(byte(i), 4096)})
			}
			ask(req{Type: nbd.CmdRead, Offset: 12 * 4096, Length: 4096})
			ask(req{Type: nbd.CmdWrite, Offset: 4096, Payload: fill(9, 4096)})
			ask(req{Type: nbd.CmdWrite, Offset: 0, Payload: fill(9, 4096), Flags: nbd.CmdFlagFUA})
			ask(req{Type: nbd.CmdWrite, Offset: 0, Payload: fill(9, 32<<10)})
			for i := range uint64(3) {
				ask(req{Type: nbd.CmdWrite, Offset: i * 4096, Payload: fill(8, 4096)})
			}
			ask(req{Type: 77})
			check(t, c.Send(batch))
			for range asked {
				m, err := c.Receive()
				check(t, err)
				r, data, code := asked[m.Cookie], m.Payload, m.Error
				if !m.Simple && m.Type == nbd.ReplyOffsetData {
					data = data[8:]
				}
				if !m.Simple && m.Type == nbd.ReplyError {
					code = binary.BigEndian.Uint32(m.Payload)
				}
				want := uint32(0)
				switch {
				case r.Type == 77:
					want = nbd.EINVAL
				case r.Type == nbd.CmdWrite && r.Offset == 3*4096:
					want = nbd.ENOSPC
				case r.Type == nbd.CmdRead && !bytes.Equal(data, fill(4, 4096)):
					t.Errorf("a read after five writes returned %x…", data[:1])
				}
				if code != want {
					t.Errorf("command %d at %d: error %d, expected %d", r.Type, r.Offset, code, want)
				}
			}
			dev.mu.Lock()
			defer dev.mu.Unlock()
			if want := []int{5, 3}; !slices.Equal(dev.batches, want) { // a lone one is no batch
				t.Errorf("batches of %v writes, expected %v", dev.batches, want)
			}
		})
	}
}

// Reads from the disk that came together are answered each by itself, also
// where some of them fail.
func TestColdTogether(t *testing.T) {
	for _, s := range styles {
		t.Run(s.String(), func(t *testing.T) {
			dev := newMemDevice(testSize)
			dev.cold = func(int64, int64) bool { return true }
			dev.before = func(op string, off, _ int64) error {
				if op == "read" && off%(5*4096) == 0 {
					return syscall.EIO
				}
				return nil
			}
			c := serveDevice(t, dev).dial(s)
			for range 5 {
				var batch []byte
				const n = 100
				for i := range uint64(n) {
					r := req{Cookie: i + 1, Type: nbd.CmdRead, Offset: i * 4096, Length: 4096}
					c.Expect(r)
					batch = append(batch, c.Encode(r)...)
				}
				check(t, c.Send(batch))
				for range n {
					m, err := c.Receive()
					check(t, err)
					i := m.Cookie - 1
					data, failed := m.Payload, m.Error != 0
					if !m.Simple {
						failed = m.Type == nbd.ReplyError || m.Type == nbd.ReplyErrorOffset
						if m.Type == nbd.ReplyOffsetData {
							data = data[8:]
						}
					}
					if failed != (i%5 == 0) {
						t.Fatalf("read of block %d: failed %v", i, failed)
					}
					if !failed && !bytes.Equal(data, dev.data[i*4096:][:4096]) {
						t.Fatalf("read of block %d: other bytes", i)
					}
				}
			}
		})
	}
}
