package nbdserver

import (
	"sync"
	"time"
)

// logBurst is how many messages a second are told: a full disk or a hostile
// client must not fill a log as well.
const logBurst = 20

// limitedLog passes messages on, up to logBurst in a second, and then says how
// many it left out.
type limitedLog struct {
	to func(format string, args ...any)

	mu      sync.Mutex
	second  time.Time // when the current second began
	told    int       // messages in it
	leftOut int
}

func (l *limitedLog) printf(format string, args ...any) {
	if l.to == nil {
		return
	}
	tell, leftOut := l.count(time.Now())
	if leftOut > 0 {
		l.to("%d messages like the last were left out", leftOut)
	}
	if tell {
		l.to(format, args...)
	}
}

// count counts a message at a time. It reports whether to tell it, and how
// many have been left out before and not been told of.
func (l *limitedLog) count(now time.Time) (tell bool, leftOut int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if now.Sub(l.second) >= time.Second {
		l.second, l.told = now, 0
		leftOut, l.leftOut = l.leftOut, 0
	}
	if l.told >= logBurst {
		l.leftOut++
		return false, 0
	}
	l.told++
	return true, leftOut
}
