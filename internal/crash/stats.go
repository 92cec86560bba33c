package crash

import (
	"fmt"
	"strings"

	"github.com/cowdev/cowdev/internal/disktest"
)

// Stats counts what walks have done. Those of several add up.
type Stats struct {
	Walks int

	States    int   // stores opened after a death, and compared
	Kills     int   // of which of the process alone
	Recovery  int   // of which in the middle of a recovery
	Recovered int   // of which after the whole of one
	Checked   int   // of which looked at by exception.Check too
	Died      kinds // of which in the middle of an operation, by its kind

	Sessions  int
	Adopted   int // of which took over what a dead process left
	FullDisks int // on a full disk
	Faults    int // file operations that were made to fail
	Broken    int // syncs among them

	Ops     kinds // file operations
	Writes  int
	Trims   int
	Zeroes  int
	Reads   int
	Flushes int
}

// kinds counts by the kind of a file operation.
type kinds [disktest.Truncate + 1]int

func (k *kinds) add(other kinds) {
	for i, n := range other {
		k[i] += n
	}
}

func (k kinds) String() string {
	var s []string
	for i, n := range k {
		if n > 0 {
			s = append(s, fmt.Sprintf("%d %v", n, disktest.Kind(i)))
		}
	}
	return strings.Join(s, ", ")
}

// Add adds other to s.
func (s *Stats) Add(other Stats) {
	s.Walks += other.Walks
	s.States += other.States
	s.Kills += other.Kills
	s.Recovery += other.Recovery
	s.Recovered += other.Recovered
	s.Checked += other.Checked
	s.Died.add(other.Died)
	s.Sessions += other.Sessions
	s.Adopted += other.Adopted
	s.FullDisks += other.FullDisks
	s.Faults += other.Faults
	s.Broken += other.Broken
	s.Ops.add(other.Ops)
	s.Writes += other.Writes
	s.Trims += other.Trims
	s.Zeroes += other.Zeroes
	s.Reads += other.Reads
	s.Flushes += other.Flushes
}

func (s Stats) String() string {
	return fmt.Sprintf("%d states (%d process deaths, %d in recoveries, %d after one, %d checked; died in: %v), "+
		"%d walks, %d sessions (%d taken over, %d on a full disk), %d faults (%d syncs), "+
		"%d writes, %d trims, %d zeroes, %d reads, %d flushes, file operations: %v",
		s.States, s.Kills, s.Recovery, s.Recovered, s.Checked, s.Died,
		s.Walks, s.Sessions, s.Adopted, s.FullDisks, s.Faults, s.Broken,
		s.Writes, s.Trims, s.Zeroes, s.Reads, s.Flushes, s.Ops)
}
