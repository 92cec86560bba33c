package crash

import (
	"errors"
	"fmt"
	"math/rand/v2"
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
	left    int      // phases of file operations until the session dies; 0: not by itself
	death   Death    // how
	dead    *after   // what is left then
	fault   int      // file operations until one fails; 0: none
	began   bool     // a change or a flush of the session has succeeded
	full    bool     // the disk of the session is a small one
	faulted bool     // an operation of the session was made to fail
	broken  bool     // and it was a sync
	died    bool     // a fate came true
	failed  error    // the first violation
	buffers [][]byte // of the device's size, for take

	traceMu sync.Mutex
	trace   []line
	stamp   uint64 // of the last write
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
	w.stats.Walks++
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
		w.cfg.Host = &memoryHost{base: w.base, commits: cfg.Clients > 1}
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
	if w.session.Adopted() {
		w.stats.Adopted++
	}
	w.note("open; adopted %v", w.session.Adopted())
}

// decided reports whether the session's fate is not a matter of chance.
func (w *world) decided() bool { return w.cfg.first != nil && w.stats.Sessions == 1 }
