package files

import (
	"bytes"
	"fmt"
	"io"
	"strings"

	"github.com/pmezard/go-difflib/difflib"
)

// WriteContent writes, in the form of diff -u, how the content of the changed
// text files differs. Of a file larger than limit bytes, or of one that holds
// a zero byte near its beginning, only a line says that it differs.
func (r *Result) WriteContent(w io.Writer, limit int64) error {
	for _, ch := range r.Changes {
		if !ch.changesText() {
			continue
		}
		if err := writeText(w, ch, limit); err != nil {
			return fmt.Errorf("compare %s: %w", ch.Path, err)
		}
	}
	return nil
}

// changesText reports whether the content of a regular file changed.
func (c *Change) changesText() bool {
	switch c.Status {
	case Added, Removed:
		return c.Attr().Mode.IsRegular() && c.LinkTo == "" && c.Attr().Size > 0
	}
	return c.Differ&Content != 0
}

func writeText(w io.Writer, ch *Change, limit int64) error {
	from, to := "/dev/null", "/dev/null"
	var old, new []byte
	binary := false
	for _, side := range []struct {
		f       File
		name    *string
		content *[]byte
		path    string
	}{{ch.Old, &from, &old, "a" + ch.oldPath()}, {ch.New, &to, &new, "b" + ch.Path}} {
		if side.f == nil {
			continue
		}
		*side.name = Quote(side.path)
		size := side.f.Attr().Size
		if binary = binary || size > limit; binary {
			continue
		}
		*side.content = make([]byte, size)
		if err := readFull(side.f, *side.content, 0); err != nil {
			return err
		}
		binary = looksBinary(*side.content)
	}
	if binary {
		_, err := fmt.Fprintf(w, "Files %s and %s differ\n", from, to)
		return err
	}
	return difflib.WriteUnifiedDiff(w, difflib.UnifiedDiff{
		A: lines(old), B: lines(new), FromFile: from, ToFile: to, Context: 3,
	})
}

// oldPath returns the path in the old tree.
func (c *Change) oldPath() string {
	if c.From != "" {
		return c.From
	}
	return c.Path
}

// looksBinary is git's rule: a zero byte among the first 8000.
func looksBinary(b []byte) bool { return bytes.IndexByte(b[:min(len(b), 8000)], 0) >= 0 }

// lines cuts a text after its newlines. A last line without one gets diff's
// remark.
func lines(text []byte) []string {
	if len(text) == 0 {
		return nil
	}
	out := strings.SplitAfter(string(text), "\n")
	if last := len(out) - 1; out[last] == "" {
		out = out[:last]
	} else {
		out[last] += "\n\\ No newline at end of file\n"
	}
	return out
}
