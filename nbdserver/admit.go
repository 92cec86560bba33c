package nbdserver

import (
	"fmt"
	"net"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"
)

// mayEnter returns why the peer of c must not be served, or nil.
func (s *Server) mayEnter(c net.Conn) error {
	switch c := c.(type) {
	case *net.UnixConn:
		return s.mayEnterUnix(c)
	case *net.TCPConn:
		return s.mayEnterTCP(c)
	}
	return nil
}

func (s *Server) mayEnterUnix(c *net.UnixConn) error {
	if len(s.cfg.AllowUIDs) == 0 {
		return nil
	}
	cred, err := peerCred(c)
	if err != nil {
		return fmt.Errorf("its user is not known: %w", err)
	}
	if !slices.Contains(s.cfg.AllowUIDs, int(cred.Uid)) {
		return fmt.Errorf("user id %d is not allowed", cred.Uid)
	}
	return nil
}

func (s *Server) mayEnterTCP(c *net.TCPConn) error {
	if len(s.cfg.AllowNets) == 0 {
		return nil
	}
	peer, err := netip.ParseAddrPort(c.RemoteAddr().String())
	if err != nil {
		return fmt.Errorf("its address is not known: %w", err)
	}
	addr := peer.Addr().Unmap().WithZone("")
	for _, p := range s.cfg.AllowNets {
		if p.Contains(addr) {
			return nil
		}
	}
	return fmt.Errorf("address %v is not allowed", addr)
}

func peerCred(c *net.UnixConn) (*unix.Ucred, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	var cred *unix.Ucred
	var credErr error
	err = raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	})
	if err != nil {
		return nil, err
	}
	return cred, credErr
}

// peerName says in a message who is at the other end of c.
func peerName(c net.Conn) string {
	if c, ok := c.(*net.UnixConn); ok {
		if cred, err := peerCred(c); err == nil {
			return fmt.Sprintf("process %d of user %d", cred.Pid, cred.Uid)
		}
	}
	if a := c.RemoteAddr(); a != nil {
		return a.String()
	}
	return "an unnamed peer"
}
