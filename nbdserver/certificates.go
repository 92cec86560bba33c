package nbdserver

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync/atomic"
)

// CertificateFiles are the paths of PEM files: the server's certificate, its key
// and, unless any client may come, the authorities: every client has to show a
// certificate that one of these has signed.
type CertificateFiles struct {
	Cert, Key, CA string
	MayLackCA     bool // any client may come until there is a file CA
}

// CertificatesIn returns the files of dir, by the names that nbd-client, nbdkit
// and qemu share: server-cert.pem, server-key.pem and perhaps ca-cert.pem.
func CertificatesIn(dir string) CertificateFiles {
	return CertificateFiles{
		Cert:      filepath.Join(dir, "server-cert.pem"),
		Key:       filepath.Join(dir, "server-key.pem"),
		CA:        filepath.Join(dir, "ca-cert.pem"),
		MayLackCA: true,
	}
}

// Certificates are what the server shows and asks for in TLS, from files that
// can be read again while it runs.
type Certificates struct {
	files  CertificateFiles // CA may be lacking until it has been there
	config atomic.Pointer[tls.Config]
}

// Load reads the files.
func (f CertificateFiles) Load() (*Certificates, error) {
	c := &Certificates{files: f}
	if err := c.Reload(); err != nil {
		return nil, err
	}
	return c, nil
}

// Reload reads the files again. Connections that begin TLS from now on use
// what they hold; after an error, what was there before stays in use. One
// goroutine at a time may call it.
func (c *Certificates) Reload() error {
	cert, err := tls.LoadX509KeyPair(c.files.Cert, c.files.Key)
	if err != nil {
		return fmt.Errorf("TLS certificate %s with key %s: %w", c.files.Cert, c.files.Key, err)
	}
	config := &tls.Config{
		Certificates: []tls.Certificate{cert},
		MinVersion:   tls.VersionTLS12,
	}
	authorities, err := c.authorities()
	if err != nil {
		return err
	}
	if authorities != nil {
		c.files.MayLackCA = false // a client that had to show a certificate always has to
		// With the authorities' names in the request, as ClientCAs has them, GnuTLS
		// 3.7 finds that no RSA certificate will do for TLS 1.3, and shows none.
		config.ClientAuth = tls.RequireAnyClientCert
		config.VerifyConnection = func(s tls.ConnectionState) error { return verifyClient(&s, authorities) }
	}
	c.config.Store(config)
	return nil
}

// authorities returns who signs clients' certificates, or nil if clients need none.
func (c *Certificates) authorities() (*x509.CertPool, error) {
	if c.files.CA == "" {
		return nil, nil
	}
	pem, err := os.ReadFile(c.files.CA)
	if c.files.MayLackCA && errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("TLS authority: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("TLS authority %s: no certificate in it, expected PEM", c.files.CA)
	}
	return pool, nil
}

// verifyClient returns why the client's certificate is not one that authorities
// have signed for clients, or nil.
func verifyClient(s *tls.ConnectionState, authorities *x509.CertPool) error {
	if len(s.PeerCertificates) == 0 {
		return errors.New("the client has shown no certificate")
	}
	between := x509.NewCertPool()
	for _, cert := range s.PeerCertificates[1:] {
		between.AddCert(cert)
	}
	_, err := s.PeerCertificates[0].Verify(x509.VerifyOptions{
		Roots:         authorities,
		Intermediates: between,
		KeyUsages:     []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
	if err != nil {
		return fmt.Errorf("the client's certificate: %w", err)
	}
	return nil
}

// Config returns what was read last: it is a Config.TLSConfig.
func (c *Certificates) Config() (*tls.Config, error) { return c.config.Load(), nil }
