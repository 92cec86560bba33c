package clients

import (
	"net/url"
	"path/filepath"
	"testing"
	"time"

	"github.com/cowdev/cowdev/internal/nbdclient"
)

// clientDirs makes a directory of certificates for each kind of client. Only
// that of "good" is let in.
func clientDirs(t *testing.T, a *nbdclient.Authority) map[string]string {
	t.Helper()
	other, err := nbdclient.NewAuthority()
	check(t, err)
	dirs := make(map[string]string)
	for name, write := range map[string]func(dir string) error{
		"good":    func(dir string) error { return a.WriteClient(dir, time.Now().Add(time.Hour)) },
		"expired": func(dir string) error { return a.WriteClient(dir, time.Now().Add(-time.Hour)) },
		"foreign": func(dir string) error { return other.WriteClient(dir, time.Now().Add(time.Hour)) },
		"missing": a.WriteAuthority,
	} {
		dirs[name] = t.TempDir()
		check(t, write(dirs[name]))
		check(t, a.WriteAuthority(dirs[name])) // the client trusts the server
	}
	return dirs
}

// serveTLS starts a server that requires TLS on a TCP port.
func serveTLS(t *testing.T) (*served, *nbdclient.Authority) {
	t.Helper()
	a, err := nbdclient.NewAuthority()
	check(t, err)
	dir := t.TempDir()
	check(t, a.WriteServer(dir, "localhost"))
	return serve(t, "--listen", "127.0.0.1:0", "--tls", "require", "--tls-dir", dir), a
}

// libnbd's tools get in with a good certificate only.
func TestTLSLibnbd(t *testing.T) {
	s, a := serveTLS(t)
	u, err := url.Parse(s.uri)
	check(t, err)
	uri := func(scheme, dir string) string {
		return scheme + "://localhost:" + u.Port() + "/?tls-certificates=" + dir
	}
	for name, dir := range clientDirs(t, a) {
		if name != "good" {
			fails(t, "nbdinfo", uri("nbds", dir))
			continue
		}
		run(t, "nbdinfo", uri("nbds", dir))
		out := filepath.Join(t.TempDir(), "out.img")
		run(t, "nbdcopy", uri("nbds", dir), out)
		if digest(t, out) != digest(t, s.base) {
			t.Error("what nbdcopy read by TLS is not the base")
		}
		run(t, "nbdcopy", out, uri("nbds", dir))
	}
	fails(t, "nbdinfo", "nbd://localhost:"+u.Port()) // in plain text
}

// qemu's tools likewise.
func TestTLSQemu(t *testing.T) {
	s, a := serveTLS(t)
	u, err := url.Parse(s.uri)
	check(t, err)
	args := func(dir string, commands ...string) []string {
		return append([]string{"--object", "tls-creds-x509,id=tls,endpoint=client,dir=" + dir, "--image-opts",
			"driver=nbd,host=localhost,port=" + u.Port() + ",tls-creds=tls"}, commands...)
	}
	for name, dir := range clientDirs(t, a) {
		commands := args(dir, "-c", "write -P 4 1M 2M", "-c", "read -P 4 1M 2M", "-c", "read -P 0 14M 1M", "-c", "flush")
		if name == "good" {
			run(t, "qemu-io", commands...)
		} else {
			fails(t, "qemu-io", commands...)
		}
	}
	fails(t, "qemu-io", "-f", "raw", "-c", "read 0 512", "nbd://localhost:"+u.Port())
}
