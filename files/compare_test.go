package files

import (
	"archive/tar"
	"bytes"
	"errors"
	"flag"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

var seed = flag.Uint64("files.seed", 1, "seed of the random trees; with COWDEV_LONG it comes from the clock")

// newRand returns random numbers whose seed a failing test prints.
func newRand(t *testing.T) *rand.Rand {
	s := *seed
	if os.Getenv("COWDEV_LONG") != "" && s == 1 {
		s = uint64(time.Now().UnixNano())
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("run again with -files.seed=%d", s)
		}
	})
	return rand.New(rand.NewPCG(s, s))
}

// Random changes by the kernel: the fast way finds what comparing everything
// finds, and both what rsync finds between the mounted images. The layer
// applied to the old tree gives the new one.
func TestCompare(t *testing.T) {
	for _, c := range []struct {
		name    string
		unclean bool
		mkfs    []string
	}{
		{"ext4", false, []string{"-t", "ext4"}},
		{"ext4 unclean", true, []string{"-t", "ext4"}},
		{"ext4 1k blocks", true, []string{"-t", "ext4", "-b", "1024", "-I", "128"}},
		{"ext4 inline", false, []string{"-t", "ext4", "-O", "inline_data,^resize_inode"}},
		{"ext2", false, []string{"-t", "ext2"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			rng := newRand(t)
			checkPair(t, makePair(t, rng, 48<<20, 300, 120, c.unclean, c.mkfs...))
		})
	}
}

// checkPair compares a pair in every way there is.
func checkPair(t *testing.T, p pairOf) {
	t.Helper()
	flat := compareBothWays(t, p, true)
	compareBothWays(t, p, false)
	compareRsync(t, p, flat)
	checkLayer(t, p, flat)
}

