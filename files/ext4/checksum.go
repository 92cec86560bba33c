package ext4

import (
	"encoding/binary"
	"hash/crc32"
)

var (
	le = binary.LittleEndian
	be = binary.BigEndian

	castagnoli = crc32.MakeTable(crc32.Castagnoli)
)

// crc32c continues crc over p the way the kernel does: neither the value taken
// nor the one returned is inverted.
func crc32c(crc uint32, p []byte) uint32 {
	return ^crc32.Update(^crc, castagnoli, p)
}

// crc32cUint32 is crc32c over v in little-endian.
func crc32cUint32(crc, v uint32) uint32 {
	return crc32c(crc, le.AppendUint32(nil, v))
}

// crc32cWithout is crc32c over p, with the n bytes at off taken as zeros: where
// a checksum lies inside what it covers.
func crc32cWithout(crc uint32, p []byte, off, n int) uint32 {
	var zeros [4]byte
	crc = crc32c(crc, p[:off])
	crc = crc32c(crc, zeros[:n])
	return crc32c(crc, p[off+n:])
}

// crc16 is the CRC-16 (polynomial 0xA001, reflected) of group descriptors with
// the feature gdt_csum.
func crc16(crc uint16, p []byte) uint16 {
	for _, b := range p {
		crc ^= uint16(b)
		for range 8 {
			lsb := crc & 1
			crc >>= 1
			if lsb != 0 {
				crc ^= 0xA001
			}
		}
	}
	return crc
}

// crc32be is the unreflected CRC-32 of jbd2's first checksum format.
func crc32be(crc uint32, p []byte) uint32 {
	for _, b := range p {
		crc = crc<<8 ^ crc32beTable[byte(crc>>24)^b]
	}
	return crc
}

var crc32beTable = func() (t [256]uint32) {
	for i := range t {
		crc := uint32(i) << 24
		for range 8 {
			msb := crc >> 31
			crc <<= 1
			if msb != 0 {
				crc ^= 0x04C11DB7
			}
		}
		t[i] = crc
	}
	return t
}()
