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

// Certificates are what the server shows and asks for in TLS, from PEM files
// that can be read again while it runs.
type Certificates struct {
	certFile, keyFile, caFile string
	mayLack                   bool // caFile, until it has been there
	config                    atomic.Pointer[tls.Config]
}

// LoadCertificates reads the server's certificate and its key. With caFile
// every client has to show a certificate that one of those in it has signed;
// without, any client may come.
func LoadCertificates(certFile, keyFile, caFile string) (*Certificates, error) {
	return (&Certificates{certFile: certFile, keyFile: keyFile, caFile: caFile}).loaded()
}

// LoadCertificatesIn is LoadCertificates of server-cert.pem, server-key.pem and
// ca-cert.pem in dir: the names that nbd-client, nbdkit and qemu share. Where
// there is no ca-cert.pem any client may come, until Reload finds one.
func LoadCertificatesIn(dir string) (*Certificates, error) {
	in := func(name string) string { return filepath.Join(dir, name) }
	return (&Certificates{certFile: in("server-cert.pem"), keyFile: in("server-key.pem"), caFile: in("ca-cert.pem"), mayLack: true}).loaded()
}

func (c *Certificates) loaded() (*Certificates, error) {
	if err := c.Reload(); err != nil {
		return nil, err
	}
	return c, nil
}

// Reload reads the files again. Connections that begin TLS from now on use
// what they hold; after an error, what was there before stays in use. One
// goroutine at a time may call it.
func (c *Certificates) Reload() error {
	cert, err := tls.LoadX509KeyPair(c.certFile, c.keyFile)
	if err != nil {
		return fmt.Errorf("TLS certificate %s with key %s: %w", c.certFile, c.keyFile, err)
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
		c.mayLack = false // a client that had to show a certificate always has to
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
	if c.caFile == "" {
		return nil, nil
	}
	pem, err := os.ReadFile(c.caFile)
	if c.mayLack && errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("TLS authority: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("TLS authority %s: no certificate in it, expected PEM", c.caFile)
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
