package nbdserver_test

import (
	"fmt"
	"io"
	"sync"
	"testing"
	"time"

	"github.com/cowdev/cowdev/internal/nbd"
	"github.com/cowdev/cowdev/internal/nbdclient"
)

// A volley is a batch of requests of one kind that is sent in one piece, and
// room for the replies: nothing is allocated to fire it.
type volley struct {
	c       *nbdclient.Client
	batch   []byte
	replies []byte
	n       int
}

// newVolley makes a volley of depth requests like r, at offsets that differ.
func newVolley(c *nbdclient.Client, r req, depth int) *volley {
	v := &volley{c: c, n: depth}
	for i := range depth {
		r.Cookie = uint64(i + 1)
		r.Offset = uint64(i) * max(4096, r.Length, uint64(len(r.Payload))) % (testSize / 2)
		v.batch = append(v.batch, c.Encode(r)...)
	}
	size := nbd.SimpleReplySize
	if r.Type == nbd.CmdRead {
		size += int(r.Length)
	}
	v.replies = make([]byte, depth*size)
	return v
}

func (v *volley) fire(t testing.TB) {
	if _, err := v.c.Write(v.batch); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(v.c, v.replies); err != nil {
		t.Fatal(err)
	}
}

// loads are the requests that the fast path is for.
var loads = []struct {
	name string
	cold bool
	req  req
}{
	{"read 4K", false, req{Type: nbd.CmdRead, Length: 4096}},
	{"read 128K", false, req{Type: nbd.CmdRead, Length: 128 << 10}},
	{"read 4K cold", true, req{Type: nbd.CmdRead, Length: 4096}},
	{"write 4K", false, req{Type: nbd.CmdWrite, Payload: make([]byte, 4096)}},
	{"write 128K", false, req{Type: nbd.CmdWrite, Payload: make([]byte, 128<<10)}},
	{"trim 4K", false, req{Type: nbd.CmdTrim, Length: 4096}},
	{"write 4K FUA", false, req{Type: nbd.CmdWrite, Flags: nbd.CmdFlagFUA, Payload: make([]byte, 4096)}},
}

func serveLoad(t testing.TB, cold bool) *nbdclient.Client {
	dev := newMemDevice(testSize)
	if cold {
		dev.cold = func(int64, int64) bool { return true }
	}
	c := serveDevice(t, dev).dial(simple)
	c.SetDeadline(time.Time{})
	return c
}

// BenchmarkRequests does requests at a depth, over a unix socket, to a device
// in memory. Client and server share the process.
func BenchmarkRequests(b *testing.B) {
	for _, l := range loads {
		for _, depth := range []int{1, 16, 64} {
			b.Run(fmt.Sprintf("%s/depth %d", l.name, depth), func(b *testing.B) {
				v := newVolley(serveLoad(b, l.cold), l.req, depth)
				v.fire(b)
				b.SetBytes(int64(max(l.req.Length, uint64(len(l.req.Payload)))))
				b.ReportAllocs()
				b.ResetTimer()
				for i := 0; i < b.N; i += depth {
					v.fire(b)
				}
			})
		}
	}
}

// In steady state a request allocates nothing, whichever way it goes.
func TestNoAllocations(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	for _, l := range loads {
		v := newVolley(serveLoad(t, l.cold), l.req, 16)
		for range 50 {
			v.fire(t)
		}
		// A collection may empty the pools, and goroutines may be begun.
		if n := testing.AllocsPerRun(200, func() { v.fire(t) }); n > 3 {
			t.Errorf("%s: %v allocations for 16 requests, expected none", l.name, n)
		}
	}
}

func BenchmarkConnections(b *testing.B) {
	for _, conns := range []int{1, 4, 16} {
		for _, depth := range []int{16, 64} {
			b.Run(fmt.Sprintf("%d/depth %d", conns, depth), func(b *testing.B) {
				r := serveDevice(b, newMemDevice(testSize))
				var vs []*volley
				for range conns {
					c := r.dial(simple)
					c.SetDeadline(time.Time{})
					v := newVolley(c, loads[0].req, depth)
					v.fire(b)
					vs = append(vs, v)
				}
				b.ReportAllocs()
				b.ResetTimer()
				var all sync.WaitGroup
				for _, v := range vs {
					all.Go(func() {
						for i := 0; i < b.N; i += depth * conns {
							v.fire(b)
						}
					})
				}
				all.Wait()
			})
		}
	}
}
