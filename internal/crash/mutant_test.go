package crash

// Deliberately broken stores: each mutant takes one line of the store away
// that keeps a rule, and the walks must find out. CI builds a few of them;
// COWDEV_LONG=1 all.

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// A mutant is a store that breaks a rule of the exception package's contract.
type mutant struct {
	name     string
	breaks   string // the invariant or rule, and how
	file     string
	old, new string // text of the file, there once
	mode     string // of the walks, which finds it soonest
	ci       bool
}

const (
	alone   = "clients=1,faults=false"
	failing = "clients=1,faults=true"
	crowd   = "clients=3,faults=false"
	each    = "each"  // each_test.go
	found   = "found" // found_test.go
)

var mutants = []mutant{
	{
		name: "failed-sync-told-once", breaks: "2, 9: a commit goes on when a checkpoint beside it was told of its lost data",
		file: "exception/commit.go", mode: found,
		old: "s.file.SyncBeside()",
		new: "s.file.Sync()",
	},
	{
		name: "torn-punch-believed", breaks: "R18: the log's room is taken for whole though a close gave it back",
		file: "exception/recover.go", mode: crowd,
		old: "\tif s.shape.Clean {\n\t\treturn n, nil",
		new: "\tif s.shape.Clean {\n\t\treturn s.shape.logLen, nil",
	},
	{
		name: "mapping-before-data", breaks: "2: records the mapping of data that is not durable",
		file: "exception/commit.go", mode: alone, ci: true,
		old: "commitInPlace(changes []change) error {\n\tif err := s.sync(); err != nil {",
		new: "commitInPlace(changes []change) error {\n\tif err := error(nil); err != nil {",
	},
	{
		name: "inline-without-data", breaks: "2: a record without the data it should hold",
		file: "exception/commit.go", mode: alone,
		old: "here := ch.mask & ch.entry.Stored(); here != 0 ||",
		new: "here := ch.mask &^ ch.mask; here != 0 ||",
	},
	{
		name: "acknowledge-early", breaks: "3a, R3: a flush waits for a commit that began before it came",
		file: "exception/commit.go", mode: crowd, ci: true,
		old: "want := c.begun + 1;",
		new: "want := max(c.begun, c.ended+1);",
	},
	{
		name: "acknowledge-failed", breaks: "3a, R8: a failed append is passed over",
		file: "exception/log.go", mode: failing,
		old: "return s.fail(fmt.Sprintf(\"append record %d to the log\", r.seq), err)",
		new: "return err",
	},
	{
		name: "overwrite-not-dirty", breaks: "3a, R2: a block overwritten in place is not marked",
		file: "exception/write.go", mode: alone,
		old: "\ts.live.mark(c, touched)\n\treturn nil",
		new: "\treturn nil",
	},
	{
		name: "forget-the-dead", breaks: "3b, R4: the live table of a dead process is not taken over",
		file: "exception/load.go", mode: alone,
		old: "s.adopted = !h.Clean &&",
		new: "s.adopted = false && !h.Clean &&",
	},
	{
		name: "replay-over-cache", breaks: "3b, R4: inline data of the log goes over newer data in the page cache",
		file: "exception/load.go", mode: alone,
		old: "\tif s.adopted {\n\t\treturn nil // the page cache is newer than any record (R4)\n\t}\n",
		new: "",
	},
	{
		name: "close-forgets-the-adopted", breaks: "3b: an orderly close leaves what was taken over in memory alone",
		file: "exception/store.go", mode: alone,
		old: "if s.started.Load() || s.adopted {",
		new: "if s.started.Load() {",
	},
	{
		name: "failed-overwrite-not-dirty", breaks: "3a: what a failed overwrite put in place is read, and not flushed",
		file: "exception/write.go", mode: alone,
		old: "\t\ts.live.mark(c, touched)\n",
		new: "",
	},
	{
		name: "copy-up-from-base", breaks: "4: a zeroed block that is written in part is filled from the base",
		file: "cow/write.go", mode: alone,
		old: "\t\tr, _ := w.one() // a block is in one state\n",
		new: "\t\tr, _ := w.one()\n\t\tr.state &= block.Stored\n",
	},
	{
		name: "slot-freed-at-once", breaks: "5, R19: a dropped slot is taken again before the record without it is durable",
		file: "exception/write.go", mode: alone, ci: true,
		old: "s.slots.drop(extent{slot, uint32(stop - b)})",
		new: "s.slots.add([]extent{{slot, uint32(stop - b)}})",
	},
	{
		name: "slot-freed-under-readers", breaks: "5, R19: a dropped slot is taken again while readers see it",
		file: "exception/write.go", mode: crowd,
		old: "oldest := s.readers.oldest()",
		new: "oldest := uint64(1 << 62)",
	},
	{
		name: "punch-after-free", breaks: "5, R19: a slot is punched after it may have been taken",
		file: "exception/write.go", mode: crowd,
		old: "\ts.punchSlots(drained)\n\ts.slots.add(drained)\n",
		new: "\ts.slots.add(drained)\n\ts.punchSlots(drained)\n",
	},
	{
		name: "row-freed-at-once", breaks: "5, R19: a dropped row is taken again before the record without it is durable",
		file: "exception/write.go", mode: alone,
		old: "s.rows.drop(extent{row + 1, 1})",
		new: "s.rows.add([]extent{{row + 1, 1}})",
	},
	{
		name: "left-row-freed-at-once", breaks: "5, R19: the row that a chunk leaves for another is taken again at once",
		file: "exception/write.go", mode: alone,
		old: "s.rows.drop(extent{old + 1, 1})",
		new: "s.rows.add([]extent{{old + 1, 1}})",
	},
	{
		name: "row-changed", breaks: "2: a row comes to name another slot for a block",
		file: "exception/write.go", mode: alone,
		old: "hasRow && s.live.rowHasNone(old, m):\n\t\ts.setRow(old, b, x)",
		new: "hasRow:\n\t\ts.setRow(old, b, x)",
	},
	{
		name: "moved-not-dirty", breaks: "2: blocks that were copied to other slots are not synced there",
		file: "exception/write.go", mode: alone,
		old: "s.live.mark(c, all)",
		new: "s.live.mark(c, added)",
	},
	{
		name: "row-named-in-part", breaks: "2: a record names only the new blocks of a row that is new",
		file: "exception/commit.go", mode: alone, ci: true,
		old: "if old, ok := was.row(); ok && old == row {",
		new: "if old, ok := was.row(); ok || old == row {",
	},
	{
		name: "row-not-written", breaks: "R15: the log is freed though the table's rows are old",
		file: "exception/commit.go", mode: alone,
		old: "\t\t\ts.table.touch(s.rowPage(row))\n",
		new: "\t\t\t_ = row\n",
	},
	{
		name: "row-of-another", breaks: "R12: replay believes what a record says of a row that its chunk has no more",
		file: "exception/load.go", mode: alone,
		old: "k > 0 && final(n.chunk).home() == n.entry.home() &&",
		new: "k > 0 &&",
	},
	{
		name: "row-after-entry", breaks: "2: the entries of a dead process are durable before their rows",
		file: "exception/recover.go", mode: alone,
		old: "[]map[int64]bool{rows, pages}",
		new: "[]map[int64]bool{pages, rows}",
	},
	{
		name: "row-from-table", breaks: "3b, R4: the table's rows go over those of a dead process's memory",
		file: "exception/load.go", mode: alone,
		old: "\tif ld.s.adopted { // what is in memory is newer\n",
		new: "\tif false { // what is in memory is newer\n",
	},
	{
		name: "open-believes-the-cache", breaks: "R13: nothing is synced before the recovery's first write",
		file: "exception/recover.go", mode: alone,
		old: "if err := s.sync(); err != nil {\n\t\treturn err\n\t}\n\tif err := s.findBelieved()",
		new: "if !s.shape.Clean {\n\t} else if err := s.sync(); err != nil {\n\t\treturn err\n\t}\n\tif err := s.findBelieved()",
	},
	{
		name: "clean-open-believes-the-cache", breaks: "R13: a clean store's superblock may be in the page cache alone",
		file: "exception/recover.go", mode: each,
		old: "if err := s.sync(); err != nil {\n\t\treturn err\n\t}\n\tif err := s.findBelieved()",
		new: "if s.shape.Clean {\n\t} else if err := s.sync(); err != nil {\n\t\treturn err\n\t}\n\tif err := s.findBelieved()",
	},
	{
		name: "no-barrier", breaks: "R6: replay puts inline data over newer data in place",
		file: "exception/load.go", mode: alone,
		old: "if r.flags&flagBarrier != 0 {",
		new: "if r.flags&flagBarrier != 0 && false {",
	},
	{
		name: "barrier-forgotten", breaks: "R6: a commit in place without a record, though inline data is live",
		file: "exception/commit.go", mode: alone,
		old: "if len(runs) == 0 && !s.commits.inline {",
		new: "if len(runs) == 0 {",
	},
	{
		name: "checkpoint-without-sync", breaks: "R15: the log is freed though its data is not in place",
		file: "exception/commit.go", mode: alone,
		old: "syncing(func() error { return s.syncBeside(\"sync the store\") })",
		new: "syncing(func() error { return nil })",
	},
	{
		name: "tail-before-table", breaks: "R15: the log is freed before the table is durable",
		file: "exception/commit.go", mode: alone,
		old: "\treturn s.syncBeside(\"sync the table\")\n",
		new: "\treturn nil\n",
	},
	{
		name: "table-of-live", breaks: "R1: the table is written from what no record says",
		file: "exception/commit.go", mode: crowd,
		old: "return s.committed[n].Load()\n",
		new: "return s.live.entries[n].Load()\n",
	},
	{
		name: "good-superblock-first", breaks: "R16: the superblock that was believed is written while the other is torn",
		file: "exception/store.go", mode: alone,
		old: "[]int64{superA + superB - s.believed, s.believed}",
		new: "[]int64{superA, superB}",
	},
	{
		name: "both-superblocks-at-once", breaks: "R16: the second superblock is written before the first is durable",
		file: "exception/store.go", mode: alone,
		old: "\t\tif err := s.syncBeside(\"sync superblock\"); err != nil {\n\t\t\treturn err\n\t\t}\n",
		new: "\t\tif at == s.believed {\n\t\t\tif err := s.syncBeside(\"sync superblock\"); err != nil {\n\t\t\t\treturn err\n\t\t\t}\n\t\t}\n",
	},
	{
		name: "retry-a-failed-sync", breaks: "9, R26: a failed sync is passed over and the next one believed",
		file: "exception/commit.go", mode: failing,
		old: "return s.fail(\"sync the store\", err)",
		new: "return nil",
	},
	{
		name: "cache-after-failed-sync", breaks: "R26: cached pages are believed after a failed sync",
		file: "exception/load.go", mode: failing,
		old: "if s.header.Clean && !s.live.wasBroken(s.header.UUID) {",
		new: "if s.header.Clean || s.live.wasBroken(s.header.UUID) {",
	},
	{
		name: "good-superblock-from-cache", breaks: "R16, R26: the good superblock is chosen from the cache, after a failed sync without a word",
		file: "exception/recover.go", mode: found,
		old: "if err := s.findBelieved(); err != nil {",
		new: "if err := error(nil); err != nil {",
	},
	{
		name: "half-read-is-good", breaks: "9: a block that could be read in part is committed with zeros",
		file: "exception/commit.go", mode: failing,
		old: "if err != nil && (err != io.EOF || got == 0) {",
		new: "if err != nil && (err != io.EOF && got < 0) {",
	},
	{
		name: "recovery-taken-up-half-way", breaks: "9, R26: a flush after a failed recovery ends it without its table",
		file: "exception/recover.go", mode: failing,
		old: "\tif err := s.Broken(); err != nil {\n\t\treturn err // a recovery that failed is not taken up half way\n\t}\n",
		new: "",
	},
}

