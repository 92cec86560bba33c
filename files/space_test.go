package files

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/cowdev/cowdev/block"
)

// A known change is charged to the paths and kinds that made it.
func TestWhy(t *testing.T) {
	needMount(t)
	rng := newRand(t)
	old := blank(t, 64<<20)
	run(t, "mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", old)
	dir, unmount := mount(t, old, "rw")
	write := func(name string, content []byte) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("old/kept", randomBytes(rng, 1<<20))
	unmount()
	changed := scratch(t, old)
	dir, unmount = mount(t, changed, "rw")
	write("a/b/large", randomBytes(rng, 2<<20))
	write("a/small", randomBytes(rng, 10_000))
	write("gone", randomBytes(rng, 1<<20))
	run(t, "sync", "-f", dir)
	if err := os.Remove(filepath.Join(dir, "gone")); err != nil {
		t.Fatal(err)
	}
	unmount()

	ranges := append(differences(t, old, changed), kept(t, old)...)
	slices.SortFunc(ranges, func(a, b block.Extent) int { return int(a.Off - b.Off) })
	r, err := Why(openReader(t, old), openReader(t, changed), openImage(t, changed), ranges)
	if err != nil {
		t.Fatal(err)
	}
	blind, err := Why(openReader(t, old), openReader(t, changed), nil, ranges)
	if err != nil || blind.Total != r.Total || len(blind.Kinds) != 1 {
		t.Errorf("without a file system: %+v (%v), expected the total %+v", blind, err, r.Total)
	}
	files, dirs, kinds := map[string]Space{}, map[string]Space{}, map[Kind]Space{}
	for _, f := range r.Files {
		files[f.Path] = f.Space
	}
	for _, d := range r.Dirs {
		dirs[d.Path] = d.Space
	}
	var sum Space
	for _, k := range r.Kinds {
		kinds[k.Kind] = k.Space
		sum.add(k.Space)
	}
	if sum != r.Total {
		t.Errorf("the kinds sum up to %+v, the total is %+v", sum, r.Total)
	}
	for name, want := range map[string]Space{
		"/a/b/large": {Stored: 2 << 20}, "/a/small": {Stored: 12 << 10}, "/old/kept": {Stored: 1 << 20, Equal: 1 << 20},
	} {
		if files[name] != want {
			t.Errorf("%s has %+v, expected %+v", name, files[name], want)
		}
	}
	if got := dirs["/a"]; got.Stored < 2<<20+12<<10 || got.Stored > 2<<20+30<<10 {
		t.Errorf("/a has %+v", got)
	}
	if got := kinds[Free].Stored; got < 1<<20 {
		t.Errorf("free space has %d bytes, expected those of the removed file", got)
	}
	if kinds[Journal].Stored == 0 || kinds[Metadata].Stored == 0 || kinds[Directory].Stored == 0 {
		t.Errorf("kinds are %+v", r.Kinds)
	}
}

// kept returns where the file /old/kept lies, as if its bytes had been
// written again.
func kept(t *testing.T, image string) []block.Extent {
	t.Helper()
	f, err := Lookup(openImage(t, image), "/old/kept", false)
	if err != nil {
		t.Fatal(err)
	}
	extents, err := f.(*extFile).Extents()
	if err != nil {
		t.Fatal(err)
	}
	var out []block.Extent
	for _, e := range extents {
		out = append(out, block.Extent{Off: e.Phys, N: e.N, State: block.Stored})
	}
	return out
}
