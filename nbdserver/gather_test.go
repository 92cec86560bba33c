package nbdserver_test

import (
	"bytes"
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
			dev.before = func(op string, off, _ int64) error {
				if op == "write" && off == 3*4096 {
					return syscall.ENOSPC
				}
				return nil
			}
			c := serveDevice(t, dev).dial(s)
			fill := func(v byte, n int) []byte { return bytes.Repeat([]byte{v}, n) }
			var rs []req
			write := func(off uint64, p []byte, flags uint16) {
				rs = append(rs, req{Type: nbd.CmdWrite, Flags: flags | payloadFlag(c), Offset: off, Payload: p})
			}
			for i, block := range []uint64{0, 1, 2, 3, 12} {
				write(block*4096, fill(byte(i), 4096), 0)
			}
			rs = append(rs, req{Type: nbd.CmdRead, Offset: 12 * 4096, Length: 4096})
			write(4096, fill(9, 4096), 0)
			write(0, fill(9, 4096), nbd.CmdFlagFUA)
			write(0, fill(9, 32<<10), 0)
			for i := range uint64(3) {
				write(i*4096, fill(8, 4096), 0)
			}
			rs = append(rs, req{Type: 77})
			results, err := c.DoAll(rs)
			check(t, err)
			for i, r := range rs {
				want := uint32(0)
				switch {
				case r.Type == 77:
					want = nbd.EINVAL
				case r.Type == nbd.CmdWrite && r.Offset == 3*4096:
					want = nbd.ENOSPC
				case r.Type == nbd.CmdRead && !bytes.Equal(results[i].Data, fill(4, 4096)):
					t.Errorf("a read after five writes returned %x…", results[i].Data[:1])
				}
				if results[i].Error != want {
					t.Errorf("command %d at %d: error %d, expected %d", r.Type, r.Offset, results[i].Error, want)
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

// A lone client that waits for all it sent has half of its writes answered
// while the others are done.
func TestGatheredHalf(t *testing.T) {
	dev := &batchDevice{memDevice: newMemDevice(testSize)}
	begun, begin, gate := make(chan struct{}), make(chan struct{}), make(chan struct{})
	dev.before = func(op string, off, _ int64) error {
		switch {
		case op == "write" && off == 16*4096: // first, until the others have arrived
			close(begun)
			<-begin
		case op == "write" && off == 8*4096:
			<-gate
		}
		return nil
	}
	c := serveDevice(t, dev).dial(structured)
	write := func(block uint64) []byte {
		r := req{Type: nbd.CmdWrite, Cookie: block + 1, Offset: block * 4096, Payload: make([]byte, 4096)}
		c.Expect(r)
		return c.Encode(r)
	}
	check(t, c.Send(write(16)))
	<-begun
	var all [][]byte
	for i := range uint64(16) {
		all = append(all, write(i))
	}
	check(t, c.Send(all...))
	close(begin)
	_, err := c.Receive()
	check(t, err)
	for i := range uint64(16) {
		if i == 8 {
			close(gate)
		}
		m, err := c.Receive()
		check(t, err)
		if m.Cookie != i+1 {
			t.Fatalf("answer %d is of write %d", i+1, m.Cookie)
		}
	}
	dev.mu.Lock()
	defer dev.mu.Unlock()
	if want := []int{8, 8}; !slices.Equal(dev.batches, want) {
		t.Errorf("batches of %v writes, expected %v", dev.batches, want)
	}
}
