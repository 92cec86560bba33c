package disktest

import "math/rand/v2"

// Crash returns a file as a power cut at this moment may leave it, chosen by
// rng among all that are possible. The file itself goes on, nothing lost: any
// number of crashes may be taken of one moment.
func (f *File) Crash(rng *rand.Rand) *File {
	f.mu.Lock()
	defer f.mu.Unlock()
	g := New(rng.Uint64())
	g.durable, g.durSize = f.durable.clone(), f.durSize
	if len(f.pending) > 0 {
		cut(f.pending, rng, &g.durable, &g.durSize)
		g.durable.cutAt(g.durSize)
	}
	g.maxPages = f.maxPages
	g.revive()
	return g
}

// cut makes what of the pending changes reaches the disk. Every subset of
// (change, sector) is possible; the ways differ in what they make likely: the
// plain cases, one change alone gone or there, and all mixed.
func cut(pending []change, rng *rand.Rand, t *pages, size *int64) {
	at := rng.IntN(len(pending))
	one := anyTear(rng)
	way := rng.IntN(8)
	for i := range pending {
		how := lost
		switch way {
		case 0: // all is lost
		case 1:
			how = kept
		case 2, 3: // in order up to one that is torn
			if i < at {
				how = kept
			} else if i == at {
				how = one
			}
		case 4: // one comes too early
			if i == at {
				how = one
			}
		case 5: // one comes too late
			how = kept
			if i == at {
				how = one
			}
		case 6:
			how = anyTear(rng)
		case 7: // all alike
			how = one
		}
		pending[i].some(how, rng, t, size)
	}
}

// Kill ends the process that uses the file: every later operation of f returns
// ErrClosed, one that is under way does no more, and the file that a new
// process finds is returned: the page cache as it was, un-synced changes still
// pending. It takes up a closed file too. If also is not nil, it is called at
// that moment: no operation takes effect meanwhile.
func (f *File) Kill(also func()) *File {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.closed = true
	return f.copy(also)
}

// Fork returns what Kill would, and f goes on.
func (f *File) Fork(also func()) *File {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.copy(also)
}

func (f *File) copy(also func()) *File {
	if also != nil {
		also()
	}
	return &File{
		seed:     [2]uint64{f.lastSeq, f.ops},
		view:     f.view.clone(),
		size:     f.size,
		durable:  f.durable.clone(),
		durSize:  f.durSize,
		pending:  append([]change(nil), f.pending...),
		lastSeq:  f.lastSeq,
		astray:   f.astray,
		maxPages: f.maxPages,
	}
}

// DropCache forgets the cached pages of [off, off+n) that count as clean: what
// a failed Sync did not bring to the disk reads as it was before. n may be 0
// for all that follows off.
func (f *File) DropCache(off, n int64) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.astray {
		return nil // it reads as the disk does, or will
	}
	disk := f.onDisk()
	if off == 0 && n == 0 {
		f.view, f.astray = disk, false
		return nil
	}
	if n == 0 {
		n = max(0, f.size-off)
	}
	for at := down(off); at < off+n; at += SectorSize {
		f.view.setSector(at, disk.sector(at))
	}
	return nil
}

// onDisk returns what the disk will hold once all that is pending is there.
func (f *File) onDisk() pages {
	disk, size := f.durable.clone(), f.durSize
	for i := range f.pending {
		f.pending[i].apply(&disk, &size)
	}
	return disk
}

// Pending returns the number of changes that no sync has covered.
func (f *File) Pending() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.pending)
}

// Poke changes bytes of the medium and of the cache behind everyone's back.
func (f *File) Poke(p []byte, off int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.durable.put(f.durable.widen(p, off))
	f.view.put(f.view.widen(p, off))
	f.astray = true // where a pending change is to go over it
}