// TestMutantsApply holds the mutants to the source they change.
func TestMutantsApply(t *testing.T) {
	for _, m := range mutants {
		if _, err := m.source(); err != nil {
			t.Error(err)
		}
	}
}

func TestMutants(t *testing.T) {
	if testing.Short() {
		t.Skip("builds the tests again for each")
	}
	for _, m := range mutants {
		if !m.ci && os.Getenv("COWDEV_LONG") == "" {
			continue
		}
		t.Run(m.name, func(t *testing.T) {
			begin := time.Now()
			out, err := m.walk(t)
			if err == nil {
				t.Errorf("not found by %s: %s\n%s", m.mode, m.breaks, out)
				return
			}
			why, found := violation(out)
			if !found {
				t.Fatalf("the walks of a store that breaks %s ended otherwise: %v\n%s", m.breaks, err, out)
			}
			t.Logf("breaks %s; found in %.1fs with the build: %s", m.breaks, time.Since(begin).Seconds(), why)
		})
	}
}

const repository = "../.."

// source returns the mutant's file.
func (m mutant) source() (string, error) {
	p, err := os.ReadFile(filepath.Join(repository, m.file))
	if err != nil {
		return "", err
	}
	if n := strings.Count(string(p), m.old); n != 1 {
		return "", fmt.Errorf("mutant %s: %s has %d times, expected once:\n%s", m.name, m.file, n, m.old)
	}
	return strings.Replace(string(p), m.old, m.new, 1), nil
}

