package nbdserver_test

import (
	"bytes"
	"crypto/tls"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/cowdev/cowdev/block"
	"github.com/cowdev/cowdev/internal/nbd"
	"github.com/cowdev/cowdev/internal/nbdclient"
	"github.com/cowdev/cowdev/nbdserver"
)

func newAuthority(t *testing.T) *nbdclient.Authority {
	a, err := nbdclient.NewAuthority()
	check(t, err)
	return a
}

// clientTLS returns what a client whose certificate ends at a time needs.
func clientTLS(t *testing.T, a *nbdclient.Authority, until time.Time) *tls.Config {
	conf, err := a.Client("server", until)
	check(t, err)
	return conf
}

// serveTLS serves dev in a mode and returns what has signed the certificates.
func serveTLS(t *testing.T, mode nbdserver.TLSMode, dev block.Device) (*rig, *nbdclient.Authority, *nbdserver.Certificates, string) {
	a, dir := newAuthority(t), t.TempDir()
	check(t, a.WriteServer(dir, "server"))
	certs, err := nbdserver.CertificatesIn(dir).Load()
	check(t, err)
	r := serve(t, nbdserver.Config{Exports: []nbdserver.Export{{Device: dev}}, TLS: mode, TLSConfig: certs.Config})
	return r, a, certs, dir
}

func TestTLSAgainstModel(t *testing.T) {
	for name, prepare := range map[string]func(*memDevice) block.Device{
		"viewed": func(d *memDevice) block.Device { return d },
		"cold":   func(d *memDevice) block.Device { d.cold = func(int64, int64) bool { return true }; return d },
	} {
		t.Run(name, func(t *testing.T) {
			dev := newMemDevice(testSize)
			model := bytes.Clone(dev.data)
			r, a, _, _ := serveTLS(t, nbdserver.TLSRequire, prepare(dev))
			c := r.greet()
			check(t, c.StartTLS(clientTLS(t, a, time.Now().Add(time.Hour))))
			check(t, c.StructuredReplies())
			check(t, c.Go(""))
			compareWithModel(t, c, model)
			check(t, c.Send(c.Encode(req{Type: nbd.CmdDisc})))
			expectEnd(t, c) // with a close_notify, or this were an error
		})
	}
}

// Replies that a client is slow to take are not lost where it ends its half of
// the TLS session at once.
func TestTLSGoodbye(t *testing.T) {
	dev := newMemDevice(testSize)
	r, a, _, _ := serveTLS(t, nbdserver.TLSRequire, dev)
	nc, err := net.Dial("tcp", r.listen("tcp", "127.0.0.1:0").String())
	check(t, err)
	defer nc.Close()
	c, err := nbdclient.Greet(nc)
	check(t, err)
	check(t, c.StartTLS(clientTLS(t, a, time.Now().Add(time.Hour))))
	check(t, c.Go(""))
	read := req{Type: nbd.CmdRead, Cookie: 1, Length: 1 << 20}
	c.Expect(read)
	check(t, c.Send(c.Encode(read), c.Encode(req{Type: nbd.CmdDisc})))
	check(t, c.Conn.(*tls.Conn).CloseWrite())
	time.Sleep(100 * time.Millisecond) // for a server that closes too early to do so
	m, err := c.Receive()
	check(t, err)
	if !bytes.Equal(m.Payload, dev.data[:read.Length]) {
		t.Error("not the bytes that were there")
	}
	expectEnd(t, c)
}

