package nbdserver_test

import (
	"encoding/binary"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cowdev/cowdev/block"
	"github.com/cowdev/cowdev/internal/nbd"
)

// A versionDevice is blocks that each begin with a number, which grows. It knows
// which numbers a crash would leave.
type versionDevice struct {
	*batchDevice
	safeMu sync.Mutex
	safe   versions
}

const (
	versionBlock  = 16 << 10
	versionBlocks = 128
)

type versions [versionBlocks]uint64

// WriteBatch leaves some writes to be done alone.
func (d *versionDevice) WriteBatch(w []block.Write) {
	for i := range w {
		if rand.IntN(8) == 0 {
			w[i].Err = block.ErrAlone
		} else {
			_, w[i].Err = d.WriteAt(w[i].Data, w[i].Off)
		}
	}
}

// Flush makes safe what there was when it began, and takes its time.
func (d *versionDevice) Flush() error {
	var now versions
	d.mu.RLock()
	for i := range now {
		now[i] = binary.BigEndian.Uint64(d.data[i*versionBlock:])
	}
	d.mu.RUnlock()
	time.Sleep(rand.N(3 * time.Millisecond))
	d.safeMu.Lock()
	defer d.safeMu.Unlock()
	for i := range now {
		d.safe[i] = max(d.safe[i], now[i])
	}
	return nil
}

// Session is one whose memory nobody writes to.
func (d *versionDevice) Session() block.Session {
	return &versionSession{memSession{d: d.memDevice}}
}

type versionSession struct{ memSession }

func (s *versionSession) View(vecs [][]byte, off, n int64) ([][]byte, bool) {
	if rand.IntN(4) == 0 {
		return vecs, false
	}
	p := make([]byte, n)
	_, err := s.d.ReadAt(p, off)
	return append(vecs, p), err == nil
}

// Writes of several connections, alone and together, with FUA and without, are
// seen by every read that is sent after they were answered, and are safe when a
// FLUSH is answered, on whatever connection, that was sent after they were.
func TestManyConnections(t *testing.T) {
	mem := newMemDevice(versionBlocks * versionBlock)
	clear(mem.data)
	mem.cold = func(int64, int64) bool { return true }
	dev := &versionDevice{batchDevice: &batchDevice{memDevice: mem}}
	r := serveDevice(t, dev)

	var answered [versionBlocks]atomic.Uint64
	soFar := func() (v versions) {
		for i := range v {
			v[i] = answered[i].Load()
		}
		return v
	}
	expectSafe := func(what string, want versions) {
		dev.safeMu.Lock()
		defer dev.safeMu.Unlock()
		for i, v := range dev.safe {
			if v < want[i] {
				t.Errorf("%s: block %d is safe as of %d, expected %d", what, i, v, want[i])
			}
		}
	}
	end := time.Now().Add(5 * time.Second)
	if testing.Short() {
		end = time.Now().Add(time.Second)
	}
	var running sync.WaitGroup
	each := func(s style, step func(do func([]req) []uint64)) {
		c := r.dial(s)
		// do returns the numbers that were read.
		do := func(rs []req) []uint64 {
			results, err := c.DoAll(rs)
			numbers := make([]uint64, len(rs))
			for i, res := range results {
				if res.Error != 0 {
					t.Errorf("command %d: error %d", rs[i].Type, res.Error)
				} else if rs[i].Type == nbd.CmdRead {
					numbers[i] = binary.BigEndian.Uint64(res.Data)
				}
			}
			if err != nil {
				t.Error(err)
			}
			return numbers
		}
		running.Go(func() {
			for time.Now().Before(end) && !t.Failed() {
				step(do)
			}
		})
	}
	flush := func(do func([]req) []uint64) {
		want := soFar()
		do([]req{{Type: nbd.CmdFlush}})
		expectSafe("FLUSH", want)
	}
	const writers = 4
	for w := range writers {
		version, flag := uint64(0), uint16(0)
		if styles[w%3] == extended {
			flag = nbd.CmdFlagPayloadLen
		}
		each(styles[w%3], func(do func([]req) []uint64) {
			version++
			var rs []req
			var fua versions
			for _, b := range rand.Perm(versionBlocks / writers)[:1+rand.IntN(30)] {
				b = b*writers + w
				p := make([]byte, []int{8, 512, 4096, versionBlock}[rand.IntN(4)])
				binary.BigEndian.PutUint64(p, version)
				write := req{Type: nbd.CmdWrite, Flags: flag, Offset: uint64(b * versionBlock), Payload: p}
				if rand.IntN(8) == 0 {
					write.Flags |= nbd.CmdFlagFUA
					fua[b] = version
				}
				rs = append(rs, write)
			}
			do(rs)
			expectSafe("FUA", fua)
			for _, write := range rs {
				answered[write.Offset/versionBlock].Store(version)
			}
			if w == 0 {
				flush(do)
			}
		})
	}
	for _, s := range styles {
		each(s, func(do func([]req) []uint64) {
			if rand.IntN(4) == 0 {
				flush(do)
			}
			var rs []req
			for range 1 + rand.IntN(20) {
				rs = append(rs, req{Type: nbd.CmdRead, Offset: rand.Uint64N(versionBlocks) * versionBlock, Length: []uint64{8, 4096, versionBlock}[rand.IntN(3)]})
			}
			want := soFar()
			for i, got := range do(rs) {
				if b := rs[i].Offset / versionBlock; got < want[b] {
					t.Errorf("read of block %d: as of %d, expected %d", b, got, want[b])
				}
			}
		})
	}
	running.Wait()
}
