package disk

// A File is a store's file, or block device. Methods may be called at once by
// several goroutines. ReadAt follows io.ReaderAt (io.EOF at the end); holes
// and what was never written read as zeros.
type File interface {
	ReadAt(p []byte, off int64) (int, error)

	// WriteAt writes all of p, at any offset, or returns an error. What it
	// wrote is seen by ReadAt at once and durable after the next Sync that
	// begins after it returned.
	WriteAt(p []byte, off int64) (int, error)

	// WriteVecAt is WriteAt of all pieces of p, one behind the other.
	WriteVecAt(p [][]byte, off int64) error

	// WriteSync is WriteAt whose bytes are durable when it returns nil. It
	// says nothing of other writes. After an error the bytes may be there,
	// wholly, in part or not at all, now or later.
	WriteSync(p []byte, off int64) error

	// Sync makes everything durable whose WriteAt, PunchHole or Truncate
	// returned before Sync was called (fdatasync). After an error nothing is
	// known of any of it.
	Sync() error

	// SyncBeside is Sync for one who works beside those that call Sync and
	// WriteSync. A system tells of a write that failed later only once to
	// each opening of a file: so it is told here as well as there, whoever
	// comes first. Callers of one and the same of the two ways take turns.
	SyncBeside() error

	// PunchHole makes [off, off+n) read as zeros and gives the space back
	// where the file can.
	PunchHole(off, n int64) error

	// Truncate sets the size.
	Truncate(size int64) error

	// Size returns the file's size in bytes.
	Size() (int64, error)

	// NextData returns the first offset at or after off that may hold
	// something but zeros, or the file's size.
	NextData(off int64) (int64, error)

	Close() error
}

// A Sharer is a File that can have blocks in common with another.
type Sharer interface {
	// Share makes [off, off+n) the n bytes of from at at, without copying
	// them: both files keep them until they are written again (reflink). The
	// filesystem must know how, and hold both; off, at and n are multiples of
	// its blocks, and n is more than 0. It is seen and made durable as by
	// WriteAt. After an error nothing is known of the range.
	Share(off int64, from File, at, n int64) error
}
