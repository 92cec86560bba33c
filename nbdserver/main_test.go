package nbdserver_test

import (
	"os"
	"testing"

	"go.uber.org/goleak"
)

// The tests' binary is also the server that is attacked and the attackers, and no
// test may leave a goroutine behind.
func TestMain(m *testing.M) {
	if os.Getenv(victimEnv) != "" {
		victim()
		return
	}
	if os.Getenv(attackEnv) != "" {
		attackServer()
		return
	}
	goleak.VerifyTestMain(m)
}
