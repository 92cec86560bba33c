package files

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// sfdisk writes a table into a new image and says what it wrote.
func sfdisk(t *testing.T, image, script string) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "script")
	if err := os.WriteFile(name, []byte(script), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := exec.LookPath("sh"); err != nil {
		t.Fatal(err)
	}
	run(t, "sh", "-c", fmt.Sprintf("PATH=$PATH:/sbin:/usr/sbin; sfdisk -q %s < %s", image, name))
	return run(t, "sfdisk", "-d", image)
}

// Partitions are those that sfdisk lists, in number, place and size.
func TestPartitions(t *testing.T) {
	for _, c := range []struct{ table, script string }{
		{"gpt", "label: gpt\nsize=8M, name=one\nsize=4M\nstart=40M, size=16M, type=U, name=\"a name\"\n"},
		{"mbr", "label: dos\nsize=8M\nsize=4M, type=c\n"},
		{"mbr", "label: dos\nsize=4M\nsize=40M, type=5\nsize=4M\n5: size=8M\n6: size=2M\n7: size=3M, type=82\n"},
	} {
		image := blank(t, 64<<20)
		dump := sfdisk(t, image, c.script)
		parts, table, err := Partitions(openReader(t, image))
		if err != nil || table != c.table {
			t.Fatalf("%s: table %q, %v", c.script, table, err)
		}
		var got []string
		for _, p := range parts {
			got = append(got, fmt.Sprintf("%d: start=%d, size=%d", p.Number, p.Off/512, p.N/512))
		}
		if want := dumped(dump, image); strings.Join(got, "\n") != strings.Join(want, "\n") {
			t.Errorf("%s:\n%s\nexpected\n%s", c.script, strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
	}
}

// dumped takes number, start and size out of sfdisk's dump.
func dumped(dump, image string) []string {
	var out []string
	for line := range strings.Lines(dump) {
		rest, ok := strings.CutPrefix(line, image)
		if !ok {
			continue
		}
		var n, start, size int64
		if _, err := fmt.Sscanf(strings.Join(strings.Fields(rest), " "), "%d : start= %d, size= %d", &n, &start, &size); err == nil {
			out = append(out, fmt.Sprintf("%d: start=%d, size=%d", n, start, size))
		}
	}
	return out
}

// A file system in a logical partition opens; without a choice the message
// names the partitions there are.
func TestChoosePartition(t *testing.T) {
	image := blank(t, 64<<20)
	sfdisk(t, image, "label: dos\nsize=4M\nsize=40M, type=5\n5: size=4M\n6: size=16M\n")
	r := openReader(t, image)
	if _, err := Open(r); err == nil || !strings.Contains(err.Error(), "--partition") || !strings.Contains(err.Error(), "1, 2, 5, 6") {
		t.Errorf("open without a choice: %v", err)
	}
	p, err := Choose(r, 6)
	if err != nil {
		t.Fatal(err)
	}
	fat := blank(t, p.N)
	run(t, "mkfs.vfat", "-n", "SIX", fat)
	b, err := os.ReadFile(fat)
	if err != nil {
		t.Fatal(err)
	}
	w, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if _, err := w.WriteAt(b, p.Off); err != nil {
		t.Fatal(err)
	}
	fsys, err := Open(p.In(r))
	if err != nil || fsys.Info().Label != "SIX" {
		t.Errorf("partition 6: %v, %v", fsys, err)
	}
	if _, err := Choose(r, 7); err == nil || !strings.Contains(err.Error(), "7") {
		t.Errorf("partition 7: %v", err)
	}
}
