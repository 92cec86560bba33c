package guest

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// A Sample is what one load cost on one system. Disks are counted from where
// the device was open until it was closed and all was written out.
type Sample struct {
	Load, System string
	Round        int
	Requests     int
	Bytes        int64   // of all requests
	Seconds      float64 // of the load, with its last sync

	OriginRead int64 // bytes
	Written    int64 // bytes, to the store's disk
	Flushes    int64 // of the store's disk
	AtRest     int64 // bytes that the store has grown by since it was new
}

// Creation is the load of a Sample that tells what it costs to make a store,
// open it and close it. Its AtRest is what the empty store takes.
const Creation = "new"

// SamplePrefix begins a line of Main's that holds a Sample as JSON.
const SamplePrefix = "sample "

// Main runs rounds of all loads on all systems and writes a line for each
// sample to w. Systems take turns, in an order that rotates.
func Main(w io.Writer, rounds int) error {
	for _, m := range [][]string{{"dm_snapshot"}, {"nbd", "nbds_max=2"}} {
		if err := run("modprobe", m...); err != nil {
			return fmt.Errorf("%w (this kernel lacks it)", err)
		}
	}
	systems := Systems()
	for round := range rounds {
		for _, group := range Groups {
			for i := range systems {
				s := &systems[(i+round)%len(systems)]
				samples, err := s.group(group, uint64(round)+1)
				if err != nil {
					return fmt.Errorf("%s: %s: %w", s.Name, group[0].ID, err)
				}
				for _, sample := range samples {
					sample.System, sample.Round = s.Name, round
					line, err := json.Marshal(sample)
					if err != nil {
						return err
					}
					fmt.Fprintf(w, "%s%s\n", SamplePrefix, line)
				}
			}
		}
	}
	return nil
}

// group runs loads on a new store, and compares the device at the end.
func (s *System) group(loads []Load, seed uint64) ([]Sample, error) {
	if err := run("blkdiscard", store); err != nil {
		return nil, err
	}
	empty, err := s.creation()
	if err != nil {
		return nil, err
	}
	samples := []Sample{empty}
	c := new(contents)
	for i := range loads {
		sample, err := s.sample(&loads[i], seed, c)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", loads[i].ID, err)
		}
		sample.AtRest -= empty.AtRest
		samples = append(samples, sample)
	}
	device, err := s.open()
	if err != nil {
		return nil, err
	}
	err = c.compare(device, unix.O_RDONLY|unix.O_DIRECT)
	_, closeErr := s.close()
	return samples, errors.Join(err, closeErr, s.destroy())
}

// creation makes a store, and opens and closes it.
func (s *System) creation() (Sample, error) {
	sample := Sample{Load: Creation}
	if err := errors.Join(s.prepare(), dropCaches()); err != nil {
		return sample, err
	}
	before := counters()
	if err := s.create(); err != nil {
		return sample, err
	}
	if _, err := s.open(); err != nil {
		return sample, err
	}
	err := s.finish(&sample, before)
	return sample, err
}

// sample runs one load, with nothing of either disk in the page cache.
func (s *System) sample(l *Load, seed uint64, c *contents) (Sample, error) {
	sample := Sample{Load: l.ID, Requests: l.Count, Bytes: int64(l.Count) * l.Block}
	if err := dropCaches(); err != nil {
		return sample, err
	}
	device, err := s.open()
	if err != nil {
		return sample, err
	}
	before := counters()
	took, err := l.run(device, seed, c)
	sample.Seconds = took.Seconds()
	err = errors.Join(err, s.finish(&sample, before))
	return sample, err
}

// finish closes a device and completes a sample.
func (s *System) finish(sample *Sample, before disks) (err error) {
	sample.AtRest, err = s.close()
	unix.Sync()
	after := counters()
	sample.OriginRead = after.originRead - before.originRead
	sample.Written = after.written - before.written
	sample.Flushes = after.flushes - before.flushes
	return err
}

// disks are counters since the boot.
type disks struct{ originRead, written, flushes int64 }

func counters() disks {
	o, s := diskStat(origin), diskStat(store)
	return disks{o[2] * 512, s[6] * 512, s[15]}
}

// diskStat returns the fields of /sys/block/NAME/stat: reads, merged, sectors,
// ms; the same of writes; in flight, ms, ms; four of discards; flushes, ms.
func diskStat(disk string) (fields [17]int64) {
	b, _ := os.ReadFile("/sys/block/" + filepath.Base(disk) + "/stat")
	for i, f := range strings.Fields(string(b)) {
		if i < len(fields) {
			fields[i], _ = strconv.ParseInt(f, 10, 64)
		}
	}
	return fields
}

// dropCaches empties the page cache.
func dropCaches() error {
	unix.Sync()
	return os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0)
}
