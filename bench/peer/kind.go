package peer

import (
	"fmt"
	"os"
	"path/filepath"
)

// A Family is what targets are set against: of several variants of a family
// the best counts.
type Family string

// The families.
const (
	Cowdev    Family = "cowdev"
	Qemu      Family = "qemu-nbd"
	Nbdkit    Family = "nbdkit cow"
	NbdServer Family = "nbd-server"
	NoOverlay Family = "nbdkit file" // serves the base itself, read-only
	Limit     Family = "limit"
	Disk      Family = "disk" // no server: the disk's own best synced append
)

// Files are what a server works on.
type Files struct {
	Dir     string // the server's own, empty at first
	Base    string
	Overlay string // in Dir
	Socket  string // in Dir
}

// A Kind is one way to run one server.
type Kind struct {
	Name   string
	Family Family
	Create func(Files) []string // the command that makes the overlay; nil where there is none to make
	Serve  func(Files) []string
	Merge  func(Files) []string // brings the overlay into the base; nil where that cannot be done

	Forgets  bool // the overlay ends with the server, and FLUSH syncs nothing
	PerConn  bool // each connection has an overlay of its own
	ReadOnly bool
	Fake     bool // answers with wrong bytes

	configure func(Files) error // what Serve needs beside the command line
	daemon    bool              // forks, and writes its pid beside the socket
}

// Tools are the programs of ours that are measured.
type Tools struct {
	Cowdev string
	Self   string // this benchmark, which is also the limit server
}

// Kinds returns every server.
func Kinds(t Tools) []Kind {
	return []Kind{
		{
			Name: "cowdev", Family: Cowdev,
			Create: func(f Files) []string { return []string{t.Cowdev, "create", f.Base, f.Overlay} },
			Serve: func(f Files) []string {
				return []string{t.Cowdev, "serve", f.Base, f.Overlay, "--socket", f.Socket}
			},
			Merge: func(f Files) []string { return []string{t.Cowdev, "merge", "--quiet", f.Base, f.Overlay} },
		},
		qemu("qemu", "", "--cache=writeback"),
		qemu("qemu-ext-uring", "extended_l2=on,cluster_size=128k", "--cache=writeback", "--aio=io_uring"),
		qemu("qemu-none-native", "", "--cache=none", "--aio=native"),
		nbdkitCow("nbdkit-64k", "64K"),
		nbdkitCow("nbdkit-4k", "4K"),
		{
			Name: "nbdkit-file", Family: NoOverlay, ReadOnly: true,
			Serve: func(f Files) []string {
				return []string{"nbdkit", "--foreground", "--readonly", "--unix", f.Socket, "file", f.Base}
			},
		},
		{
			Name: "nbd-server", Family: NbdServer, PerConn: true, Forgets: true, daemon: true,
			configure: configureNbdServer,
			Serve: func(f Files) []string {
				return []string{"nbd-server", "-C", nbdServerConfig(f), "-p", pidFile(f)}
			},
		},
		{
			Name: "limit", Family: Limit, Forgets: true, Fake: true,
			Serve: func(f Files) []string { return []string{t.Self, "limit", f.Socket, f.Base} },
		},
	}
}

func qemu(name, options string, flags ...string) Kind {
	return Kind{
		Name: name, Family: Qemu,
		Create: func(f Files) []string {
			cmd := []string{"qemu-img", "create", "-q", "-f", "qcow2", "-b", f.Base, "-F", "raw"}
			if options != "" {
				cmd = append(cmd, "-o", options)
			}
			return append(cmd, f.Overlay)
		},
		Serve: func(f Files) []string {
			cmd := append([]string{"qemu-nbd", "--persistent", "--shared=16", "--format=qcow2", "--discard=unmap"}, flags...)
			return append(cmd, "--socket="+f.Socket, f.Overlay)
		},
		Merge: func(f Files) []string { return []string{"qemu-img", "commit", "-q", "-d", f.Overlay} },
	}
}

// nbdkitCow keeps its overlay in an unnamed file in TMPDIR, which is Files.Dir
// for every server.
func nbdkitCow(name, block string) Kind {
	return Kind{
		Name: name, Family: Nbdkit, Forgets: true,
		Serve: func(f Files) []string {
			return []string{"nbdkit", "--foreground", "--unix", f.Socket, "--filter=cow", "file", f.Base, "cow-block-size=" + block}
		},
	}
}

func nbdServerConfig(f Files) string { return filepath.Join(f.Dir, "nbd-server.conf") }

func pidFile(f Files) string { return filepath.Join(f.Dir, "pid") }

// configureNbdServer names the export after the empty name of the others'.
func configureNbdServer(f Files) error {
	config := fmt.Sprintf("[generic]\n\tunixsock = %s\n\tlistenaddr = 127.0.0.1\n\tport = %d\n"+
		"[base]\n\texportname = %s\n\tcopyonwrite = true\n\tcowdir = %s\n\tflush = true\n\ttimeout = 600\n", f.Socket, 20000+os.Getpid()%10000, f.Base, f.Dir)
	return os.WriteFile(nbdServerConfig(f), []byte(config), 0o644)
}

// Export returns the name of the export that the kind serves.
func (k *Kind) Export() string {
	if k.Family == NbdServer {
		return "base"
	}
	return ""
}
