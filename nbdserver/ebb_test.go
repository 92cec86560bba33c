package nbdserver

import "testing"

// As many as ever is all that a client has under way; that is forgotten as
// fewer come.
func TestEbb(t *testing.T) {
	var e ebb
	for _, n := range []int{1, 16, 16, 17} {
		if !e.reached(n) {
			t.Errorf("%d, as many as any before, are not all", n)
		}
	}
	for i := range 64 {
		if e.reached(16) {
			t.Fatalf("16 after 17 are all, the time %d", i+1)
		}
	}
	if !e.reached(16) {
		t.Error("16 are not all, long after 17")
	}
}
