package ext4

// Replayed returns, sorted, the ranges whose content is taken from the journal
// and not from where they lie.
func (f *FS) Replayed() []Range { return normalize(f.replayed()) }
