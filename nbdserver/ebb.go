package nbdserver

// leastSplit is how many WRITEs that came together are worth two answers.
const leastSplit = 8

// An ebb tells when a client waits: what came together is as many as any that
// came lately, so it is likely to be all that the client has under way.
type ebb struct {
	most int // that came together lately
	less int // times that fewer came since
}

// reached says that n, which came together, are as many as any.
func (e *ebb) reached(n int) bool {
	if n >= e.most {
		e.most, e.less = n, 0
		return true
	}
	if e.less++; e.less == 64 {
		e.most, e.less = e.most-1, 0
	}
	return false
}
