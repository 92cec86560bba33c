package crash

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync"

	"github.com/cowdev/cowdev/block"
	"github.com/cowdev/cowdev/exception"
	"github.com/cowdev/cowdev/internal/disktest"
)

// Config is the shape of a walk. Its zero fields are chosen by the seed.
type Config struct {
	Seed     uint64
	Sessions int  // how often the store is opened
	Steps    int  // at most, a client and a session
	Clients  int  // how many work at once
	Probes   int  // one file operation's phase in so many is crashed on a copy
	Faults   bool // let operations on the file fail
	Host     Host // nil for a device in this process

	first *fate // of the first session, nil for one that the seed decides
}

// A fate is what will happen to a session, which is closed in order otherwise.
type fate struct {
	left  int   // the phases of file operations until its death; 0 for none
	death Death // how
	fault int   // the number of the operation that fails; 0 for none
}

// Stats counts what a walk has done.
type Stats struct {
	States    int // stores opened after a death, and compared
	Kills     int // of which of the process alone
	Recovery  int // of which in the middle of a recovery
	Sessions  int
	Ops       int // file operations
	Changes   int
	Flushes   int
	Faults    int
	FullDisks int
	Broken    int // sessions that a failed sync ended
}

// Add adds other to s.
func (s *Stats) Add(other Stats) {
	s.States += other.States
	s.Kills += other.Kills
	s.Recovery += other.Recovery
	s.Sessions += other.Sessions
	s.Ops += other.Ops
	s.Changes += other.Changes
	s.Flushes += other.Flushes
	s.Faults += other.Faults
	s.FullDisks += other.FullDisks
	s.Broken += other.Broken
}

func (s Stats) String() string {
	return fmt.Sprintf("%d states (%d process deaths, %d in recoveries), %d sessions (%d broken, %d on a full disk), %d changes, %d flushes, %d faults",
		s.States, s.Kills, s.Recovery, s.Sessions, s.Broken, s.FullDisks, s.Changes, s.Flushes, s.Faults)
}

// world is one walk: a device on a file in memory, its clients, and the oracle.
type world struct {
	cfg    Config
	geo    block.Geometry
	base   []byte
	oracle *Oracle

	// Of the session.
	file    *disktest.File
	mem     exception.Memory
	session Session

	// Guarded by the oracle (While): file operations of any goroutine come
	// by here.
	rng     *rand.Rand
	stats   Stats
	left    int    // phases of file operations until the session dies; 0: not by itself
	death   Death  // how
	dead    *after // what is left then
	fault   int    // file operations until one fails; 0: none
	began   bool   // a change or a flush of the session has succeeded
	full    bool   // the disk of the session is a small one
	faulted bool   // an operation of the session was made to fail
	broken  bool   // and it was a sync
	died    bool   // a fate came true
	failed  error  // the first violation

	traceMu sync.Mutex
	trace   []line
	stamp   uint64 // of the last write
}

// after is what a death leaves for the next process.
type after struct {
	file *disktest.File
	mem  exception.Memory
	cut  Death // what happened
	rule Death // what must be found: after the death of a process whose memory is lost, no more than after a power cut
}

// Walk runs one random walk and returns an error that tells the violation it
// found, with what led to it, or nil. One client's walk is repeated exactly by
// its seed as far as the store does nothing in the background.
func Walk(cfg Config) (Stats, error) {
	w := newWorld(cfg)
	err := w.walk()
	return w.stats, err
}

func (w *world) walk() error {
	err := w.create()
	for n := 0; n < w.cfg.Sessions && err == nil; n++ {
		err = w.oneSession()
	}
	if err != nil {
		return fmt.Errorf("seed %d: %w\n%s", w.cfg.Seed, err, w.history())
	}
	return nil
}

func newWorld(cfg Config) *world {
	rng := rand.New(rand.NewPCG(cfg.Seed, 0xc04de7))
	def := func(v *int, to int) {
		if *v == 0 {
			*v = to
		}
	}
	def(&cfg.Sessions, 12)
	def(&cfg.Steps, 8+rng.IntN(60))
	def(&cfg.Clients, 1)
	def(&cfg.Probes, 3)
	w := &world{cfg: cfg, rng: rng, stamp: BaseStamp}
	w.geo.ChunkSize = block.MinChunkSize << (rng.IntN(5) / 4)
	w.geo.Size = int64(w.geo.ChunkSize)*int64(2+rng.IntN(3)) + []int64{0, 0, 512 * rng.Int64N(16), 1 + rng.Int64N(8000)}[rng.IntN(4)]
	w.base = make([]byte, w.geo.Size)
	Stamp(w.base, 0, BaseStamp)
	w.oracle = NewOracle(w.base)
	if w.cfg.Host == nil {
		w.cfg.Host = &memoryHost{base: w.base}
	}
	return w
}

// A line of a walk's history is put into words only when it is wanted.
type line struct {
	format string
	args   []any
}

// note keeps a line of the walk's history.
func (w *world) note(format string, args ...any) {
	w.traceMu.Lock()
	defer w.traceMu.Unlock()
	if len(w.trace) > 400 {
		w.trace = append(w.trace[:0], w.trace[200:]...)
	}
	w.trace = append(w.trace, line{format, args})
}

