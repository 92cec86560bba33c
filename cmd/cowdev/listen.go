package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cowdev/cowdev/internal/disk"
)

// maxSocketPath is what fits into the system's address of a unix socket.
const maxSocketPath = len(unix.RawSockaddrUnix{}.Path) - 1

// A listener is a place where clients connect, and how they are told of it.
type listener struct {
	net.Listener
	uri  string // as libnbd and qemu understand it
	hint string // the command that attaches it by the kernel's client
}

// listenConfig says where to listen.
type listenConfig struct {
	sockets []string // absolute paths
	mode    fs.FileMode
	gid     int // of the sockets; -1 as it comes
	tcp     []*net.TCPAddr
	export  string
	tls     bool // in the URIs
}

// listenAll opens every listener, or none.
func listenAll(lc listenConfig) ([]listener, error) {
	var ls []listener
	fail := func(err error) ([]listener, error) {
		for _, l := range ls {
			l.Close()
		}
		return nil, err
	}
	for _, path := range lc.sockets {
		l, err := listenUnix(path, lc.mode, lc.gid)
		if err != nil {
			return fail(err)
		}
		ls = append(ls, listener{l, lc.unixURI(path), lc.hint("-unix " + shellWord(path))})
	}
	for _, addr := range lc.tcp {
		network := "tcp"
		if addr.IP.To4() != nil {
			network = "tcp4" // 0.0.0.0 is not every address of IPv6 too
		}
		l, err := net.ListenTCP(network, addr)
		if err != nil {
			return fail(fmt.Errorf("listen on %s: %w", addr, bareError(err)))
		}
		at := l.Addr().(*net.TCPAddr)
		ls = append(ls, listener{l, lc.tcpURI(at), lc.hint(at.IP.String() + " " + strconv.Itoa(at.Port))})
	}
	return ls, nil
}

func (lc listenConfig) unixURI(path string) string {
	return lc.scheme() + "+unix:///" + escape(lc.export, "") + "?socket=" + escape(path, "/")
}

func (lc listenConfig) tcpURI(at *net.TCPAddr) string {
	uri := lc.scheme() + "://" + at.String()
	if lc.export != "" {
		uri += "/" + escape(lc.export, "")
	}
	return uri
}

func (lc listenConfig) scheme() string {
	if lc.tls {
		return "nbds"
	}
	return "nbd"
}

func (lc listenConfig) hint(where string) string {
	cmd := "nbd-client " + where
	if lc.export != "" {
		cmd += " -N " + shellWord(lc.export)
	}
	if lc.tls {
		cmd += " -x"
	}
	return cmd + " /dev/nbd0"
}

// escape writes s as a part of a URI: all but what RFC 3986 has no use for, and
// the bytes of keep, is percent-encoded. A query is taken apart at other bytes
// by each client.
func escape(s, keep string) string {
	const unreserved = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._~"
	var b strings.Builder
	for _, c := range []byte(s) {
		if strings.IndexByte(unreserved, c) >= 0 || strings.IndexByte(keep, c) >= 0 {
			b.WriteByte(c)
		} else {
			fmt.Fprintf(&b, "%%%02X", c)
		}
	}
	return b.String()
}

// shellWord quotes s where a shell would take it apart.
func shellWord(s string) string {
	const safe = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789@%_-+=:,./"
	if s != "" && strings.Trim(s, safe) == "" {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

// socketPath makes path absolute and sees that it can be one of a socket.
func socketPath(path string) (string, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	if len(abs) > maxSocketPath {
		return "", fmt.Errorf("%s: socket path of %d bytes, expected at most %d; give a shorter one by --socket: %w",
			abs, len(abs), maxSocketPath, syscall.ENAMETOOLONG)
	}
	return abs, nil
}

// listenUnix listens on a socket at path, in place of one that nobody listens
// on any more.
func listenUnix(path string, mode fs.FileMode, gid int) (net.Listener, error) {
	if err := removeStale(path); err != nil {
		return nil, err
	}
	// Nobody may connect before the mode is right. The umask is the whole
	// process's, which does nothing else yet.
	old := unix.Umask(0o177)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	unix.Umask(old)
	if err != nil {
		return nil, fmt.Errorf("%s: listen: %w", path, bareError(err))
	}
	l.SetUnlinkOnClose(false)
	own := &unixListener{UnixListener: l, path: path}
	own.file, err = os.Lstat(path)
	if err == nil && gid >= 0 {
		err = os.Chown(path, -1, gid)
	}
	if err == nil {
		err = os.Chmod(path, mode)
	}
	if err != nil {
		own.Close()
		return nil, err
	}
	return own, nil
}

// A unixListener removes its socket when it is closed, and no other that has
// come to its path since.
type unixListener struct {
	*net.UnixListener
	path string
	file fs.FileInfo
}

func (l *unixListener) Close() error {
	if now, err := os.Lstat(l.path); err == nil && os.SameFile(now, l.file) {
		os.Remove(l.path)
	}
	return l.UnixListener.Close()
}

// removeStale removes a socket that was left behind; it refuses one that is
// alive, and any other file.
func removeStale(path string) error {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case info.Mode()&fs.ModeSocket == 0:
		return fmt.Errorf("%s: exists and is no socket, remove it or give another by --socket: %w", path, fs.ErrExist)
	}
	conn, err := net.DialTimeout("unix", path, time.Second)
	switch {
	case err == nil:
		defer conn.Close()
		return fmt.Errorf("%s: a server listens there already: %w%s", path, disk.ErrLocked, peer(conn.(*net.UnixConn)))
	case !errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("%s: is it a server's? %w", path, bareError(err))
	}
	return os.Remove(path)
}

// peer names the process at the other end, for a message.
func peer(conn *net.UnixConn) string {
	raw, err := conn.SyscallConn()
	if err != nil {
		return ""
	}
	var who string
	_ = raw.Control(func(fd uintptr) {
		if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil && cred.Pid > 0 {
			who = fmt.Sprintf(" (pid %d)", cred.Pid)
		}
	})
	return who
}

// bareError returns the system's error alone: the address is told already.
func bareError(err error) error {
	var errno syscall.Errno
	if errors.As(err, &errno) {
		return errno
	}
	return err
}

// tcpAddress resolves HOST:PORT.
func tcpAddress(s string) (*net.TCPAddr, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		return nil, usagef("--listen: %q: expected HOST:PORT", s)
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return nil, usagef("--listen: %q: expected a port from 0 to 65535", s)
	}
	if host == "" {
		return &net.TCPAddr{Port: int(n)}, nil
	}
	ips, err := net.DefaultResolver.LookupIPAddr(ctx, host)
	if err != nil {
		return nil, fmt.Errorf("--listen: %w", err)
	}
	return &net.TCPAddr{IP: ips[0].IP, Zone: ips[0].Zone, Port: int(n)}, nil
}

// userID returns the number of the user name.
func userID(name string) (int, error) {
	if u, err := user.Lookup(name); err == nil {
		name = u.Uid
	}
	uid, err := strconv.ParseUint(name, 10, 32)
	if err != nil {
		return 0, usagef("--allow-uid: no user %q", name)
	}
	return int(uid), nil
}

// groupID returns the number of the group name, or -1 where it is empty.
func groupID(name string) (int, error) {
	if name == "" {
		return -1, nil
	}
	if g, err := user.LookupGroup(name); err == nil {
		name = g.Gid
	}
	gid, err := strconv.ParseUint(name, 10, 31)
	if err != nil {
		return 0, usagef("--socket-group: no group %q", name)
	}
	return int(gid), nil
}
