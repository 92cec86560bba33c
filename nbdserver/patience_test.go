package nbdserver

import (
	"testing"
	"time"
)

// What a client asks in vain costs it nothing at first, then pauses; time pays
// it back.
func TestPatience(t *testing.T) {
	const free = int((credit + leastPause) / requestPrice)
	now := time.Unix(1000, 0)
	var p patience
	for range 2 {
		for i := 1; i < free; i++ {
			if wait := p.spend(requestPrice, now); wait != 0 {
				t.Fatalf("number %d waits %v", i, wait)
			}
		}
		for i := range 3 { // each pauses, if its client goes on all the same
			want := leastPause + time.Duration(i)*requestPrice
			if wait := p.spend(requestPrice, now); wait != want {
				t.Errorf("%d more: waits %v, expected %v", i, wait, want)
			}
		}
		now = now.Add(time.Hour) // pays for all, and for no more than that
	}
	for range int(credit / optionPrice) {
		if wait := p.spend(optionPrice, now); wait != 0 {
			t.Fatalf("an option waits %v", wait)
		}
	}
}
