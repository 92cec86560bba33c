package attach

import "golang.org/x/sys/unix"

// Shield keeps this process able to serve writes when memory is short: the
// kernel does not make its allocations wait for write-back through devices
// (PR_SET_IO_FLUSHER), does not choose it when it kills for memory, and keeps
// its pages in memory when lock is set. A process that maps images must not
// lock: each page of them that was ever read would stay. What is not permitted
// is left undone, and named.
func Shield(lock bool) (undone []string) {
	if err := unix.Prctl(unix.PR_SET_IO_FLUSHER, 1, 0, 0, 0); err != nil {
		undone = append(undone, "PR_SET_IO_FLUSHER")
	}
	if lock {
		// On fault: the runtime reserves far more than it uses.
		if err := unix.Mlockall(unix.MCL_CURRENT | unix.MCL_FUTURE | unix.MCL_ONFAULT); err != nil {
			undone = append(undone, "mlockall")
		}
	}
	if err := writeProc("/proc/self/oom_score_adj", "-900"); err != nil {
		undone = append(undone, "oom_score_adj")
	}
	return undone
}