// A byte that changed without any mark in the file's inode, as by an overlay
// that was taken between the write of data and that of metadata, is found.
func TestCompareUnmarked(t *testing.T) {
	rng := newRand(t)
	dir := plainTree(t, rng, 200)
	p := pairOf{old: blank(t, 16<<20), new: filepath.Join(t.TempDir(), "new.img")}
	run(t, "mke2fs", "-q", "-F", "-t", "ext4", "-d", dir, p.old)
	run(t, "cp", p.old, p.new)
	root, err := openImage(t, p.old).Root()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	var places []Place
	err = Walk("/", root, func(name string, f File) error {
		if found, err := Places(f); err == nil && f.Attr().Mode.IsRegular() && len(found) > 0 {
			names, places = append(names, name), append(places, found[0])
		}
		return nil
	})
	if err != nil || len(names) == 0 {
		t.Fatalf("%d files with content, %v", len(names), err)
	}
	i := rng.IntN(len(names))
	w, err := os.OpenFile(p.new, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	b := make([]byte, 1)
	if _, err := w.ReadAt(b, places[i].Start); err != nil {
		t.Fatal(err)
	}
	b[0]++
	if _, err := w.WriteAt(b, places[i].Start); err != nil {
		t.Fatal(err)
	}
	p.changed = differences(t, p.old, p.new)
	r := compareBothWays(t, p, false)
	if len(r.Changes) != 1 || r.Changes[0].Path != names[i] || r.Changes[0].Bytes != 1 || r.Changes[0].Differ != Content {
		t.Errorf("changes are %q, expected one byte of %s", describe(r.Changes), names[i])
	}
}

// Names that begin or cease to share a file are told, and the layer makes them.
func TestCompareLinks(t *testing.T) {
	needMount(t)
	p := pairOf{old: blank(t, 16<<20)}
	run(t, "mke2fs", "-q", "-F", "-t", "ext4", p.old)
	dir, unmount := mount(t, p.old, "rw")
	run(t, "sh", "-ec", "cd "+dir+"; for f in a c; do echo same > $f; done; cp -a a b; ln c d; mkdir sub; ln c sub/e")
	unmount()
	p.new = scratch(t, p.old)
	dir, unmount = mount(t, p.new, "rw")
	run(t, "sh", "-ec", "cd "+dir+"; ln -f a b; cp -a d d2; mv d2 d")
	unmount()
	p.changed = differences(t, p.old, p.new)
	r := compareBothWays(t, p, false)
	var got []string
	for _, ch := range r.Changes {
		if ch.Path != "/" {
			got = append(got, ch.String())
		}
	}
	want := []string{"attributes /b  (link to /a; links)", "attributes /d  (links)"}
	if !slices.Equal(got, want) {
		t.Errorf("changes are %q, expected %q", got, want)
	}
	checkLayer(t, p, r)
}

// File systems that were made apart are compared wholly.
func TestCompareApart(t *testing.T) {
	rng := newRand(t)
	images := [2]string{}
	for i := range images {
		images[i] = blank(t, int64(8+8*i)<<20)
		run(t, "mke2fs", "-q", "-F", "-t", "ext4", "-b", "1024", "-d", plainTree(t, rng, 30), images[i])
	}
	r, err := Compare(openImage(t, images[0]), openImage(t, images[1]), Options{})
	if err != nil || r.Fast || len(r.Changes) == 0 {
		t.Errorf("%+v, %v: expected changes found by comparing all", r, err)
	}
}

// TestCompareLong does as TestCompare with random features, sizes and numbers,
// COWDEV_LONG times.
func TestCompareLong(t *testing.T) {
	rounds, _ := strconv.Atoi(os.Getenv("COWDEV_LONG"))
	if rounds == 0 {
		t.Skip("COWDEV_LONG=ROUNDS runs it")
	}
	for range rounds {
		rng := newRand(t)
		args := []string{"-t", []string{"ext2", "ext3", "ext4", "ext4", "ext4"}[rng.IntN(5)], "-b", []string{"1024", "2048", "4096"}[rng.IntN(3)]}
		if args[1] == "ext4" {
			features := []string{"inline_data", "ea_inode", "metadata_csum_seed", "orphan_file", "fast_commit", "meta_bg,^resize_inode", "^has_journal", "^metadata_csum", "^64bit", "^extent,^64bit", "bigalloc", "sparse_super2", "large_dir", "^flex_bg", "^dir_index"}
			rng.Shuffle(len(features), func(i, j int) { features[i], features[j] = features[j], features[i] })
			args = append(args, "-O", strings.Join(features[:rng.IntN(4)], ","), "-I", []string{"128", "256", "512"}[rng.IntN(3)])
		}
		if out, err := command("mke2fs", append(args, "-q", "-F", blank(t, 48<<20))...); err != nil {
			t.Logf("not possible: mke2fs %v: %s", args, out)
			continue
		}
		unclean := rng.IntN(2) == 0
		t.Logf("mke2fs %v, unclean %v", args, unclean)
		checkPair(t, makePair(t, rng, 48<<20, 50+rng.IntN(800), 1+rng.IntN(400), unclean, args...))
		if t.Failed() {
			return
		}
	}
}

// compareBothWays compares a pair fast and wholly and returns the fast result.
func compareBothWays(t *testing.T, p pairOf, noRenames bool) *Result {
	t.Helper()
	var got [2]*Result
	for i, all := range []bool{false, true} {
		r, err := Compare(openImage(t, p.old), openImage(t, p.new), Options{Changed: p.changed, All: all, NoRenames: noRenames})
		if err != nil {
			t.Fatalf("compare (all=%v): %v", all, err)
		}
		if r.Fast == all {
			t.Fatalf("all=%v: compared with fast=%v", all, r.Fast)
		}
		got[i] = r
	}
	fast, all := describe(got[0].Changes), describe(got[1].Changes)
	if !slices.Equal(fast, all) {
		t.Errorf("fast finds otherwise than comparing all\nonly fast:\n%s\nonly all:\n%s", onlyIn(fast, all), onlyIn(all, fast))
	}
	if len(fast) == 0 {
		t.Error("no change at all")
	}
	return got[0]
}

// compareRsync compares a result without renames with what rsync -i says.
func compareRsync(t *testing.T, p pairOf, r *Result) {
	old, _ := mount(t, scratch(t, p.old), "ro")
	// A copy whose journal the kernel replays.
	recovered := scratch(t, p.new)
	_, unmount := mount(t, recovered, "rw")
	unmount()
	new, _ := mount(t, recovered, "ro")
	out := run(t, "rsync", "-naHAXc", "--delete", "-i", "--modify-window=-1", new+"/", old+"/")
	want, wantLinks := rsyncLines(out, r.Links)
	got, gotLinks := ourLines(r.Changes, r.Links)
	ours, rsyncs := onlyIn(got, append(want, wantLinks...)), onlyIn(want, append(got, gotLinks...))
	if ours != "" || rsyncs != "" {
		t.Errorf("rsync disagrees\nonly ours:\n%s\nonly rsync's:\n%s", ours, rsyncs)
	}
}

func scratch(t *testing.T, image string) string {
	name := filepath.Join(t.TempDir(), "copy.img")
	run(t, "cp", "--sparse=always", image, name)
	return name
}

// rsyncLines makes "path status [aspects]" of rsync's lines. A changed file with
// several names is named by the first, without aspects: rsync tells them for
// any one of the names. In relinked are those of which it says no more than
// that they become a link, whatever else that changes.
func rsyncLines(out string, links map[uint64][]string) (lines, relinked []string) {
	byPath, linked := map[string]string{}, map[string]string{}
	for line := range strings.Lines(out) {
		const width = len("YXcstpoguax")
		if len(line) < width+2 {
			byPath[line] = "is not understood"
			continue
		}
		flags, name := strings.TrimSpace(line[:width]), strings.TrimSuffix(line[width+1:], "\n")
		name, _, _ = strings.Cut(name, " => ")
		if flags[1] == 'L' {
			name, _, _ = strings.Cut(name, " -> ")
		}
		name = path.Join("/", name)
		switch {
		case len(flags) == 2:
			noteChanged(linked, name, 0, links)
		case flags == "*deleting":
			if byPath[name] == "" {
				byPath[name] = "removed"
			}
		case flags[2] == '+':
			byPath[name] = "added"
		default:
			noteChanged(byPath, name, rsyncAspects(flags), links)
		}
	}
	return pathLines(byPath), pathLines(linked)
}

func noteChanged(byPath map[string]string, name string, a Aspect, links map[uint64][]string) {
	for _, paths := range links {
		if len(paths) > 1 && slices.Contains(paths, name) {
			byPath[paths[0]+" and others"] = "changed"
			return
		}
	}
	byPath[name] = "changed " + a.String()
}

// rsyncAspects turns YXcstpoguax into aspects.
func rsyncAspects(flags string) (a Aspect) {
	aspects := map[rune]Aspect{'c': Content, 's': Content, 't': Time, 'p': Mode, 'o': Owner, 'g': Group, 'a': Xattrs, 'x': Xattrs}
	for _, c := range flags[2:] {
		a |= aspects[c]
	}
	return a
}

// ourLines makes the same of changes.
func ourLines(changes []*Change, links map[uint64][]string) (lines, relinked []string) {
	byPath, linked := map[string]string{}, map[string]string{}
	for _, ch := range changes {
		switch {
		case ch.Status == Added || ch.Status == Removed && byPath[ch.Path] == "":
			byPath[ch.Path] = ch.Status.String()
		case ch.Status == Removed:
		case ch.Differ == Links:
			noteChanged(linked, ch.Path, 0, links)
		default:
			a := ch.Differ &^ Links
			if a&contents != 0 {
				a = a&^contents | Content
			}
			noteChanged(byPath, ch.Path, a, links)
		}
	}
	return pathLines(byPath), pathLines(linked)
}

func pathLines(byPath map[string]string) []string {
	var out []string
	for name, what := range byPath {
		out = append(out, name+" "+what)
	}
	slices.Sort(out)
	return out
}

// checkLayer applies a layer to the old tree and compares it with the new one.
func checkLayer(t *testing.T, p pairOf, r *Result) {
	newFS := openImage(t, p.new)
	var layer bytes.Buffer
	if _, err := r.WriteTar(&layer, newFS); err != nil {
		t.Fatal(err)
	}
	old := scratch(t, p.old)
	dir, unmount := mount(t, old, "user_xattr,acl")
	applyLayer(t, dir, layer.Bytes())
	unmount()
	left, err := Compare(openImage(t, old), newFS, Options{All: true, NoRenames: true})
	if err != nil {
		t.Fatal(err)
	}
	for _, ch := range left.Changes {
		t.Errorf("after the layer: %v", ch)
	}
}

// applyLayer removes what the layer's whiteouts name and has tar unpack the
// rest.
func applyLayer(t *testing.T, dir string, layer []byte) {
	t.Helper()
	for r := tar.NewReader(bytes.NewReader(layer)); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		at := filepath.Join(dir, h.Name)
		if parent, name := filepath.Split(at); strings.HasPrefix(name, whiteout) {
			if err := os.RemoveAll(filepath.Join(parent, name[len(whiteout):])); err != nil {
				t.Fatal(err)
			}
			continue
		}
		// What has another type than the file in the layer makes room for it;
		// attributes that the layer does not have are gone.
		if info, err := os.Lstat(at); err == nil && (info.IsDir() != (h.Typeflag == tar.TypeDir) || !info.IsDir()) {
			if err := os.RemoveAll(at); err != nil {
				t.Fatal(err)
			}
		}
		clearXattrs(t, at)
	}
	file := filepath.Join(t.TempDir(), "layer.tar")
	if err := os.WriteFile(file, layer, 0o600); err != nil {
		t.Fatal(err)
	}
	run(t, "tar", "-C", dir, "-x", "--numeric-owner", "-p", "--xattrs", "--xattrs-include=*", "--exclude=.wh.*", "-f", file)
}

