package nbdserver

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"sync/atomic"
)

// Certificates are what the server shows and asks for in TLS, from PEM files
// that can be read again while it runs.
type Certificates struct {
	certFile, keyFile, caFile string
	config                    atomic.Pointer[tls.Config]
}

// LoadCertificates reads the server's certificate and its key. With caFile
// every client has to show a certificate that one of those in it has signed;
// without, any client may come.
func LoadCertificates(certFile, keyFile, caFile string) (*Certificates, error) {
	c := &Certificates{certFile: certFile, keyFile: keyFile, caFile: caFile}
	if err := c.Reload(); err != nil {
		return nil, err
	}
	return c, nil
}

// Reload reads the files again. Connections that begin TLS from now on use
// what they hold; after an error, what was there before stays in use.
func (c *Certificates) Reload() error {
	cert, err := tls.LoadX509KeyPair(c.certFile, c.keyFile)
	if err != nil {
		return fmt.Errorf("TLS certificate %s with key %s: %w", c.certFile, c.keyFile, err)
	}
	config := &tls.Config{
		Certificates: []tls.Certificate{cert},
		MinVersion:   tls.VersionTLS12,
	}
	if c.caFile != "" {
		pem, err := os.ReadFile(c.caFile)
		if err != nil {
			return fmt.Errorf("TLS authority: %w", err)
		}
		authorities := x509.NewCertPool()
		if !authorities.AppendCertsFromPEM(pem) {
			return fmt.Errorf("TLS authority %s: no certificate in it, expected PEM", c.caFile)
		}
		// With the authorities' names in the request, as ClientCAs has them, GnuTLS
		// 3.7 finds that no RSA certificate will do for TLS 1.3, and shows none.
		config.ClientAuth = tls.RequireAnyClientCert
		config.VerifyConnection = func(s tls.ConnectionState) error { return verifyClient(&s, authorities) }
	}
	c.config.Store(config)
	return nil
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
