package nbdserver_test

import (
	"io"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/cowdev/cowdev/internal/nbd"
	"github.com/cowdev/cowdev/internal/nbdclient"
	"github.com/cowdev/cowdev/nbdserver"
)

// A torrent is a stream of requests that never has to be waited for, and takes
// every reply.
type torrent struct {
	net.Conn // for Close and deadlines
	batch    []byte
	begin    func()        // waits for all streams
	left     *atomic.Int64 // batches to come, on all streams
}

func (s *torrent) Read(p []byte) (n int, err error) {
	s.begin()
	for len(p)-n >= len(s.batch) && s.left.Add(-1) >= 0 {
		n += copy(p[n:], s.batch)
	}
	if n == 0 {
		return 0, io.EOF
	}
	return n, nil
}

func (s *torrent) Write(p []byte) (int, error) { return len(p), nil }

// Of clients who send without end none is served much before another has its
// turn: a slice is 64 requests, a full receive buffer thousands.
func TestSlices(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1)) // their requests come one after the other
	srv, err := nbdserver.New(nbdserver.Config{Exports: []nbdserver.Export{{Device: newMemDevice(4096)}}})
	check(t, err)
	var left atomic.Int64
	left.Store(4000)
	var mu sync.Mutex
	var last, turns, run, longest int
	var all, begun sync.WaitGroup
	begun.Add(3)
	for me := range 3 { // a crowd for one processor
		dev := newMemDevice(testSize)
		dev.before = func(string, int64, int64) error {
			mu.Lock()
			defer mu.Unlock()
			run++
			if me != last {
				last, run = me, 1
				turns++
			}
			if left.Load() > 0 { // none has ended
				longest = max(longest, run)
			}
			return nil
		}
		stream := &torrent{Conn: pipe(t), left: &left}
		stream.begin = sync.OnceFunc(func() { begun.Done(); begun.Wait() })
		stream.batch = repeat(nbdclient.Raw(stream), 32, nbdclient.Request{Type: nbd.CmdRead, Length: 512})
		all.Go(func() { srv.ServeTransmission(stream, &nbdserver.Export{Device: dev}) })
	}
	all.Wait()
	t.Logf("%d requests of one in a row, %d turns", longest, turns)
	if longest == 0 || longest > 4*64 { // turns of the others may be cut short
		t.Errorf("%d requests of one client were served in a row, expected about 64", longest)
	}
}
