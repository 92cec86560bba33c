package cow

import (
	"github.com/cowdev/cowdev/block"
	"github.com/cowdev/cowdev/exception"
)

// maxPieces bounds the pieces of one View.
const maxPieces = 64

// session is a block.Session.
type session struct {
	d   *Device
	pin *exception.Pin
	in  bool
}

// Session returns a session for one goroutine's use.
func (d *Device) Session() block.Session { return &session{d: d, pin: d.store.Pin()} }

// View implements block.Session.
func (s *session) View(vecs [][]byte, off, n int64) ([][]byte, bool) {
	d := s.d
	if !d.Contains(off, n) || d.view == nil {
		return vecs, false
	}
	if !s.in {
		s.pin.Enter()
		s.in = true
	}
	w := walker{d: d, off: off, end: off + n}
	out, ok := vecs, true
	for p, more := w.next(); more && ok; p, more = w.next() {
		switch p.state {
		case block.Zero:
			out = block.AppendZeros(out, p.n)
		case block.Stored:
			if d.opts.View == nil || !d.store.InFile() {
				return vecs, false
			}
			out, ok = d.opts.View.View(out, p.at, p.n)
		default:
			out, ok = d.view.View(out, p.off, p.n)
		}
		if len(out)-len(vecs) > maxPieces {
			ok = false
		}
	}
	if !ok {
		return vecs, false
	}
	return out, true
}

// Done implements block.Session.
func (s *session) Done() {
	if s.in {
		s.pin.Leave()
		s.in = false
	}
}

// Close implements block.Session.
func (s *session) Close() {
	s.in = false
	s.pin.Close()
}