// Before TLS a server that requires it does nothing else.
func TestTLSRequired(t *testing.T) {
	r, a, _, _ := serveTLS(t, nbdserver.TLSRequire, newMemDevice(testSize))
	c := r.greet()
	for _, code := range []uint32{nbd.OptList, nbd.OptStructuredReply, nbd.OptExtendedHeaders, nbd.OptListMetaContext, nbd.OptSetMetaContext, 99} {
		expectFinal(t, c, nbd.RepErrTLSReqd, code)
	}
	for _, code := range []uint32{nbd.OptInfo, nbd.OptGo} {
		expectFinal(t, c, nbd.RepErrTLSReqd, code, nbdclient.InfoQuery(""))
		expectFinal(t, c, nbd.RepErrTLSReqd, code, nbdclient.InfoQuery("nothere"))
	}
	check(t, c.StartTLS(clientTLS(t, a, time.Now().Add(time.Hour))))
	expectFinal(t, c, nbd.RepErrInvalid, nbd.OptStartTLS)
	stillTalks(t, c)

	c = r.greet()
	check(t, c.SendOption(nbd.OptExportName))
	expectEnd(t, c)
	c = r.greetOld()
	for _, code := range []uint32{nbd.OptList, nbd.OptGo, nbd.OptStartTLS, 99} {
		expectFinal(t, c, nbd.RepErrPolicy, code)
	}
	check(t, c.SendOption(nbd.OptExportName))
	expectEnd(t, c)
	c = r.greet()
	expectFinal(t, c, nbd.RepAck, nbd.OptAbort)
	expectEnd(t, c)
}

func TestTLSOptionErrors(t *testing.T) {
	c := serveDevice(t, newMemDevice(testSize)).greet()
	expectFinal(t, c, nbd.RepErrPolicy, nbd.OptStartTLS)
	stillTalks(t, c)

	r, _, _, _ := serveTLS(t, nbdserver.TLSAllow, newMemDevice(testSize))
	c = r.greet()
	expectFinal(t, c, nbd.RepErrInvalid, nbd.OptStartTLS, []byte("x"))
	stillTalks(t, c) // in plain text, which this server allows

	expectFinal(t, r.greetOld(), nbd.RepErrPolicy, nbd.OptStartTLS) // must be served without TLS
}

// What was agreed on in plain text is forgotten.
func TestTLSForgets(t *testing.T) {
	r, a, _, _ := serveTLS(t, nbdserver.TLSAllow, newMemDevice(testSize))
	c := r.greet()
	check(t, c.StructuredReplies())
	check(t, c.SetMetaContexts("", "base:allocation"))
	check(t, c.StartTLS(clientTLS(t, a, time.Now().Add(time.Hour))))
	check(t, c.Go(""))
	if c.Flags&nbd.FlagSendDF != 0 {
		t.Errorf("flags %#x: structured replies outlived STARTTLS", c.Flags)
	}
	expectError(t, c, nbd.EINVAL, req{Type: nbd.CmdBlockStatus, Length: 512})
}

// Options that a man in the middle put behind STARTTLS in plain text are not
// taken for options that came by TLS.
func TestTLSInjection(t *testing.T) {
	r, _, _, _ := serveTLS(t, nbdserver.TLSAllow, newMemDevice(testSize))
	c := r.greet()
	option := append(nbdclient.Uint64(nbd.OptionMagic), 0, 0, 0, nbd.OptStartTLS, 0, 0, 0, 0)
	injected := append(nbdclient.Uint64(nbd.OptionMagic), 0, 0, 0, nbd.OptList, 0, 0, 0, 0)
	check(t, c.Send(option, injected))
	reply, err := c.OptionReply(nbd.OptStartTLS)
	check(t, err)
	if reply.Type != nbd.RepAck {
		t.Fatalf("reply %#x", reply.Type)
	}
	if reply, err := c.OptionReply(nbd.OptList); err == nil {
		t.Errorf("the injected option was answered: %+v", reply)
	}
}