// walk builds the tests of this package over the mutant and runs the walks. It
// returns what they print.
func (m mutant) walk(t *testing.T) (string, error) {
	src, err := m.source()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	changed := filepath.Join(dir, "mutant.go")
	original, err := filepath.Abs(filepath.Join(repository, m.file))
	if err != nil {
		t.Fatal(err)
	}
	overlay, err := json.Marshal(map[string]any{"Replace": map[string]string{original: changed}})
	if err != nil {
		t.Fatal(err)
	}
	for name, p := range map[string][]byte{"mutant.go": []byte(src), "overlay.json": overlay} {
		if err := os.WriteFile(filepath.Join(dir, name), p, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	binary := filepath.Join(dir, "walks")
	if out, err := run(5*time.Minute, "go", "test", "-c", "-vet=off", "-overlay="+filepath.Join(dir, "overlay.json"), "-o", binary, "."); err != nil {
		t.Fatalf("build of the mutant: %v\n%s", err, out)
	}
	return run(5*time.Minute, binary, "-test.run", tests(m.mode), "-test.v", "-hunt")
}

// tests returns the pattern of the tests of a mode.
func tests(mode string) string {
	switch mode {
	case each:
		return "TestDieAtEachStep|TestFailEachOperation"
	case found:
		return "TestFound"
	}
	return "TestWalks/" + mode
}

// run runs a command to its end, at most for a time, and returns what it
// prints.
func run(limit time.Duration, name string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 10 * time.Second
	out, err := cmd.CombinedOutput()
	if ctx.Err() != nil {
		err = fmt.Errorf("not done within %v: %w", limit, err)
	}
	return string(out), err
}

// violation returns what the walks found. A store that panics is caught too.
func violation(out string) (string, bool) {
	for _, mark := range []string{"seed ", "power cut in ", "panic: "} {
		if _, rest, found := strings.Cut(out, mark); found {
			line, _, _ := strings.Cut(rest, "\n")
			return mark + line, true
		}
	}
	return "", false
}
