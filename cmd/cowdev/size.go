package main

import (
	"fmt"
	"math"
	"math/big"
	"strings"

	"github.com/dustin/go-humanize"
)

// sizeUnits are the letters of powers of 1024.
const sizeUnits = "KMGTPE"

// parseSize reads a number of bytes such as 4096, 64K, 1.5G or 2TiB: units are
// powers of 1024, and what they make must be whole bytes.
func parseSize(s string) (int64, error) {
	bad := fmt.Errorf("%q: expected a size such as 65536, 64K or 1G", s)
	number := strings.ToUpper(s)
	number = strings.TrimSuffix(strings.TrimSuffix(number, "B"), "I")
	shift := 0
	if n := len(number); n > 0 {
		if i := strings.IndexByte(sizeUnits, number[n-1]); i >= 0 {
			shift, number = 10*(i+1), number[:n-1]
		}
	}
	if number == "" || strings.Trim(number, "0123456789.") != "" || len(number) > 30 {
		return 0, bad
	}
	r, ok := new(big.Rat).SetString(number)
	if !ok {
		return 0, bad
	}
	r.Mul(r, new(big.Rat).SetInt(new(big.Int).Lsh(big.NewInt(1), uint(shift))))
	if !r.IsInt() || !r.Num().IsInt64() || r.Num().Int64() > math.MaxInt64/2 {
		return 0, bad
	}
	return r.Num().Int64(), nil
}

// size prints a number of bytes both exactly and for people.
func size(n int64) string {
	if n < 1024 {
		return fmt.Sprintf("%d bytes", n)
	}
	return fmt.Sprintf("%d bytes (%s)", n, short(n))
}

// short prints a number of bytes for people.
func short(n int64) string { return humanize.IBytes(uint64(max(n, 0))) }
