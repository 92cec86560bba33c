package ext4

// ReplayTags carries out the tags of a fast commit on an open file system, as
// far as they can be decoded.
func ReplayTags(f *FS, p []byte) error {
	f.fc = &fastCommit{inodes: map[uint32]*fcFile{}, dirs: map[uint32]dirIndex{}}
	for len(p) >= fcTagHeader {
		op, ok := nextOp(p, f.sb.inodeSize)
		if !ok {
			return nil
		}
		p = p[len(op.raw):]
		if err := f.replayOp(op); err != nil {
			return err
		}
	}
	return nil
}

// A Run is a run of blocks, for tests outside of the package.
type Run struct{ Logical, Phys, N uint64 }

// ReplaceRun is replaceRun.
func ReplaceRun(runs []Run, r Run) []Run {
	in := make([]run, 0, len(runs))
	for _, r := range runs {
		in = append(in, run{logical: r.Logical, phys: r.Phys, n: r.N})
	}
	var out []Run
	for _, r := range replaceRun(in, run{logical: r.Logical, phys: r.Phys, n: r.N}) {
		out = append(out, Run{r.logical, r.phys, r.n})
	}
	return out
}
