package main

// What scripts need of the system besides files:
//
//	loop FILE NAME     attach FILE to a loop device and put its path into $NAME
//	mount ARGS... DIR  mount, until the script ends
//	taken NAME         listen on a TCP port, and put the address into $NAME
//	certs DIR          make DIR with a server's certificate and key
//
// The first two skip the script, by name, where this machine cannot do it.

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

// system runs a command of the system, bounded in time.
func system(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	out, err := exec.CommandContext(ctx, args[0], args[1:]...).CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

// skip ends the script as a skipped test.
func skip(ts *testscript.TestScript, format string, args ...any) {
	ts.Logf("skipped: "+format, args...)
	ts.Value("t").(testscript.T).Skip()
}

func scriptLoop(ts *testscript.TestScript, neg bool, args []string) {
	scriptUsage(ts, !neg && len(args) == 2, "loop FILE NAME")
	if os.Geteuid() != 0 {
		skip(ts, "loop devices need root")
	}
	var dev string
	var err error
	for try := 0; try < 20; try++ {
		// Another process may take the free one first.
		if dev, err = system("losetup", "--find", "--show", ts.MkAbs(args[0])); err == nil {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	if err != nil {
		skip(ts, "no loop device: %v: %s", err, dev)
	}
	ts.Defer(func() {
		if out, err := system("losetup", "--detach", dev); err != nil {
			ts.Logf("losetup --detach %s: %v: %s", dev, err, out)
		}
	})
	ts.Setenv(args[1], dev)
}

func scriptMount(ts *testscript.TestScript, neg bool, args []string) {
	scriptUsage(ts, !neg && len(args) >= 2, "mount ARGS... DIR")
	if os.Geteuid() != 0 {
		skip(ts, "mounting needs root")
	}
	dir := ts.MkAbs(args[len(args)-1])
	args = append([]string{"mount"}, append(args[:len(args)-1], dir)...)
	if out, err := system(args...); err != nil {
		skip(ts, "%s: %v: %s", strings.Join(args, " "), err, out)
	}
	ts.Defer(func() {
		if out, err := system("umount", "--lazy", dir); err != nil {
			ts.Logf("umount %s: %v: %s", dir, err, out)
		}
	})
}

// scriptTaken listens on a port, until the script ends, and puts the address
// into $NAME.
func scriptTaken(ts *testscript.TestScript, neg bool, args []string) {
	scriptUsage(ts, !neg && len(args) == 1, "taken NAME")
	l, err := net.Listen("tcp", "127.0.0.1:0")
	ts.Check(err)
	ts.Defer(func() { l.Close() })
	ts.Setenv(args[0], l.Addr().String())
}

// scriptCerts makes a directory with a self-signed server certificate.
func scriptCerts(ts *testscript.TestScript, neg bool, args []string) {
	scriptUsage(ts, !neg && len(args) == 1, "certs DIR")
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	ts.Check(err)
	cert := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "localhost"}, DNSNames: []string{"localhost"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	certDER, err := x509.CreateCertificate(rand.Reader, cert, cert, key.Public(), key)
	ts.Check(err)
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	ts.Check(err)
	dir := ts.MkAbs(args[0])
	ts.Check(os.MkdirAll(dir, 0o700))
	for name, block := range map[string]*pem.Block{
		"server-cert.pem": {Type: "CERTIFICATE", Bytes: certDER},
		"server-key.pem":  {Type: "PRIVATE KEY", Bytes: keyDER},
	} {
		ts.Check(os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(block), 0o600))
	}
}
