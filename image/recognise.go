package image

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/zeebo/blake3"
	"golang.org/x/sys/unix"
)

// ErrWrongBase says that a base is not the one a store was made for, or not
// any more.
var ErrWrongBase = errors.New("wrong or changed base")

// Digests says how much of a base's contents is looked at.
type Digests int

// The values of Digests.
const (
	DigestFull   Digests = iota // the sample, and all of it in its time
	DigestSample                // the sample
	DigestOff                   // nothing: contents are never said to match
)

// ParseDigests reads the words full, sample and off.
func ParseDigests(s string) (Digests, error) {
	for i, word := range []string{"full", "sample", "off"} {
		if s == word {
			return Digests(i), nil
		}
	}
	return 0, fmt.Errorf("%q: expected full, sample or off", s)
}

// Identify returns what can be told of b at once: all but the full digest.
func (b *Base) Identify(how Digests) (Identity, error) { return b.identify(how, b.sample) }

func (b *Base) identify(how Digests, sample func() (*Sample, error)) (Identity, error) {
	id := Identity{Size: b.size, Device: b.f.IsDevice()}
	var err error
	if id.Stamp, err = b.stamp(); err != nil || how == DigestOff {
		return id, err
	}
	id.Sample, err = sample()
	return id, err
}

// BeginSample begins to read the sample that Recognise, called soon after, will
// want, beside what the caller does until then. No other method may be called
// at the same time.
func (b *Base) BeginSample() {
	b.begun = sync.OnceValues(b.sample)
	go b.begun()
}

// A Question is what a base is compared with, and how.
type Question struct {
	Was    Identity // what the store remembers
	Look   Digests
	Deep   bool                    // compute the full digest in any case
	Full   FullOptions             // for when the full digest is needed
	Except func(off, n int64) bool // nil, or whether a range may differ: for a half-merged base
}

// Recognise returns b's identity as it is now if b is the base that was; the
// full digest is carried over, or computed where that is needed. The error
// wraps ErrWrongBase if it is another one or was changed, and names the first
// range that is known to differ.
func (b *Base) Recognise(ctx context.Context, q Question) (Identity, error) {
	if b.size != q.Was.Size {
		return Identity{}, fmt.Errorf("%s: %d bytes, the store was made over %d: %w", b.path, b.size, q.Was.Size, ErrWrongBase)
	}
	if q.Was.Sample == nil {
		q.Look = DigestOff
	}
	sample := b.sample
	if b.begun != nil {
		sample, b.begun = b.begun, nil
		defer sample() // it ends, wanted or not
	}
	now, err := b.identify(q.Look, sample)
	if err != nil {
		return now, err
	}
	if q.Except != nil {
		return now, b.compareSamples(q, now.Sample)
	}
	if err := b.compareSamples(q, now.Sample); err != nil {
		return now, err
	}
	sameStamp := now.Stamp == q.Was.Stamp && now.Device == q.Was.Device
	if sameStamp && !q.Deep {
		now.Full = q.Was.Full
		return now, nil
	}
	if q.Was.Full == nil && !sameStamp {
		return now, b.changed(q, now)
	}
	if now.Full, err = b.FullDigest(ctx, q.Full); err != nil || q.Was.Full == nil {
		return now, err
	}
	return now, b.compareFull(q.Was.Full, now.Full)
}

// changed is the error for a base with another stamp, of which not enough is
// known to accept it.
func (b *Base) changed(q Question, now Identity) error {
	what := "modified at " + stampTime(now.Stamp) + ", expected " + stampTime(q.Was.Stamp)
	if now.Device || q.Was.Device {
		what = "not the device that the store was made over"
	}
	known := "a sample of it is unchanged, but no digest of all of it is known"
	if now.Sample == nil {
		known = "nothing is known of its contents"
	}
	return fmt.Errorf("%s: %s (%s; --accept-base if you are sure): %w", b.path, what, known, ErrWrongBase)
}

func stampTime(ns int64) string {
	return time.Unix(0, ns).UTC().Format("2006-01-02T15:04:05.999999999Z")
}

// compareSamples compares the pieces of the sample that must be the same.
func (b *Base) compareSamples(q Question, now *Sample) error {
	if now == nil || (q.Except == nil && now.Root == q.Was.Sample.Root) {
		return nil
	}
	for i, d := range now.Pieces {
		piece := samplePiece(b.size, i)
		if len(piece) > 0 && d != q.Was.Sample.Pieces[i] && !excepted(piece, q.Except) {
			last := piece[len(piece)-1]
			return b.differs(piece[0].off, last.off+last.n)
		}
	}
	if q.Except != nil {
		return nil
	}
	return fmt.Errorf("%s: its sample differs (%s): %w", b.path, remedy, ErrWrongBase)
}

func excepted(piece []extent, except func(off, n int64) bool) bool {
	for _, e := range piece {
		if except != nil && except(e.off, e.n) {
			return true
		}
	}
	return false
}

func (b *Base) compareFull(was, now *Full) error {
	if was.Root == now.Root {
		return nil
	}
	for i, d := range now.Ranges {
		if d != was.Ranges[i] {
			off, end := rangeBounds(b.size, i)
			return b.differs(off, end)
		}
	}
	return fmt.Errorf("%s: its digest differs (%s): %w", b.path, remedy, ErrWrongBase)
}

// remedy is what to do about a base that differs.
const remedy = "bring that one back, or --accept-base to go on with this one"

func (b *Base) differs(off, end int64) error {
	return fmt.Errorf("%s: bytes %d to %d differ from the base that the store was made over (%s): %w", b.path, off, end-1, remedy, ErrWrongBase)
}

// stamp returns what changes when the base is written or replaced: the time
// of a file's last change, or the digest of a device's serial number (0 where
// it has none).
func (b *Base) stamp() (int64, error) {
	info, err := b.f.File().Stat()
	if err != nil {
		return 0, err
	}
	if !b.f.IsDevice() {
		return info.ModTime().UnixNano(), nil
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(b.f.File().Fd()), &st); err != nil {
		return 0, err
	}
	serial := deviceSerial(st.Rdev)
	if serial == "" {
		return 0, nil
	}
	sum := blake3.Sum256([]byte(serial))
	return int64(le.Uint64(sum[:])), nil
}

// deviceSerial returns what sysfs says names a block device: its WWN or
// serial number, with a partition's place in it.
func deviceSerial(rdev uint64) string {
	dir := sysBlock(rdev)
	place, err := os.ReadFile(filepath.Join(dir, "start"))
	if err == nil {
		dir = filepath.Join(dir, "..")
	}
	for _, name := range []string{"wwid", "device/wwid", "device/serial", "serial", "dm/uuid", "md/uuid"} {
		if text, err := os.ReadFile(filepath.Join(dir, name)); err == nil {
			if s := strings.TrimSpace(string(text)); s != "" {
				return s + "+" + strings.TrimSpace(string(place))
			}
		}
	}
	return ""
}

// sysBlock returns the directory in sysfs of a block device, with symbolic
// links resolved.
func sysBlock(rdev uint64) string {
	link := fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(rdev), unix.Minor(rdev))
	dir, err := filepath.EvalSymlinks(link)
	if err != nil {
		return link
	}
	return dir
}
