package block

// zeros is what pieces of zeros point to, for all devices.
var zeros [DefaultChunkSize]byte

// AppendZeros appends pieces to vecs that are n bytes of zeros together. Nobody
// may write to them.
func AppendZeros(vecs [][]byte, n int64) [][]byte {
	for ; n > 0; n -= int64(len(zeros)) {
		k := min(n, int64(len(zeros)))
		vecs = append(vecs, zeros[:k:k])
	}
	return vecs
}
