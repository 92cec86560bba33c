// Package tidy holds the tree to its own rules: which package may import
// which, and that each says what it is for.
package tidy

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/cowdev/cowdev/"

// below lists what each package may import of ours, besides block. A package
// that is not listed may import anything; a test may too.
var below = map[string][]string{
	"block":              {},
	"internal/disk":      {},
	"internal/nbd":       {},
	"exception":          {"internal/disk"},
	"cow":                {"exception", "internal/disk"},
	"image":              {"internal/disk"},
	"merge":              {"exception", "image", "internal/disk"},
	"nbdserver":          {"internal/nbd"},
	"files/ext4":         {},
	"internal/disktest":  {"internal/disk"},
	"internal/nbdclient": {"internal/nbd"},
}

type listed struct {
	ImportPath string
	Doc        string
	Imports    []string
	GoFiles    []string
}

func packages(t *testing.T) []listed {
	t.Helper()
	cmd := exec.Command("go", "list", "-json=ImportPath,Doc,Imports,GoFiles", "./...")
	cmd.Dir = "../.."
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	var all []listed
	for d := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p listed
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
}

func TestArrowsPointDown(t *testing.T) {
	for _, p := range packages(t) {
		name := strings.TrimPrefix(p.ImportPath, module)
		allowed, ruled := below[name]
		if !ruled {
			continue
		}
		for _, i := range p.Imports {
			ours, ok := strings.CutPrefix(i, module)
			if ok && ours != "block" && !slices.Contains(allowed, ours) {
				t.Errorf("%s imports %s, which is not below it", name, ours)
			}
		}
	}
}

func TestEveryPackageSaysWhatItIsFor(t *testing.T) {
	for _, p := range packages(t) {
		if len(p.GoFiles) > 0 && p.Doc == "" {
			t.Errorf("%s has no package comment", p.ImportPath)
		}
	}
}
