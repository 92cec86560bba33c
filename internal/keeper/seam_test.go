package keeper

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"sync"
	"testing"
	"time"
)

// header is a request's head, by the kernel.
func header(kind uint16, cookie, off uint64, n int) []byte {
	head := make([]byte, requestSize)
	binary.BigEndian.PutUint32(head, requestMagic)
	binary.BigEndian.PutUint16(head[6:], kind)
	binary.BigEndian.PutUint64(head[8:], cookie)
	binary.BigEndian.PutUint64(head[16:], off)
	binary.BigEndian.PutUint32(head[24:], uint32(n))
	return head
}

// answerTo is the head of a reply without an error.
func answerTo(cookie uint64) []byte {
	head := make([]byte, replySize)
	binary.BigEndian.PutUint32(head, replyMagic)
	binary.BigEndian.PutUint64(head[8:], cookie)
	return head
}

// oneServer is a server of one connection, and the end of it that answers.
func oneServer() (*Server, net.Conn) {
	ours, theirs := net.Pipe()
	exited := make(chan struct{})
	end := func() { theirs.Close() }
	go func() { // it is gone when its connection is
		defer close(exited)
		for ours.SetDeadline(time.Time{}) == nil {
			time.Sleep(time.Millisecond)
		}
	}()
	return &Server{Conns: []net.Conn{ours}, Exited: exited, Stop: end, Kill: end}, theirs
}

// What a server answered before it talked nonsense is passed on.
func TestAnswersBeforeNonsense(t *testing.T) {
	front, kernelEnd := net.Pipe()
	kernelEnd.SetDeadline(time.Now().Add(testLimit))
	d := new(disk)
	k := New(Config{
		Launch:   func(context.Context) (*Server, error) { return d.launch(1, 0), nil },
		Patience: testLimit,
	}, []net.Conn{front})
	first, theirs := oneServer()
	ran := make(chan error, 1)
	go func() { ran <- k.Run(context.Background(), first) }()
	kernelEnd.Write(header(cmdWrite, 1, 0, 0))
	if _, err := io.ReadFull(theirs, make([]byte, requestSize)); err != nil {
		t.Fatal(err)
	}
	go theirs.Write(append(answerTo(1), "sixteen or more bytes of nonsense"...))
	kernelEnd.SetReadDeadline(time.Now().Add(5 * time.Second))
	if _, err := io.ReadFull(kernelEnd, make([]byte, replySize)); err != nil {
		t.Errorf("the answer: %v", err)
	}
	(&kernel{c: kernelEnd}).bye()
	if err := <-ran; err != nil {
		t.Errorf("keeper: %v", err)
	}
}

// What came by a connection that the kernel gave up is not done by a server
// that comes later: the kernel has sent it again by another, and what it wrote
// after that would be undone.
func TestGivenUpIsForgotten(t *testing.T) {
	front, kernelEnd := net.Pipe()
	r := NewRelay(front)
	ran := make(chan error, 1)
	go func() { ran <- r.Run() }()
	kernelEnd.Write(append(header(cmdWrite, 1, 0, 1), 'x'))
	kernelEnd.Close()
	if err := <-ran; !errors.Is(err, errFront) {
		t.Errorf("%v, expected errFront", err)
	}
	back, server := net.Pipe()
	go r.Serve(back)
	server.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
	if n, err := server.Read(make([]byte, requestSize)); n > 0 {
		t.Errorf("the server was sent %d bytes (%v), expected none", n, err)
	}
	server.Close()
}

// A keeper that holds as much as it may gives up all the same.
func TestGivesUpFull(t *testing.T) {
	front, kernelEnd := net.Pipe()
	k := New(Config{
		Launch:   func(context.Context) (*Server, error) { return nil, errors.New("no such thing") },
		Patience: 50 * time.Millisecond,
	}, []net.Conn{front})
	relay := k.relays[0]
	first, theirs := oneServer()
	ran := make(chan error, 1)
	go func() { ran <- k.Run(context.Background(), first) }()
	const size = 1 << 20
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		for cookie := range uint64(heldLimit/size + 2) {
			kernelEnd.Write(header(cmdWrite, cookie, 0, size))
			kernelEnd.Write(make([]byte, size))
		}
	}()
	go io.Copy(io.Discard, theirs)
	for full := false; !full; time.Sleep(time.Millisecond) {
		relay.mu.Lock()
		full = relay.bytes > heldLimit
		relay.mu.Unlock()
	}
	theirs.Close()
	select {
	case err := <-ran:
		if !errors.Is(err, ErrGaveUp) {
			t.Errorf("%v, expected ErrGaveUp", err)
		}
	case <-time.After(5 * time.Second):
		t.Fatal("the keeper still runs")
	}
	<-sent
}

// A connection that the kernel gave up is replaced also while the server that
// hangs has been given as much as its socket takes; the server is killed.
func TestGivenUpWhileFull(t *testing.T) {
	front, kernelEnd := unixPair()
	second, kernelAgain := unixPair()
	back, theirs := unixPair()
	kernelAgain.SetDeadline(time.Now().Add(10 * time.Second))
	d := new(disk)
	k := New(Config{
		Launch:    func(context.Context) (*Server, error) { return d.launch(1, 0), nil },
		Reconnect: func(int) (net.Conn, error) { return second, nil },
		Patience:  testLimit, StopLimit: 10 * time.Millisecond,
	}, []net.Conn{front})
	exited := make(chan struct{})
	kill := sync.OnceFunc(func() { theirs.Close(); close(exited) })
	hangs := &Server{Conns: []net.Conn{back}, Exited: exited, Stop: func() {}, Kill: kill}
	ran := make(chan error, 1)
	go func() { ran <- k.Run(context.Background(), hangs) }()
	kernelEnd.SetWriteDeadline(time.Now().Add(time.Second)) // by then all buffers are full
	for cookie := uint64(1); ; cookie++ {
		if _, err := kernelEnd.Write(append(header(cmdWrite, cookie, 0, 64<<10), make([]byte, 64<<10)...)); err != nil {
			break
		}
	}
	kernelEnd.Close()
	kernelAgain.Write(header(cmdRead, 1, 0, 1))
	if _, err := io.ReadFull(kernelAgain, make([]byte, replySize+1)); err != nil {
		t.Fatal(err)
	}
	(&kernel{c: kernelAgain}).bye()
	if err := <-ran; err != nil {
		t.Errorf("keeper: %v", err)
	}
}

// A server that neither comes up nor fails is waited for until the patience ends
// or the kernel says goodbye.
func TestLaunchHangs(t *testing.T) {
	for patience, want := range map[time.Duration]error{50 * time.Millisecond: ErrGaveUp, testLimit: nil} {
		front, kernelEnd := net.Pipe()
		k := New(Config{
			Launch: func(ctx context.Context) (*Server, error) {
				<-ctx.Done()
				return nil, ctx.Err()
			},
			Patience: patience,
		}, []net.Conn{front})
		first, theirs := oneServer()
		theirs.Close()
		ran := make(chan error, 1)
		go func() { ran <- k.Run(context.Background(), first) }()
		if want == nil {
			(&kernel{c: kernelEnd}).bye()
		}
		select {
		case err := <-ran:
			if !errors.Is(err, want) {
				t.Errorf("%v, expected %v", err, want)
			}
		case <-time.After(5 * time.Second):
			t.Errorf("patience %v: the keeper still runs", patience)
		}
	}
}
