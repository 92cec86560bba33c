package nbdclient

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"
)

// An Authority signs certificates for tests.
type Authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  []byte
}

// NewAuthority makes an authority that lives for two days.
func NewAuthority() (*Authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test authority"},
		NotBefore: time.Now().Add(-24 * time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	return &Authority{cert, key, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})}, nil
}

// issue returns the PEM of a certificate for the public half of private, name and
// 127.0.0.1 that ends at a time, and that of the key.
func (a *Authority) issue(private crypto.Signer, name string, until time.Time, usage x509.ExtKeyUsage) (cert, key []byte, err error) {
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name},
		DNSNames: []string{name}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-12 * time.Hour), NotAfter: until,
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{usage},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, private.Public(), a.key)
	if err != nil {
		return nil, nil, err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return nil, nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}), nil
}

// WriteServer puts ca-cert.pem, and server-cert.pem and server-key.pem for the
// host name, into dir: the names that nbd-client, nbdkit and qemu share.
func (a *Authority) WriteServer(dir, host string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	return a.write(dir, "server", key, host, time.Now().Add(12*time.Hour), x509.ExtKeyUsageServerAuth)
}

// WriteClient is WriteServer for client-cert.pem and client-key.pem, of a
// certificate that ends at a time. Its key is RSA, as most tools make them.
func (a *Authority) WriteClient(dir string, until time.Time) error {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return err
	}
	return a.write(dir, "client", key, "client", until, x509.ExtKeyUsageClientAuth)
}

// WriteAuthority puts ca-cert.pem alone into dir.
func (a *Authority) WriteAuthority(dir string) error {
	return os.WriteFile(filepath.Join(dir, "ca-cert.pem"), a.pem, 0o600)
}

func (a *Authority) write(dir, role string, private crypto.Signer, name string, until time.Time, usage x509.ExtKeyUsage) error {
	cert, key, err := a.issue(private, name, until, usage)
	if err != nil {
		return err
	}
	if err := a.WriteAuthority(dir); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, role+"-cert.pem"), cert, 0o600); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, role+"-key.pem"), key, 0o600)
}

// Client returns the configuration of a client that expects host, with a
// certificate that ends at a time.
func (a *Authority) Client(host string, until time.Time) (*tls.Config, error) {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	certPEM, keyPEM, err := a.issue(private, "client", until, x509.ExtKeyUsageClientAuth)
	if err != nil {
		return nil, err
	}
	cert, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	roots.AddCert(a.cert)
	return &tls.Config{ServerName: host, RootCAs: roots, Certificates: []tls.Certificate{cert}}, nil
}
