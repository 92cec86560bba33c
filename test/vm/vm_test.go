package vm

import (
	"context"
	"errors"
	"os"
	"testing"
	"time"
)

// Limits of a guest's life. A machine on which the kernel does not come up in
// bootLimit is too slow to say anything by it.
const (
	bootLimit  = 150 * time.Second
	guestLimit = 240 * time.Second
)

// boot starts a guest and waits until its script runs. It skips the test, by
// name, where the machine cannot have a guest's kernel or is too slow for one.
func boot(t *testing.T, ctx context.Context, o Options) *Machine {
	t.Helper()
	img, err := Prepare(ctx)
	if errors.Is(err, ErrUnavailable) || err != nil && os.Geteuid() != 0 {
		t.Skipf("%v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	o.Dir = t.TempDir()
	m, err := img.Boot(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Cut)
	if !m.WaitReady(bootLimit) {
		m.Cut()
		t.Skipf("machine too slow to boot a guest: not up after %v; console:\n%s", bootLimit, m.Console())
	}
	return m
}
