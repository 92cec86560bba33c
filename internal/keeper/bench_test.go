package keeper

import (
	"bufio"
	"context"
	"encoding/binary"
	"io"
	"net"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// What the keeper costs: reads of 4 KiB, 16 in flight, straight from a server
// that does nothing, and by way of a keeper.
func BenchmarkRead(b *testing.B) {
	for _, relayed := range []bool{false, true} {
		b.Run(map[bool]string{false: "direct", true: "kept"}[relayed], func(b *testing.B) {
			kernelEnd, front := pair(b)
			back, serverEnd := pair(b)
			if !relayed {
				back.Close()
				front, serverEnd = serverEnd, front
			}
			exited := make(chan struct{})
			go func() { defer close(exited); answer(serverEnd) }()
			if relayed {
				k := New(Config{}, []net.Conn{front})
				end := func() { back.Close() }
				ran := make(chan error, 1)
				go func() {
					ran <- k.Run(context.Background(), &Server{Conns: []net.Conn{back}, Exited: exited, Stop: end, Kill: end})
				}()
				defer func() { <-ran }()
			}
			ask(b, kernelEnd)
			(&kernel{c: kernelEnd}).bye()
		})
	}
}

const (
	benchSize  = 4096
	benchDepth = 16
)

// ask keeps benchDepth reads in flight until b.N are answered.
func ask(b *testing.B, c net.Conn) {
	in := bufio.NewReaderSize(c, 128<<10)
	reply := make([]byte, replySize+benchSize)
	head := make([]byte, requestSize)
	binary.BigEndian.PutUint32(head, requestMagic)
	binary.BigEndian.PutUint32(head[24:], benchSize)
	b.SetBytes(benchSize)
	b.ReportAllocs()
	b.ResetTimer()
	for asked, done := 0, 0; done < b.N; done++ {
		for asked < b.N && asked < done+benchDepth {
			asked++
			binary.BigEndian.PutUint64(head[8:], uint64(asked))
			if _, err := c.Write(head); err != nil {
				b.Fatal(err)
			}
		}
		if _, err := io.ReadFull(in, reply); err != nil {
			b.Fatal(err)
		}
	}
	b.StopTimer()
}

// answer answers reads with zeros until c says goodbye.
func answer(c net.Conn) {
	defer c.Close()
	in, out := bufio.NewReaderSize(c, 128<<10), bufio.NewWriterSize(c, 128<<10)
	head, reply := make([]byte, requestSize), make([]byte, replySize+benchSize)
	binary.BigEndian.PutUint32(reply, replyMagic)
	for {
		if in.Buffered() < requestSize {
			out.Flush()
		}
		if _, err := io.ReadFull(in, head); err != nil || binary.BigEndian.Uint16(head[6:]) == cmdDisc {
			return
		}
		copy(reply[8:], head[8:16])
		out.Write(reply)
	}
}

// pair returns a connected pair of unix sockets, as the kernel is given.
func pair(b *testing.B) (x, y net.Conn) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		b.Fatal(err)
	}
	var conns [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "")
		if conns[i], err = net.FileConn(f); err != nil {
			b.Fatal(err)
		}
		f.Close()
	}
	return conns[0], conns[1]
}