func clearXattrs(t *testing.T, name string) {
	t.Helper()
	if _, err := os.Lstat(name); errors.Is(err, fs.ErrNotExist) {
		return
	}
	buf := make([]byte, 64<<10)
	n, err := unix.Llistxattr(name, buf)
	if err != nil {
		t.Fatal(err)
	}
	for attr := range strings.SplitSeq(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00") {
		if attr != "" {
			if err := unix.Lremovexattr(name, attr); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// The counts of differing bytes are those of a loop over the bytes.
func TestCountDiffering(t *testing.T) {
	rng := newRand(t)
	for range 200 {
		a := randomBytes(rng, rng.IntN(9000))
		b := bytes.Clone(a)
		want := int64(0)
		for range rng.IntN(50) {
			if len(b) > 0 {
				b[rng.IntN(len(b))] ^= byte(1 + rng.IntN(255))
			}
		}
		for i := range a {
			if a[i] != b[i] {
				want++
			}
		}
		if got := countDiffering(a, b); got != want {
			t.Fatalf("%d bytes differ, counted %d", want, got)
		}
	}
}

// A text's difference reads as diff -u writes it.
func TestContent(t *testing.T) {
	images := [2]string{}
	for i, tree := range []map[string]string{
		{"a": "one\ntwo\nthree\n", "b": "same", "bin": "\x00a", "gone": "x\n"},
		{"a": "one\n2\nthree\n", "b": "same", "bin": "\x00b", "new": "no newline"},
	} {
		dir := t.TempDir()
		for name, text := range tree {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
			if err := os.Chtimes(filepath.Join(dir, name), time.Unix(0, 0), time.Unix(0, 0)); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.Chtimes(dir, time.Unix(0, 0), time.Unix(0, 0)); err != nil {
			t.Fatal(err)
		}
		images[i] = filepath.Join(t.TempDir(), "image")
		run(t, "mksquashfs", dir, images[i], "-no-progress")
	}
	r, err := Compare(openImage(t, images[0]), openImage(t, images[1]), Options{})
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := r.WriteContent(&out, 1<<20); err != nil {
		t.Fatal(err)
	}
	want := "--- a/a\n+++ b/a\n@@ -1,3 +1,3 @@\n one\n-two\n+2\n three\n" +
		"Files a/bin and b/bin differ\n" +
		"--- a/gone\n+++ /dev/null\n@@ -1 +0,0 @@\n-x\n" +
		"--- /dev/null\n+++ b/new\n@@ -0,0 +1 @@\n+no newline\n\\ No newline at end of file\n"
	if out.String() != want {
		t.Errorf("got\n%s\nexpected\n%s", out.String(), want)
	}
	if got, want := r.Changes[0].String(), "modified   /a  (10 bytes)"; got != want {
		t.Errorf("the first change reads %q, expected %q", got, want)
	}
}
