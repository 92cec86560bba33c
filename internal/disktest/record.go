package disktest

import "hash/crc32"

// Record makes the file keep its last n operations, for Ops.
func (f *File) Record(n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.record = n
}

// Ops returns the operations kept, oldest first, with the CRC-32 of what was
// written.
func (f *File) Ops() []Op {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]Op(nil), f.recorded[max(0, len(f.recorded)-f.record):]...)
}

// keep records an operation. f.mu is held.
func (f *File) keep(op Op, p []byte) {
	if f.record == 0 {
		return
	}
	op.Sum = crc32.ChecksumIEEE(p)
	if len(f.recorded) >= 2*f.record {
		f.recorded = append(f.recorded[:0:0], f.recorded[len(f.recorded)-f.record:]...)
	}
	f.recorded = append(f.recorded, op)
}

// fail marks a recorded operation as failed.
func (f *File) fail(op Op) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for i := range f.recorded {
		if f.recorded[i].N == op.N {
			f.recorded[i].Failed = true
		}
	}
}
