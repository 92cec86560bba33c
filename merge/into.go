package merge

import (
	"context"
	"fmt"

	"github.com/cowdev/cowdev/block"
	"github.com/cowdev/cowdev/exception"
	"github.com/cowdev/cowdev/internal/disk"
)

// Options change what a merge does and tells.
type Options struct {
	// Progress is told now and then how many bytes of Survey's total have
	// been dealt with. It is called by one goroutine.
	Progress func(done int64)

	// Identify returns the base's new identity, once the base is durable.
	Identify func() ([]byte, error)

	// Remove, where it is set, removes the store instead of emptying it.
	Remove func() error
}

// Into folds the exceptions of s into base, of which s was made, and empties
// s. Both are used by nobody else. After an error, or the end of ctx, the base
// is half merged and good only together with the store, until Into is run
// again and succeeds.
func Into(ctx context.Context, base disk.File, s *exception.Store, o Options) error {
	if err := s.Flush(); err != nil {
		return fmt.Errorf("commit before merging: %w", err)
	}
	if s.Header().State != exception.Merging {
		if err := s.SetState(exception.Merging, nil); err != nil {
			return fmt.Errorf("begin merging: %w", err)
		}
	}
	sharer, _ := base.(disk.Sharer)
	if err := apply(ctx, base, sharer, s, o.Progress); err != nil {
		return err
	}
	if err := base.Sync(); err != nil {
		return fmt.Errorf("merge: %w", err)
	}
	if o.Remove != nil {
		return o.Remove()
	}
	id, err := o.Identify()
	if err != nil {
		return fmt.Errorf("identify the merged base: %w", err)
	}
	if err := s.SetState(exception.Merging, id); err != nil {
		return fmt.Errorf("record the merged base: %w", err)
	}
	if err := dropAll(s); err != nil {
		return fmt.Errorf("empty the store: %w", err)
	}
	if err := s.SetState(exception.Active, id); err != nil {
		return fmt.Errorf("end merging: %w", err)
	}
	return nil
}

// dropAll ends every exception, durably.
func dropAll(s *exception.Store) error {
	for c := range s.Entries(0) {
		s.Claim(c)
		err := s.Drop(c, block.AllBlocks)
		s.Release(c)
		if err != nil {
			return err
		}
	}
	return s.Flush()
}

// A Plan is what a merge would do.
type Plan struct {
	Chunks int64 // with an exception
	Stored int64 // bytes to be written, or shared
	Zero   int64 // bytes to be zeroed
	Pieces int64 // runs of either
}

// Bytes returns the total that progress is told against.
func (p Plan) Bytes() int64 { return p.Stored + p.Zero }

// Survey returns what merging s would do.
func Survey(s *exception.Store) Plan {
	var p Plan
	var last run
	for r := range runs(s) {
		if r.first {
			p.Chunks++
		}
		if r.state == block.Stored {
			p.Stored += int64(r.n)
		} else {
			p.Zero += int64(r.n)
		}
		if r.state != last.state || r.off != last.off+int64(last.n) {
			p.Pieces++
		}
		last = r
	}
	return p
}