func TestTLSClientCertificates(t *testing.T) {
	r, a, _, dir := serveTLS(t, nbdserver.TLSRequire, newMemDevice(testSize))
	missing := clientTLS(t, a, time.Now().Add(time.Hour))
	missing.Certificates = nil
	foreign := clientTLS(t, newAuthority(t), time.Now().Add(time.Hour))
	foreign.RootCAs = missing.RootCAs
	server := clientTLS(t, a, time.Now().Add(time.Hour))
	cert, err := tls.LoadX509KeyPair(filepath.Join(dir, "server-cert.pem"), filepath.Join(dir, "server-key.pem"))
	check(t, err)
	server.Certificates = []tls.Certificate{cert}
	old := clientTLS(t, a, time.Now().Add(time.Hour))
	old.MaxVersion = tls.VersionTLS11
	for name, conf := range map[string]*tls.Config{
		"missing": missing,
		"expired": clientTLS(t, a, time.Now().Add(-time.Hour)),
		"foreign": foreign,
		"server":  server,
		"TLS 1.1": old,
	} {
		t.Run(name, func(t *testing.T) {
			c := r.greet()
			err := c.StartTLS(conf)
			if err == nil { // TLS 1.3 tells a client only when it reads
				err = c.Go("")
			}
			if err == nil {
				t.Error("the client was let in")
			}
		})
	}
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		conf := clientTLS(t, a, time.Now().Add(time.Hour))
		conf.MaxVersion = version
		mine := conf.Certificates[0]
		conf.GetClientCertificate = func(asked *tls.CertificateRequestInfo) (*tls.Certificate, error) {
			if len(asked.AcceptableCAs) > 0 {
				t.Error("the server names authorities, of which some clients conclude too much")
			}
			return &mine, nil
		}
		conf.ClientSessionCache = tls.NewLRUClientSessionCache(0)
		for range 2 { // the second time a session is resumed
			c := r.greet()
			check(t, c.StartTLS(conf))
			stillTalks(t, c)
		}
	}
}

// New certificates are for new connections; broken files change nothing.
func TestCertificatesReload(t *testing.T) {
	r, old, certs, dir := serveTLS(t, nbdserver.TLSRequire, newMemDevice(testSize))
	until := time.Now().Add(time.Hour)
	open := r.greet()
	check(t, open.StartTLS(clientTLS(t, old, until)))

	fresh := newAuthority(t)
	check(t, fresh.WriteServer(dir, "server"))
	check(t, certs.Reload())
	c := r.greet()
	check(t, c.StartTLS(clientTLS(t, fresh, until)))
	stillTalks(t, c)
	stillTalks(t, open)
	if err := r.greet().StartTLS(clientTLS(t, old, until)); err == nil {
		t.Error("the new certificate satisfies who trusts the old authority")
	}

	for _, name := range []string{"ca-cert.pem", "server-key.pem"} {
		check(t, os.WriteFile(filepath.Join(dir, name), []byte("garbage"), 0o600))
		if err := certs.Reload(); err == nil {
			t.Errorf("garbage in %s was accepted", name)
		}
	}
	c = r.greet()
	check(t, c.StartTLS(clientTLS(t, fresh, until)))
	stillTalks(t, c)
}

// An authority that comes later is heeded, and one that has been there may not
// go: a server that asked for certificates goes on to.
func TestCertificatesAuthority(t *testing.T) {
	a, dir := newAuthority(t), t.TempDir()
	check(t, a.WriteServer(dir, "server"))
	ca := filepath.Join(dir, "ca-cert.pem")
	check(t, os.Remove(ca))
	named := nbdserver.CertificatesIn(dir)
	named.MayLackCA = false
	if _, err := named.Load(); err == nil {
		t.Error("an authority that is not there was accepted by name")
	}
	certs, err := nbdserver.CertificatesIn(dir).Load()
	check(t, err)
	r := serve(t, nbdserver.Config{
		Exports: []nbdserver.Export{{Device: newMemDevice(testSize)}}, TLS: nbdserver.TLSRequire, TLSConfig: certs.Config})
	letIn := func(certificate bool) error {
		conf := clientTLS(t, a, time.Now().Add(time.Hour))
		if !certificate {
			conf.Certificates = nil
		}
		c := r.greet()
		if err := c.StartTLS(conf); err != nil {
			return err
		}
		return c.Go("")
	}
	check(t, letIn(false))
	check(t, a.WriteAuthority(dir))
	check(t, certs.Reload())
	for range 2 {
		check(t, letIn(true))
		if letIn(false) == nil {
			t.Error("a client without a certificate was let in")
		}
		check(t, os.RemoveAll(ca))
		if certs.Reload() == nil {
			t.Error("the authority is gone, and nothing was said")
		}
	}
}
