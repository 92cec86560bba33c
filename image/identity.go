package image

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// ErrIdentity says that bytes are no identity that this version can read.
var ErrIdentity = errors.New("not a base identity of this version")

// A Digest is a BLAKE3 digest of 32 bytes.
type Digest [32]byte

// Counts of the parts whose digests are kept beside the roots.
const (
	samplePieces = 16
	fullRanges   = 64
)

// A Sample is the digest of the sample, and of its pieces.
type Sample struct {
	Root   Digest
	Pieces [samplePieces]uint32 // each piece's digest, shortened
}

// A Full is the digest of all bytes, and of fullRanges equal ranges of them.
type Full struct {
	Root   Digest
	Ranges [fullRanges]uint32 // each range's digest, shortened
}

// An Identity says which base a store was made for, as far as is known.
type Identity struct {
	Size   int64
	Device bool    // a block device
	Stamp  int64   // mtime in Unix nanoseconds; of a device, its serial's digest, or 0
	Sample *Sample // nil where not known
	Full   *Full   // nil where not known
}

// An encoded identity, little-endian:
//
//	0    version (1), flags, 6 bytes of zeros
//	8    size
//	16   stamp
//	24   8 bytes of zeros
//	32   sample: root (32 bytes), 16 pieces of 4 bytes
//	128  full: root (32 bytes), 64 ranges of 4 bytes
//	416
const (
	identityVersion = 1
	identitySize    = 416

	flagDevice = 1 << 0
	flagSample = 1 << 1
	flagFull   = 1 << 2
	knownFlags = flagDevice | flagSample | flagFull

	sampleAt = 32
	fullAt   = 128
)

var le = binary.LittleEndian

// Encode returns id's binary form.
func (id Identity) Encode() []byte {
	p := make([]byte, identitySize)
	p[0] = identityVersion
	le.PutUint64(p[8:], uint64(id.Size))
	le.PutUint64(p[16:], uint64(id.Stamp))
	if id.Device {
		p[1] |= flagDevice
	}
	if id.Sample != nil {
		p[1] |= flagSample
		encodeDigests(p[sampleAt:], id.Sample.Root, id.Sample.Pieces[:])
	}
	if id.Full != nil {
		p[1] |= flagFull
		encodeDigests(p[fullAt:], id.Full.Root, id.Full.Ranges[:])
	}
	return p
}

// DecodeIdentity reads what Encode wrote.
func DecodeIdentity(p []byte) (Identity, error) {
	if len(p) != identitySize || p[0] != identityVersion || p[1]&^knownFlags != 0 {
		return Identity{}, fmt.Errorf("%d bytes: %w", len(p), ErrIdentity)
	}
	id := Identity{
		Size:   int64(le.Uint64(p[8:])),
		Stamp:  int64(le.Uint64(p[16:])),
		Device: p[1]&flagDevice != 0,
	}
	if p[1]&flagSample != 0 {
		id.Sample = new(Sample)
		decodeDigests(p[sampleAt:], &id.Sample.Root, id.Sample.Pieces[:])
	}
	if p[1]&flagFull != 0 {
		id.Full = new(Full)
		decodeDigests(p[fullAt:], &id.Full.Root, id.Full.Ranges[:])
	}
	return id, nil
}

func encodeDigests(p []byte, root Digest, parts []uint32) {
	p = p[copy(p, root[:]):]
	for i, d := range parts {
		le.PutUint32(p[4*i:], d)
	}
}

func decodeDigests(p []byte, root *Digest, parts []uint32) {
	p = p[copy(root[:], p):]
	for i := range parts {
		parts[i] = le.Uint32(p[4*i:])
	}
}
