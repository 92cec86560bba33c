// Package limit is an NBD server that does no work: it answers every read from
// one constant piece of memory and forgets every write. It shows how fast a
// server on this machine could be at all, and that the load generator keeps up
// with one.
package limit

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"runtime/debug"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/cowdev/cowdev/bench/rawfd"
	"github.com/cowdev/cowdev/internal/nbd"
)

const (
	maxRequest  = 32 << 20
	receiveSize = 4 << 20
	maxReplies  = 500 // in a batch: two vectors each, of the 1024 that a call takes
	maxConns    = 16  // a thread each, that the scheduler cannot take a processor from
)

// Main serves a device as large as base on a unix socket until the process
// ends.
func Main(socket, base string) error {
	info, err := os.Stat(base)
	if err != nil {
		return err
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	debug.SetGCPercent(-1)
	runtime.GOMAXPROCS(maxConns + 2)
	data := make([]byte, maxRequest)
	for i := range data {
		data[i] = 'Z'
	}
	for {
		nc, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			if err := serve(nc.(*net.UnixConn), info.Size(), data); err != nil {
				fmt.Fprintln(os.Stderr, "limit:", err)
			}
		}()
	}
}

func serve(nc *net.UnixConn, size int64, data []byte) error {
	defer nc.Close()
	if err := handshake(nc, size); err != nil {
		return err
	}
	fd, err := rawfd.Take(nc)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	s := session{fd: uintptr(fd), data: data, in: make([]byte, receiveSize), heads: make([]byte, maxReplies*nbd.SimpleReplySize)}
	runtime.LockOSThread()
	return s.run()
}

// handshake knows no option but EXPORT_NAME, which is all that the load
// generator asks.
func handshake(nc net.Conn, size int64) error {
	hello := binary.BigEndian.AppendUint64(nil, nbd.Magic)
	hello = binary.BigEndian.AppendUint64(hello, nbd.OptionMagic)
	hello = binary.BigEndian.AppendUint16(hello, nbd.FlagFixedNewstyle|nbd.FlagNoZeroes)
	if _, err := nc.Write(hello); err != nil {
		return err
	}
	var in [4 + nbd.OptionHeaderSize]byte
	if _, err := io.ReadFull(nc, in[:]); err != nil {
		return err
	}
	if option := binary.BigEndian.Uint32(in[12:]); option != nbd.OptExportName {
		return fmt.Errorf("option %d, expected %d", option, nbd.OptExportName)
	}
	if _, err := io.CopyN(io.Discard, nc, int64(binary.BigEndian.Uint32(in[16:]))); err != nil {
		return err
	}
	about := binary.BigEndian.AppendUint64(nil, uint64(size))
	about = binary.BigEndian.AppendUint16(about, nbd.FlagHasFlags|nbd.FlagSendFlush|nbd.FlagSendTrim|nbd.FlagCanMultiConn)
	_, err := nc.Write(about)
	return err
}

// A session is the transmission phase of one connection.
type session struct {
	fd    uintptr
	data  []byte
	in    []byte
	r, w  int
	skip  int // bytes of a write's payload that are still to come
	heads []byte
	iov   [2*maxReplies + 1]unix.Iovec
}

func (s *session) run() error {
	for {
		if s.r == s.w {
			s.r, s.w = 0, 0
		} else if s.r > 0 {
			s.w = copy(s.in, s.in[s.r:s.w])
			s.r = 0
		}
		n, _, errno := unix.RawSyscall6(unix.SYS_RECVFROM, s.fd, uintptr(unsafe.Pointer(&s.in[s.w])), uintptr(len(s.in)-s.w), 0, 0, 0)
		switch {
		case errno == unix.EINTR:
			continue
		case errno != 0:
			return errno
		case n == 0:
			return nil
		}
		s.w += int(n)
		for more := true; more; {
			var vectors int
			var err error
			vectors, more, err = s.answer()
			if err == nil {
				err = s.send(s.iov[:vectors])
			}
			if errors.Is(err, io.EOF) {
				return nil
			}
			if err != nil {
				return err
			}
		}
	}
}

// answer makes the replies to the requests that have come, and says whether
// there may be more to make.
func (s *session) answer() (vectors int, more bool, err error) {
	for reply := range maxReplies {
		skipped := min(s.skip, s.w-s.r)
		s.skip -= skipped
		s.r += skipped
		p := s.in[s.r:s.w]
		if s.skip > 0 || len(p) < nbd.RequestHeaderSize {
			return vectors, false, nil
		}
		length := int(binary.BigEndian.Uint32(p[24:]))
		kind := binary.BigEndian.Uint16(p[6:])
		if kind == nbd.CmdDisc {
			return 0, false, io.EOF
		}
		if length > maxRequest {
			return 0, false, fmt.Errorf("request of %d bytes", length)
		}
		s.r += nbd.RequestHeaderSize
		h := s.heads[reply*nbd.SimpleReplySize:][:nbd.SimpleReplySize]
		binary.BigEndian.PutUint32(h, nbd.SimpleReplyMagic)
		binary.BigEndian.PutUint32(h[4:], 0)
		copy(h[8:], p[8:16])
		if vectors > 0 && kind != nbd.CmdRead && s.follows(vectors, h) {
			s.iov[vectors-1].Len += uint64(len(h))
		} else {
			s.iov[vectors] = unix.Iovec{Base: &h[0], Len: uint64(len(h))}
			vectors++
		}
		switch kind {
		case nbd.CmdRead:
			s.iov[vectors] = unix.Iovec{Base: &s.data[0], Len: uint64(length)}
			vectors++
		case nbd.CmdWrite:
			s.skip = length
		}
	}
	return vectors, true, nil
}

// follows reports whether h lies right behind the last vector.
func (s *session) follows(vectors int, h []byte) bool {
	last := s.iov[vectors-1]
	return unsafe.Add(unsafe.Pointer(last.Base), last.Len) == unsafe.Pointer(&h[0])
}

func (s *session) send(iov []unix.Iovec) error {
	for len(iov) > 0 {
		n, _, errno := unix.RawSyscall(unix.SYS_WRITEV, s.fd, uintptr(unsafe.Pointer(&iov[0])), uintptr(len(iov)))
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 {
			return errno
		}
		for left := uint64(n); left > 0; {
			k := min(left, iov[0].Len)
			left -= k
			iov[0].Len -= k
			iov[0].Base = (*byte)(unsafe.Add(unsafe.Pointer(iov[0].Base), k))
			if iov[0].Len == 0 {
				iov = iov[1:]
			}
		}
	}
	return nil
}
