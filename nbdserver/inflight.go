package nbdserver

import "sync"

// Limits of the requests of one connection that are in workers; the next one
// waits, and with it what follows it. A single request may be over the bytes.
const (
	maxJobs     = 64
	maxJobBytes = 2 << 20 // of their buffers
)

// inFlight counts the requests of one connection that are in workers.
type inFlight struct {
	mu    sync.Mutex
	jobs  int
	bytes int // of their buffers
	freed sync.Cond
}

func (f *inFlight) init() { f.freed.L = &f.mu }

// tryAdd adds a job with n bytes if there is room for it.
func (f *inFlight) tryAdd(n int) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.crowded(n) {
		return false
	}
	f.jobs++
	f.bytes += n
	return true
}

// add adds a job with n bytes when there is room for it.
func (f *inFlight) add(n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for f.crowded(n) {
		f.freed.Wait()
	}
	f.jobs++
	f.bytes += n
}

func (f *inFlight) crowded(n int) bool {
	return f.jobs >= maxJobs || f.bytes > 0 && f.bytes+n > maxJobBytes
}

// remove removes a job with n bytes.
func (f *inFlight) remove(n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.jobs--
	f.bytes -= n
	f.freed.Signal()
}

// any says that there are jobs.
func (f *inFlight) any() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.jobs > 0
}

// wait waits until there are none.
func (f *inFlight) wait() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for f.jobs > 0 {
		f.freed.Wait()
	}
}
