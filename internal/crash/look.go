package crash

import (
	"errors"
	"fmt"
	"sync"
	"syscall"

	"github.com/cowdev/cowdev/cow"
	"github.com/cowdev/cowdev/exception"
	"github.com/cowdev/cowdev/internal/disktest"
)

// opened is a store that was opened after a death, on a copy of its file.
type opened struct {
	file  *disktest.File
	mem   exception.Memory
	store *exception.Store
	dev   *cow.Device
	p     []byte // what the device read as
}

// take opens the store in f, which nobody else uses, and reads all of its
// device. Nothing may be written by that (6).
func (w *world) take(f *disktest.File, m exception.Memory, readOnly bool) (*opened, error) {
	w.stats.States++
	o := &opened{file: f, mem: m, p: w.buffer()}
	var wrote error
	f.OnStep = func(op disktest.Op, _ disktest.Phase) {
		if op.Kind != disktest.Read {
			wrote = fmt.Errorf("opening and reading it does this to the file: %v", op)
		}
	}
	var err error
	if o.store, o.dev, err = open(w.base, f, exception.Options{Memory: m, ReadOnly: readOnly}); err != nil {
		return nil, err
	}
	if _, err = o.dev.ReadAt(o.p, 0); err == nil {
		err = wrote
	}
	f.OnStep = nil
	if err != nil {
		w.leave(o)
		return nil, err
	}
	return o, nil
}

// leave ends the use of what take returned, o.p too.
func (w *world) leave(o *opened) {
	o.store.Abandon()
	w.reuse(o.p)
}

func (w *world) reuse(p []byte) { w.buffers = append(w.buffers, p) }

// buffer returns a buffer of the device's size.
func (w *world) buffer() []byte {
	if n := len(w.buffers); n > 0 {
		p := w.buffers[n-1]
		w.buffers = w.buffers[:n-1]
		return p
	}
	return make([]byte, w.geo.Size)
}

// look opens what a death left and compares it with the oracle. It may go on
// through the recovery, and look at deaths in the middle of that.
func (w *world) look(a *after, through bool) error {
	readOnly := !through && a.rule == Power && w.rng.IntN(2) == 0
	check := !through && w.rng.IntN(4) == 0
	f := a.file
	if check {
		f = f.Fork(nil)
	}
	o, err := w.take(f, a.mem, readOnly)
	if err != nil {
		return err
	}
	defer w.leave(o)
	if err := w.oracle.Check(o.p, a.rule); err != nil {
		return err
	}
	switch {
	case through:
		return w.recovery(o)
	case check:
		w.stats.Checked++
		return clean(a.file)
	}
	return nil
}

// clean returns an error if Check finds harm in the store in f.
func clean(f *disktest.File) error {
	r, err := exception.Check(f)
	if err != nil {
		return fmt.Errorf("check: %w", err)
	}
	for _, p := range r.Problems {
		if p.Harm {
			return fmt.Errorf("check: %s", p.What)
		}
	}
	return nil
}

// recovery lets the store end its recovery, and dies in the middle of it.
// Another process must find what this one found; so must the next boot, if all
// of it is on the disk already, or once the recovery has ended. Until then it
// finds what it would have found without this recovery.
func (w *world) recovery(o *opened) error {
	found := NewOracle(o.p)
	onDisk := o.file.Pending() == 0 && !o.store.Adopted()
	var (
		mu  sync.Mutex // a checkpoint may run beside the rest
		bad error
	)
	o.file.OnStep = func(op disktest.Op, phase disktest.Phase) {
		mu.Lock()
		defer mu.Unlock()
		if op.Kind == disktest.Read || bad != nil || w.rng.IntN(2) == 0 {
			return
		}
		var err error
		w.stats.Recovery++
		w.stats.Died[op.Kind]++
		switch {
		case w.rng.IntN(3) == 0 && canCopy(o.mem):
			w.stats.Kills++
			var m exception.Memory
			f := o.file.Fork(func() { m = o.mem.(*Memory).Copy() })
			err = w.compare(found, f, m, Process)
		case onDisk:
			err = w.compare(found, o.file.Crash(w.rng), NewMemory(), Power)
		default:
			err = w.compare(w.oracle, o.file.Crash(w.rng), NewMemory(), Power)
		}
		if err != nil {
			bad = fmt.Errorf("death during recovery, in %v, %v: %w", op, phase, err)
		}
	}
	err := o.dev.Flush()
	o.store.Abandon()
	o.file.OnStep = nil
	if bad != nil || err != nil && !errors.Is(err, syscall.ENOSPC) {
		return errors.Join(bad, err)
	}
	if err == nil {
		w.stats.Recovered++
		if err = w.compare(found, o.file.Crash(w.rng), NewMemory(), Power); err != nil {
			return fmt.Errorf("power cut after a recovery: %w", err)
		}
	}
	return nil
}

// canCopy reports whether m can be looked at while it is used.
func canCopy(m exception.Memory) bool {
	_, ok := m.(*Memory)
	return ok
}

// compare opens the store in f, which nobody else uses, and compares its device
// with an oracle.
func (w *world) compare(with *Oracle, f *disktest.File, m exception.Memory, rule Death) error {
	o, err := w.take(f, m, false)
	if err != nil {
		return err
	}
	defer w.leave(o)
	return with.Check(o.p, rule)
}
