package nbdserver

import "sync"

// maxIdle is how many worker goroutines wait for work.
const maxIdle = 64

// Limits of what may be blocked in system calls of devices at once, over all
// connections: a goroutine there holds a thread, and Go ends a process that
// needs 10,000.
const (
	maxInline  = 512  // on the goroutines of connections
	maxWorking = 2048 // in workers
	maxParked  = 4096 // in devices that say MayBlock: most of them wait without a thread
)

// A gate has a place for each that may be inside at once. Calls of devices that
// may block go through one. Those on connections' own goroutines, those of
// workers and those that may be parked have gates of their own, so that a
// device which hangs for one kind does not hold up the others.
type gate chan struct{}

func (g gate) enter() { g <- struct{}{} }

func (g gate) leave() { <-g }

// tryEnter is enter that reports whether there was a place, and does not wait.
func (g gate) tryEnter() bool {
	select {
	case g <- struct{}{}:
		return true
	default:
		return false
	}
}

// workers are goroutines that run jobs, and the gates of the devices.
type workers struct {
	jobs    chan *job // has no room: a job is taken by a worker that waits
	quit    chan struct{}
	idle    gate // of the workers that wait
	running sync.WaitGroup
	closed  sync.Once

	inline, working, parked gate
}

func (w *workers) init() {
	w.jobs = make(chan *job)
	w.quit = make(chan struct{})
	w.idle = make(gate, maxIdle)
	w.inline = make(gate, maxInline)
	w.working = make(gate, maxWorking)
	w.parked = make(gate, maxParked)
}

// start runs j in a worker. It does not wait.
func (w *workers) start(j *job) {
	select {
	case w.jobs <- j:
	default:
		w.running.Add(1)
		go w.work(j)
	}
}

// work runs j and then whatever comes, and ends when others wait enough.
func (w *workers) work(j *job) {
	defer w.running.Done()
	for {
		j.run()
		if !w.idle.tryEnter() {
			return
		}
		select {
		case j = <-w.jobs:
			w.idle.leave()
		case <-w.quit:
			return
		}
	}
}

// close ends the workers that wait. No job may run or be started any more.
func (w *workers) close() {
	w.closed.Do(func() { close(w.quit) })
	w.running.Wait()
}