// history returns the last lines of the walk.
func (w *world) history() string {
	w.traceMu.Lock()
	defer w.traceMu.Unlock()
	s := fmt.Sprintf("device of %d bytes, chunks of %d; the last steps:", w.geo.Size, w.geo.ChunkSize)
	for _, l := range w.trace[max(0, len(w.trace)-100):] {
		s += "\n  " + fmt.Sprintf(l.format, l.args...)
	}
	return s
}

// create makes the store, and looks at what deaths during that leave: no
// store, or an empty one.
func (w *world) create() error {
	w.file, w.mem = disktest.New(w.cfg.Seed), w.cfg.Host.NewMemory()
	params := exception.Params{Geometry: w.geo, LogSize: int64(8+w.rng.IntN(9)) * 4096, UUID: exception.UUID{1, byte(w.cfg.Seed)}}
	if err := w.cfg.Host.Params(&params); err != nil {
		return err
	}
	w.note("create, log of %d bytes", params.LogSize)
	var bad error
	w.file.OnStep = func(op disktest.Op, phase disktest.Phase) {
		w.note("  file %v, %v", op, phase)
		err := w.look(&after{file: w.file.Crash(w.rng), mem: NewMemory()}, false)
		if err != nil && !errors.Is(err, exception.ErrNotStore) && !errors.Is(err, exception.ErrCorrupt) && bad == nil {
			bad = fmt.Errorf("crash during create: %w", err)
		}
	}
	if err := exception.Create(w.file, params); err != nil {
		return fmt.Errorf("create: %w", err)
	}
	w.file.OnStep = nil
	return bad
}

// oneSession opens the store, lets clients work on it until it dies or they
// are done, and makes the file ready for the next.
func (w *world) oneSession() error {
	w.stats.Sessions++
	w.file.SetSpace(0)
	var err error
	if w.session, err = w.cfg.Host.Start(w.file, w.mem); err != nil {
		return err
	}
	defer w.session.Bury()
	w.plan()
	w.file.OnStep = w.step
	if w.cfg.Faults || w.fault > 0 {
		w.file.Inject = w.inject
	}
	if err := w.work(); err != nil {
		return err
	}
	return w.end()
}

// work lets the clients work until the session is over or they are done.
func (w *world) work() error {
	clients := make([]*client, w.cfg.Clients)
	for i := range clients {
		dev, err := w.session.Device(i)
		if w.over() {
			return w.failed // dead before it was used
		}
		if err != nil {
			return err
		}
		clients[i] = &client{w: w, id: i, dev: dev, rng: rand.New(rand.NewPCG(w.rng.Uint64(), uint64(i)))}
	}
	if len(clients) == 1 {
		clients[0].run()
		return w.failed
	}
	var all sync.WaitGroup
	for _, c := range clients {
		all.Go(c.run)
	}
	all.Wait()
	return w.failed
}

// plan decides what will happen to the session.
func (w *world) plan() {
	w.left, w.dead, w.fault = 0, nil, 0
	w.full, w.faulted, w.broken = false, false, false
	w.began = w.session.Adopted()
	w.death = Death(w.rng.IntN(2))
	if w.rng.IntN(3) > 0 {
		w.left = 1 + w.rng.IntN(40+w.cfg.Steps*w.cfg.Clients*3)
		if w.rng.IntN(4) == 0 {
			w.left = 1 + w.rng.IntN(12) // soon after the recovery
		}
	}
	if w.cfg.Faults && w.rng.IntN(2) == 0 {
		w.fault = 1 + w.rng.IntN(30)
	}
	full := w.rng.IntN(8) == 0
	if m, ok := w.mem.(*Memory); ok {
		m.SetFull(full)
		w.full = full
	}
	if w.rng.IntN(5) == 0 {
		w.full = true
		w.stats.FullDisks++
		w.file.SetSpace(w.file.Allocated() + int64(w.rng.IntN(12))*4096)
	}
	if w.decided() {
		f := w.cfg.first
		w.left, w.death, w.fault = f.left, f.death, f.fault
	}
	w.note("open; adopted %v", w.session.Adopted())
}

// decided reports whether the session's fate is not a matter of chance.
func (w *world) decided() bool { return w.cfg.first != nil && w.stats.Sessions == 1 }

// step is told of every phase of every file operation of the session.
func (w *world) step(op disktest.Op, phase disktest.Phase) {
	w.oracle.While(func() {
		if w.dead != nil || w.failed != nil {
			return
		}
		w.stats.Ops++
		if op.Kind != disktest.Read {
			w.note("  file %v, %v", op, phase)
			if w.rng.IntN(w.cfg.Probes) == 0 {
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
			a.file.DropCache()
		}
	}
	if !w.broken && w.rng.IntN(4) == 0 { // the memory is lost, or could not be had
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
	if w.dead == nil && (w.decided() || w.rng.IntN(2) == 0) {
		w.note("close")
		w.oracle.While(func() {
			if !w.decided() && w.rng.IntN(3) == 0 {
				w.left = 1 + w.rng.IntN(60) // the death comes while it closes
			}
		})
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
	o, err := w.take(a.file, a.mem, false)
	if err == nil {
		o.store.Abandon()
		err = w.oracle.Check(o.p, a.rule)
	}
	if err != nil {
		return fmt.Errorf("%v: %w", a.cut, err)
	}
	again, err := w.take(o.file.Kill(nil), a.mem, false)
	if err == nil {
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
