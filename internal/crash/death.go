package crash

import (
	"fmt"
	"runtime"

	"github.com/cowdev/cowdev/exception"
	"github.com/cowdev/cowdev/internal/disktest"
)

// after is what a death leaves for the next process.
type after struct {
	file *disktest.File
	mem  exception.Memory
	cut  Death // what happened
	rule Death // what must be found: after the death of a process whose memory is lost, no more than after a power cut
}

// step is told of every phase of every file operation of the session.
func (w *world) step(op disktest.Op, phase disktest.Phase) {
	w.oracle.While(func() {
		if w.dead != nil || w.failed != nil {
			return
		}
		if phase == disktest.Begin {
			w.stats.Ops[op.Kind]++
		}
		if op.Kind != disktest.Read {
			w.note("  file %v, %v", op, phase)
			if w.rng.IntN(w.cfg.Probes) == 0 {
				w.stats.Died[op.Kind]++
				w.violated(w.probe())
			}
		}
		if w.left--; w.left == 0 && w.failed == nil {
			w.died = w.died || w.decided()
			w.die(w.death)
		}
	})
	if w.cfg.Clients > 1 {
		for n := w.yields(op); n > 0; n-- {
			runtime.Gosched()
		}
	}
}

// yields returns how often others are let run in the middle of op. Some reads
// take so long that a slot they look at could be given away meanwhile.
func (w *world) yields(op disktest.Op) (n int) {
	w.oracle.While(func() {
		n = w.rng.IntN(4)
		if op.Kind == disktest.Read && w.rng.IntN(6) == 0 {
			n = w.rng.IntN(1000)
		}
	})
	return n
}

// violated records the first violation. The file is taken away from the
// session, so that the clients end soon.
func (w *world) violated(err error) {
	if err == nil || w.failed != nil {
		return
	}
	w.note("VIOLATION: %v", err)
	w.failed = err
	w.file.Kill(nil)
}

// die ends the session in the middle of what it does.
func (w *world) die(d Death) {
	w.note("%v", d)
	if d == Process {
		w.stats.Kills++
	}
	w.dead = w.cut(d, true)
	w.oracle.Die()
}

// cut returns what a death at this moment leaves; the session goes on unless
// for real.
func (w *world) cut(d Death, real bool) *after {
	if w.broken && !w.session.Broken() {
		// A sync has failed, and the store may not know yet: a process that
		// dies now leaves no word of it, and none could do better.
		d = Power
	}
	a := &after{cut: d, rule: d}
	if d == Power {
		a.file, a.mem = w.file.Crash(w.rng), NewMemory()
		if real {
			w.file.Kill(nil)
			a.mem = w.cfg.Host.NewMemory()
		}
		return a
	}
	if real {
		a.file = w.file.Kill(func() { a.mem = w.session.Die() })
	} else {
		a.file = w.file.Fork(func() { a.mem = w.session.Memory() })
	}
	if w.session.Broken() { // and said so: it is not taken over
		a.rule = Power
	}
	if m, ok := a.mem.(*Memory); ok && !m.Lasts() {
		a.rule = Power
	}
	if w.broken { // what is in the page cache is not what is on the disk
		a.rule = Power
		if w.rng.IntN(2) == 0 {
			a.file.DropCache(0, 0)
		}
	}
	if w.rng.IntN(4) == 0 { // the memory is lost, or could not be had
		a.mem, a.rule = NewMemory(), Power
		if real {
			a.mem = w.cfg.Host.NewMemory()
		}
	}
	return a
}

// probe looks at a death on a copy.
func (w *world) probe() error {
	d := Power
	if w.rng.IntN(3) == 0 && canCopy(w.mem) {
		d = Process
		w.stats.Kills++
	}
	if err := w.look(w.cut(d, false), w.rng.IntN(8) == 0); err != nil {
		return fmt.Errorf("%v on a copy: %w", d, err)
	}
	return nil
}

// end closes the store in order, unless the session has died or is to die now,
// and finds out what the next session begins with.
func (w *world) end() error {
	closes := false
	w.oracle.While(func() { // what it began in the background may still run
		closes = w.dead == nil && (w.decided() || w.rng.IntN(2) == 0)
		if closes && !w.decided() && w.rng.IntN(3) == 0 {
			w.left = 1 + w.rng.IntN(60) // the death comes while it closes
		}
	})
	if closes {
		w.note("close")
		flush := w.oracle.Flush()
		err := w.session.Close()
		w.note("close -> %v", err)
		w.oracle.While(func() {
			if w.dead == nil && err != nil {
				w.violated(w.unexpected(err))
			}
		})
		if err == nil && w.began {
			flush.Done(nil)
		}
	}
	w.oracle.While(func() {
		if w.dead == nil && w.failed == nil {
			w.die(w.death)
		}
	})
	w.session.Bury()
	w.file.OnStep, w.file.Inject = nil, nil
	if w.failed != nil {
		return w.failed
	}
	return w.find(w.dead)
}

// find looks at what a death left, twice, since a process may die again before
// it has changed anything (6), and tells the oracle what it is.
func (w *world) find(a *after) error {
	o, err := w.take(a.file.Fork(nil), a.mem, false)
	if err == nil {
		defer w.reuse(o.p)
		o.store.Abandon()
		err = w.oracle.Check(o.p, a.rule)
	}
	if err != nil {
		return fmt.Errorf("%v: %w", a.cut, err)
	}
	again, err := w.take(o.file.Kill(nil), a.mem, false)
	if err == nil {
		defer w.reuse(again.p)
		again.store.Abandon()
		err = NewOracle(o.p).Check(again.p, Power)
	}
	if err != nil {
		return fmt.Errorf("%v, opened a second time: %w", a.cut, err)
	}
	w.oracle.Found(o.p, a.cut)
	w.file, w.mem = again.file.Kill(nil), a.mem
	return nil
}
