package crash

// kill -9 of the real server under fio, a writer that is not ours with checks
// of its own: it writes blocks that tell their place, their round and their
// checksum, with an fsync now and then, and keeps word of which were
// completed. The server is killed in the middle of it; over the next one fio
// must find each completed block, flushed or not (3b).

import (
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

const (
	fioBlock   = 4096
	fioRegion  = 1 << 20 // bytes of the device that a job of a round writes, each block once
	fioJobs    = 8       // connections, with one write each under way
	fioRegions = 4       // rounds until one writes over another's
)

func TestFio(t *testing.T) {
	rounds := 8
	if long() {
		rounds = 300
	}
	f := newFio(t)
	begin := time.Now()
	for round := 0; round < rounds && (long() || time.Since(begin) < 8*time.Second); round++ {
		f.round(round)
	}
	// What the last rounds wrote has outlived the kills that came after.
	for round := max(0, f.rounds-fioRegions); round < f.rounds; round++ {
		f.verify(round)
	}
	f.seesDamage()
	if err := f.server.close(); err != nil {
		t.Fatal(err)
	}
	if f.cut == 0 {
		t.Errorf("none of %d kills came while fio wrote", f.rounds)
	}
	t.Logf("%d rounds, %d of them killed while fio wrote; %d writes completed, %d fsyncs; %d blocks verified, no mismatch; in %.1fs",
		f.rounds, f.cut, f.written, f.syncs, f.verified, time.Since(begin).Seconds())
}

// fio is a device that fio writes, round after round.
type fio struct {
	t           *testing.T
	dir         string
	base, store string
	server      *server

	rounds, cut              int
	written, syncs, verified int
}

func newFio(t *testing.T) *fio {
	if out, err := exec.Command("fio", "--enghelp=nbd").CombinedOutput(); err != nil || !strings.Contains(string(out), "uri") {
		t.Skipf("fio with its NBD engine: %v: %s", err, out)
	}
	f := &fio{t: t, dir: shortDir(t)}
	f.base, f.store = filepath.Join(f.dir, "base"), filepath.Join(f.dir, "cow")
	if err := os.WriteFile(f.base, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(f.base, fioRegions*fioJobs*fioRegion); err != nil {
		t.Fatal(err)
	}
	f.start()
	t.Cleanup(func() { f.server.kill(); f.server.wait() })
	return f
}

func (f *fio) start() {
	f.t.Helper()
	var err error
	if f.server, err = serve(f.dir, "--format=raw", "--base-digest=sample", f.base, f.store); err != nil {
		f.t.Fatal(err)
	}
}

// round writes, kills the server somewhere in it, and looks for all that fio
// had an answer to.
func (f *fio) round(round int) {
	f.t.Helper()
	f.rounds++
	const all = fioJobs * fioRegion
	relay := f.relay(all/50 + rand.Int64N(all-all/25))
	r, err := f.run(round, relay.socket, "--do_verify=0", "--verify_state_save=1")
	relay.close()
	if err := f.server.wait(); err != nil {
		f.t.Fatalf("round %d: fio has ended, and the server was not killed: %v\n%s", round, err, r.out)
	}
	if err == nil {
		f.t.Fatalf("round %d: fio has not seen the kill:\n%s", round, r.out)
	}
	completed := r.writes - fioJobs // fio counts the last of each job, which failed
	if r.writes < all/fioBlock {
		f.cut++
	}
	f.written += completed
	f.syncs += r.syncs
	f.start()
	if n := f.verify(round); n < completed {
		f.t.Fatalf("round %d: fio verified %d blocks, and had %d completed", round, n, completed)
	}
}

// verify has fio read what it had completed in a round, and returns how many
// blocks that are.
func (f *fio) verify(round int) int {
	f.t.Helper()
	r, err := f.check(round)
	if err != nil {
		f.t.Fatalf("round %d: completed blocks are not found: %v\n%s", round, err, r.out)
	}
	f.verified += r.reads
	return r.reads
}

func (f *fio) check(round int) (fioRun, error) {
	return f.run(round, f.server.socket, "--verify_only", "--verify_state_load=1", "--verify_state_save=0")
}

// seesDamage shows that fio would have told: what the last round wrote is
// taken away.
func (f *fio) seesDamage() {
	f.t.Helper()
	d, err := f.server.dial()
	if err != nil {
		f.t.Fatal(err)
	}
	defer d.c.Close()
	if err := d.Trim(f.offset(f.rounds-1), fioJobs*fioRegion); err != nil {
		f.t.Fatal(err)
	}
	if r, err := f.check(f.rounds - 1); err == nil || !strings.Contains(r.out, "bad magic header") {
		f.t.Fatalf("fio verified blocks that are not there: %v\n%s", err, r.out)
	}
}

// offset returns where a round writes.
func (f *fio) offset(round int) int64 { return int64(round) % fioRegions * fioJobs * fioRegion }

// A fioRun is what fio said of one run.
type fioRun struct {
	out                  string
	reads, writes, syncs int
}

// run runs the jobs of a round, with fio's files of the round in its place.
func (f *fio) run(round int, socket string, args ...string) (fioRun, error) {
	f.t.Helper()
	aux := filepath.Join(f.dir, fmt.Sprintf("round%d", round%fioRegions))
	if err := os.MkdirAll(aux, 0o700); err != nil {
		f.t.Fatal(err)
	}
	report := filepath.Join(aux, "report")
	out, err := command(patience, "fio", append([]string{
		"--name=job", "--thread", "--ioengine=nbd", "--uri=nbd+unix:///?socket=" + socket,
		"--rw=randwrite", fmt.Sprintf("--bs=%d", fioBlock), "--fsync=16", "--verify=crc32c",
		fmt.Sprintf("--randseed=%d", round+1), fmt.Sprintf("--numjobs=%d", fioJobs), fmt.Sprintf("--size=%d", fioRegion),
		fmt.Sprintf("--offset=%d", f.offset(round)), fmt.Sprintf("--offset_increment=%d", fioRegion),
		"--aux-path=" + aux, "--output=" + report, "--output-format=json",
	}, args...)...)
	p, rerr := os.ReadFile(report)
	if rerr != nil {
		f.t.Fatalf("fio left no report: %v: %v\n%s", rerr, err, out)
	}
	var said struct {
		Jobs []struct {
			Error int
			Read  struct{ Total_IOs int }
			Write struct{ Total_IOs int }
			Sync  struct{ Total_IOs int }
		}
	}
	_, jsonPart, _ := strings.Cut(string(p), "{")
	if jerr := json.Unmarshal([]byte("{"+jsonPart), &said); jerr != nil {
		f.t.Fatalf("fio's report: %v\n%s\n%s", jerr, p, out)
	}
	r := fioRun{out: out + string(p)}
	for i, j := range said.Jobs {
		r.reads += j.Read.Total_IOs
		r.writes += j.Write.Total_IOs
		r.syncs += j.Sync.Total_IOs
		if j.Error != 0 && err == nil {
			err = fmt.Errorf("job %d ended with error %d", i, j.Error)
		}
	}
	return r, err
}

// A relay passes connections on to the server, and kills it in their midst.
type relay struct {
	socket string
	l      net.Listener
}

// relay begins one that kills the server when n bytes have come from clients.
func (f *fio) relay(n int64) *relay {
	f.t.Helper()
	r := &relay{socket: filepath.Join(f.dir, "relay")}
	os.Remove(r.socket)
	var err error
	if r.l, err = net.Listen("unix", r.socket); err != nil {
		f.t.Fatal(err)
	}
	server := f.server
	var left atomic.Int64
	left.Store(n)
	go func() {
		for {
			client, err := r.l.Accept()
			if err != nil {
				return
			}
			to, err := net.Dial("unix", server.socket)
			if err != nil {
				client.Close()
				continue
			}
			go func() { io.Copy(client, to); client.Close() }()
			go func() {
				defer to.Close()
				buf := make([]byte, 16<<10)
				for {
					got, err := client.Read(buf)
					if got > 0 {
						if _, err := to.Write(buf[:got]); err != nil {
							return
						}
						if left.Add(-int64(got)) <= 0 {
							server.kill()
						}
					}
					if err != nil {
						return
					}
				}
			}()
		}
	}()
	return r
}

func (r *relay) close() { r.l.Close() }
