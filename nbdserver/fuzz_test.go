package nbdserver_test

import (
	"bytes"
	"io"
	"net"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/cowdev/cowdev/internal/nbd"
	"github.com/cowdev/cowdev/internal/nbdclient"
	"github.com/cowdev/cowdev/nbdserver"
	"golang.org/x/sys/unix"
)

// fuzzServe gives input to a connection and returns what comes back. The
// server has to end the connection after the input's end, within patience.
func fuzzServe(t *testing.T, serve func(*nbdserver.Server, net.Conn) error, input []byte) []byte {
	srv, err := nbdserver.New(nbdserver.Config{
		Exports:          []nbdserver.Export{{Name: "disk", Device: newMemDevice(1 << 16)}},
		HandshakeTimeout: patience,
	})
	check(t, err)
	client, server := socketpair(t)
	ended := make(chan struct{})
	go func() {
		serve(srv, server)
		close(ended)
	}()
	written := make(chan struct{})
	go func() {
		client.SetWriteDeadline(time.Now().Add(patience))
		client.Write(input)
		client.CloseWrite()
		close(written)
	}()
	client.SetReadDeadline(time.Now().Add(patience))
	output, err := io.ReadAll(io.LimitReader(client, 64<<20))
	client.Close()
	if ne, ok := err.(net.Error); ok && ne.Timeout() {
		t.Fatalf("no end of the connection after %d bytes of input and %d of output", len(input), len(output))
	}
	await(t, "the connection's goroutine", ended)
	await(t, "the sender", written)
	check(t, srv.Shutdown(t.Context()))
	return output
}

// FuzzHandshake sends anything instead of options.
func FuzzHandshake(f *testing.F) {
	option := func(code uint32, data ...[]byte) []byte {
		body := bytes.Join(data, nil)
		return slices.Concat(nbdclient.Uint64(nbd.OptionMagic), nbdclient.Uint32(code), nbdclient.Uint32(uint32(len(body))), body)
	}
	flags := nbdclient.Uint32(3)
	f.Add(flags)
	f.Add(slices.Concat(flags, option(nbd.OptList), option(nbd.OptAbort)))
	f.Add(slices.Concat(flags, option(nbd.OptExportName, []byte("disk"))))
	f.Add(slices.Concat(flags, option(nbd.OptInfo, nbdclient.InfoQuery("disk", 0, 1, 2, 3)), option(nbd.OptGo, nbdclient.InfoQuery(""))))
	f.Add(slices.Concat(flags, option(nbd.OptStructuredReply), option(nbd.OptSetMetaContext, nbdclient.MetaQuery("", "base:allocation", "cowdev:"))))
	f.Add(slices.Concat(flags, option(nbd.OptExtendedHeaders), option(nbd.OptListMetaContext, nbdclient.MetaQuery("disk")), option(77, []byte("x"))))
	f.Fuzz(func(t *testing.T, input []byte) {
		fuzzServe(t, (*nbdserver.Server).ServeConn, input)
	})
}

// FuzzTransmission sends anything instead of requests, in any style. Where
// replies come in chunks, so that they can be told apart without the requests,
// each has to be whole, valid, and to a request that was sent.
func FuzzTransmission(f *testing.F) {
	c := nbdclient.Raw(pipe(f))
	for _, s := range styles {
		c.Extended = s == extended
		var all []byte
		for kind := range uint16(9) {
			p := c.Encode(nbdclient.Request{Type: kind, Cookie: uint64(kind) + 1, Offset: 512, Length: 4096})
			if kind == nbd.CmdWrite {
				p = c.Encode(nbdclient.Request{Type: kind, Flags: payloadFlag(c), Payload: make([]byte, 5000)})
			}
			f.Add(uint8(s), p)
			if kind != nbd.CmdDisc {
				all = append(all, p...)
			}
		}
		f.Add(uint8(s), all)
	}
	f.Fuzz(func(t *testing.T, s uint8, input []byte) {
		how := style(s % 3)
		greeting, answer := begin(how)
		output := fuzzServe(t, (*nbdserver.Server).ServeConn, append(greeting, input...))
		if len(output) < answer {
			t.Fatalf("%d bytes of output, the handshake has %d", len(output), answer)
		}
		if how != simple {
			checkChunks(t, how == extended, input, output[answer:])
		}
	})
}

// begin returns what a client sends for the transmission phase to begin, and
// the size of what the server answers.
func begin(s style) (sent []byte, answer int) {
	option := func(code uint32, data []byte) {
		sent = slices.Concat(sent, nbdclient.Uint64(nbd.OptionMagic), nbdclient.Uint32(code), nbdclient.Uint32(uint32(len(data))), data)
		answer += nbd.OptionReplyHeaderSize
	}
	sent, answer = nbdclient.Uint32(3), 18
	switch s {
	case structured:
		option(nbd.OptStructuredReply, nil)
	case extended:
		option(nbd.OptExtendedHeaders, nil)
	}
	if s != simple {
		option(nbd.OptSetMetaContext, nbdclient.MetaQuery("", "base:allocation"))
		answer += nbd.OptionReplyHeaderSize + 4 + len("base:allocation")
	}
	option(nbd.OptGo, nbdclient.InfoQuery(""))
	return sent, answer + nbd.OptionReplyHeaderSize + 12
}

// checkChunks takes the output of a server apart.
func checkChunks(t *testing.T, extended bool, input, output []byte) {
	here, there := net.Pipe()
	defer here.Close()
	go func() {
		there.Write(output)
		there.Close()
	}()
	c := nbdclient.Raw(here)
	c.Structured, c.Extended = true, extended
	for {
		m, err := c.Receive()
		if err == io.EOF {
			return
		}
		if err != nil {
			t.Fatalf("reply %+v: %v", m, err)
		}
		if !bytes.Contains(input, nbdclient.Uint64(m.Cookie)) {
			t.Fatalf("reply with cookie %#x, which was not sent", m.Cookie)
		}
	}
}

// socketpair returns the two ends of a unix socket.
func socketpair(t testing.TB) (a, b *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	check(t, err)
	var ends [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socket")
		c, err := net.FileConn(f)
		check(t, err)
		f.Close()
		ends[i] = c.(*net.UnixConn)
	}
	t.Cleanup(func() { ends[0].Close(); ends[1].Close() })
	return ends[0], ends[1]
}
