package nbdserver

import "sync"

// Limits of what runs at once in devices, over all connections. Go ends a
// process of 10,000 threads, and a goroutine in a system call holds one.
const (
	maxInDevice = 512  // requests that may be blocked in a system call of a device
	maxParked   = 4096 // requests to devices that say MayBlock: most of them wait without a thread
	maxIdle     = 64   // worker goroutines that wait for work
)

// workers are goroutines that run jobs, and the gates that every call that may
// block in a device goes through.
type workers struct {
	jobs     chan *job // has no room: a job is taken by a worker that waits
	quit     chan struct{}
	idle     chan struct{} // a token for each worker that waits
	inDevice chan struct{}
	parked   chan struct{}
	running  sync.WaitGroup
	closed   sync.Once
}

func (w *workers) init() {
	w.jobs = make(chan *job)
	w.quit = make(chan struct{})
	w.idle = make(chan struct{}, maxIdle)
	w.inDevice = make(chan struct{}, maxInDevice)
	w.parked = make(chan struct{}, maxParked)
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
		select {
		case w.idle <- struct{}{}:
		default:
			return
		}
		select {
		case j = <-w.jobs:
			<-w.idle
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
