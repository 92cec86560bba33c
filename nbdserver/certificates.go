package nbdserver

import (
	"crypto/tls"
	"crypto/x509"
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
		config.ClientCAs = x509.NewCertPool()
		if !config.ClientCAs.AppendCertsFromPEM(pem) {
			return fmt.Errorf("TLS authority %s: no certificate in it, expected PEM", c.caFile)
		}
		config.ClientAuth = tls.RequireAndVerifyClientCert
	}
	c.config.Store(config)
	return nil
}

// Config returns what was read last: it is a Config.TLSConfig.
func (c *Certificates) Config() (*tls.Config, error) { return c.config.Load(), nil }
