package main

import (
	"os"
	"path/filepath"
	"testing"
)

// Each run replaces its own part of the page, and nothing else; marks that are
// not there yet are put at the end.
func TestReplaceMarked(t *testing.T) {
	path := filepath.Join(t.TempDir(), "benchmarks.md")
	for _, step := range []struct{ begin, end, text, want string }{
		{beginMark, endMark, "one\n", "# Benchmarks\n\n" + beginMark + "\none\n" + endMark + "\n"},
		{beginVMMark, endVMMark, "two\n", "# Benchmarks\n\n" + beginMark + "\none\n" + endMark + "\n\n" + beginVMMark + "\ntwo\n" + endVMMark + "\n"},
		{beginMark, endMark, "three\n", "# Benchmarks\n\n" + beginMark + "\nthree\n" + endMark + "\n\n" + beginVMMark + "\ntwo\n" + endVMMark + "\n"},
	} {
		if err := replaceMarked(path, step.begin, step.end, step.text); err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if string(got) != step.want {
			t.Fatalf("%q, expected %q", got, step.want)
		}
	}
}
