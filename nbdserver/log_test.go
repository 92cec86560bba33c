package nbdserver

import (
	"testing"
	"time"
)

func TestLogIsLimited(t *testing.T) {
	var l limitedLog
	now := time.Now()
	told := 0
	for range 3 * logBurst {
		if tell, leftOut := l.count(now); tell {
			told++
		} else if leftOut != 0 {
			t.Errorf("%d left out before the second is over", leftOut)
		}
	}
	if told != logBurst {
		t.Errorf("%d messages told in a second, expected %d", told, logBurst)
	}
	if tell, leftOut := l.count(now.Add(time.Second)); !tell || leftOut != 2*logBurst {
		t.Errorf("a second later: told %v and %d left out, expected true and %d", tell, leftOut, 2*logBurst)
	}
}
