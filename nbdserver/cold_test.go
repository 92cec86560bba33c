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
