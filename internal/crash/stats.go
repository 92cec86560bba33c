package crash

import "fmt"

// Stats counts what a walk has done.
type Stats struct {
	States    int // stores opened after a death, and compared
	Kills     int // of which of the process alone
	Recovery  int // of which in the middle of a recovery
	Sessions  int
	Ops       int // file operations
	Changes   int
	Flushes   int
	Faults    int
	FullDisks int
	Broken    int // sessions that a failed sync ended
}

// Add adds other to s.
func (s *Stats) Add(other Stats) {
	s.States += other.States
	s.Kills += other.Kills
	s.Recovery += other.Recovery
	s.Sessions += other.Sessions
	s.Ops += other.Ops
	s.Changes += other.Changes
	s.Flushes += other.Flushes
	s.Faults += other.Faults
	s.FullDisks += other.FullDisks
	s.Broken += other.Broken
}

func (s Stats) String() string {
	return fmt.Sprintf("%d states (%d process deaths, %d in recoveries), %d sessions (%d broken, %d on a full disk), %d changes, %d flushes, %d faults",
		s.States, s.Kills, s.Recovery, s.Sessions, s.Broken, s.FullDisks, s.Changes, s.Flushes, s.Faults)
}
