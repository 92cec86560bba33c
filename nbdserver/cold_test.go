package nbdserver_test

import (
	"bytes"
	"syscall"
	"testing"

	"github.com/cowdev/cowdev/internal/nbd"
)

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
			var rs []req
			for i := range uint64(100) {
				rs = append(rs, req{Type: nbd.CmdRead, Offset: i * 4096, Length: 4096})
			}
			for range 5 {
				results, err := c.DoAll(rs)
				check(t, err)
				for i, r := range results {
					switch {
					case (r.Error != 0) != (i%5 == 0):
						t.Fatalf("read of block %d: error %d", i, r.Error)
					case r.Error == 0 && !bytes.Equal(r.Data, dev.data[i*4096:][:4096]):
						t.Fatalf("read of block %d: other bytes", i)
					}
				}
			}
		})
	}
}

// Reads from the disk are begun before the server waits for the payload of a
// write that came with them, however that is served.
func TestColdBeforePayload(t *testing.T) {
	for name, w := range map[string]req{
		"in pieces": {Length: 1 << 20},
		"refused":   {Length: 1 << 20, Offset: testSize},
		"later":     {Length: 200_000},
	} {
		t.Run(name, func(t *testing.T) {
			dev := newMemDevice(testSize)
			dev.cold = func(int64, int64) bool { return true }
			dev.blocking = name == "later"
			c := serveDevice(t, dev).dial(structured)
			var all [][]byte
			for i := range uint64(4) {
				r := req{Type: nbd.CmdRead, Cookie: i + 1, Offset: i * 4096, Length: 4096}
				c.Expect(r)
				all = append(all, c.Encode(r))
			}
			w.Type, w.Cookie = nbd.CmdWrite, 5
			check(t, c.Send(append(all, c.Encode(w))...))
			for range 4 {
				m, err := c.Receive()
				check(t, err)
				if m.Cookie > 4 {
					t.Fatalf("reply to %d, whose payload has not come", m.Cookie)
				}
			}
			check(t, c.Send(make([]byte, w.Length)))
			if m, err := c.Receive(); err != nil || m.Cookie != 5 {
				t.Errorf("reply to the write: %+v, %v", m, err)
			}
		})
	}
}
