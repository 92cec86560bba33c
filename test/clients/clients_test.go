package clients

import (
	"encoding/json"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestNbdinfo(t *testing.T) {
	overTransports(t, func(t *testing.T, s *served) {
		var info struct {
			Protocol   string
			Structured bool
			Exports    []map[string]any
		}
		out := run(t, "nbdinfo", "--json", s.uri)
		check(t, json.Unmarshal([]byte(out), &info))
		if info.Protocol != "newstyle-fixed" || !info.Structured || len(info.Exports) != 1 {
			t.Fatalf("nbdinfo says\n%s", out)
		}
		for name, want := range map[string]any{
			"export-size": float64(baseSize), "is_read_only": false, "can_cache": true, "can_df": true,
			"can_fast_zero": true, "can_flush": true, "can_fua": true, "can_multi_conn": true, "can_trim": true, "can_zero": true,
			"block_size_minimum": 1.0, "block_size_preferred": 4096.0, "block_size_maximum": float64(32 << 20),
		} {
			if got := info.Exports[0][name]; got != want {
				t.Errorf("%s is %v, expected %v", name, got, want)
			}
		}
		run(t, "nbdinfo", "--list", s.uri)
		if got := strings.TrimSpace(run(t, "nbdinfo", "--size", s.uri)); got != fmt.Sprint(baseSize) {
			t.Errorf("size %s, expected %d", got, baseSize)
		}
	})
}

// The metadata contexts tell what was written, zeroed and left.
func TestNbdinfoMap(t *testing.T) {
	s := serve(t)
	run(t, "qemu-io", "-f", "raw", "-c", "write -P 7 1M 64k", "-c", "write -z -u 2M 64k", "-c", "discard 3M 64k", s.uri)
	var extents []struct{ Offset, Length, Type uint64 }
	check(t, json.Unmarshal([]byte(run(t, "nbdinfo", "--map=cowdev:source", "--json", s.uri)), &extents))
	at := func(off uint64) uint64 {
		for _, e := range extents {
			if e.Offset <= off && off < e.Offset+e.Length {
				return e.Type
			}
		}
		t.Fatalf("no extent at %d in %v", off, extents)
		return 0
	}
	for off, want := range map[uint64]uint64{0: 0, 1 << 20: 1, 1<<20 + 64<<10: 0, 2 << 20: 2, 3 << 20: 2, baseSize - 1: 0} {
		if got := at(off); got != want {
			t.Errorf("cowdev:source of byte %d is %d, expected %d", off, got, want)
		}
	}
	allocation := run(t, "nbdinfo", "--map", s.uri)
	if !strings.Contains(allocation, "hole,zero") || !strings.Contains(allocation, "data") {
		t.Errorf("base:allocation is\n%s", allocation)
	}
}

// nbdcopy reads all and writes all, and every digest is equal.
func TestNbdcopy(t *testing.T) {
	overTransports(t, func(t *testing.T, s *served) {
		before := digest(t, s.base)
		out := filepath.Join(t.TempDir(), "out.img")
		run(t, "nbdcopy", s.uri, out)
		if digest(t, out) != before {
			t.Error("what nbdcopy read is not the base")
		}
		// The image, backwards by mebibytes, goes in and comes out.
		data, err := os.ReadFile(out)
		check(t, err)
		for i, j := 0, len(data)-1; i < j; i, j = i+1, j-1 {
			data[i], data[j] = data[j], data[i]
		}
		in := filepath.Join(t.TempDir(), "in.img")
		check(t, os.WriteFile(in, data, 0o600))
		run(t, "nbdcopy", "--flush", in, s.uri)
		run(t, "nbdcopy", "--connections=4", "--requests=16", s.uri, out)
		if digest(t, out) != digest(t, in) {
			t.Error("what nbdcopy wrote does not come back")
		}
		if digest(t, s.base) != before {
			t.Error("the base was changed")
		}
	})
}

func TestQemu(t *testing.T) {
	overTransports(t, func(t *testing.T, s *served) {
		run(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", s.base, s.uri)
		run(t, "qemu-io", "-f", "raw",
			"-c", "read -P 0 14M 1M",
			"-c", "write -P 5 4096 64k", "-c", "read -P 5 4096 64k",
			"-c", "write -P 6 1000001 77777", "-c", "read -P 6 1000001 77777",
			"-c", "discard 1M 1M", "-c", "read -P 0 1M 1M",
			"-c", "write -P 9 1M 1M", "-c", "write -z -u 1M 512k", "-c", "read -P 0 1M 512k", "-c", "read -P 9 1572864 512k",
			"-c", "write -f -P 3 5M 4k", "-c", "read -P 3 5M 4k",
			"-c", "aio_write -P 1 6M 1M", "-c", "aio_write -P 2 7M 1M", "-c", "aio_flush",
			"-c", "read -P 1 6M 1M", "-c", "read -P 2 7M 1M", "-c", "flush", s.uri)
		out := filepath.Join(t.TempDir(), "out.qcow2")
		run(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", s.uri, out)
		run(t, "qemu-img", "compare", "-f", "qcow2", "-F", "raw", out, s.uri)
		run(t, "qemu-img", "convert", "-n", "-f", "qcow2", "-O", "raw", out, s.uri)
		run(t, "qemu-img", "compare", "-f", "qcow2", "-F", "raw", out, s.uri)
		var extents []struct {
			Start, Length int64
			Zero, Data    bool
		}
		check(t, json.Unmarshal([]byte(run(t, "qemu-img", "map", "-f", "raw", "--output=json", s.uri)), &extents))
		if last := extents[len(extents)-1]; last.Start+last.Length != baseSize || !last.Zero || len(extents) < 3 {
			t.Errorf("qemu-img map: %+v", extents)
		}
	})
}

// qemu-storage-daemon takes the export and exports it again.
func TestQemuStorageDaemon(t *testing.T) {
	s := serve(t)
	u, err := url.Parse(s.uri)
	check(t, err)
	again := filepath.Join(filepath.Dir(s.cow), "q.sock")
	cmd := command(t, "qemu-storage-daemon",
		"--blockdev", "driver=nbd,node-name=d,server.type=unix,server.path="+u.Query().Get("socket"),
		"--nbd-server", "addr.type=unix,addr.path="+again,
		"--export", "type=nbd,id=e,node-name=d,name=again,writable=on")
	check(t, cmd.Start())
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	for end := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		if _, err := os.Stat(again); err == nil {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("qemu-storage-daemon has no socket after %v", patience)
		}
	}
	run(t, "qemu-io", "-f", "raw", "-c", "write -P 8 1M 1M", "-c", "flush", "nbd+unix:///again?socket="+again)
	run(t, "qemu-io", "-f", "raw", "-r", "-c", "read -P 8 1M 1M", s.uri)
}

func TestFio(t *testing.T) {
	overTransports(t, func(t *testing.T, s *served) {
		out := run(t, "fio", "--name=verify", "--ioengine=nbd", "--uri="+s.uri, "--rw=randrw", "--bsrange=512-64k", "--blockalign=512",
			"--size=8m", "--iodepth=16", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--fsync=64", "--randseed=1")
		if !strings.Contains(out, "err= 0") {
			t.Errorf("fio says\n%s", out)
		}
	})
}

// nbdsh asks for what the other clients never do.
const nbdshScript = `
import errno
assert h.get_size() == SIZE and h.can_multi_conn() and h.can_fast_zero() and h.can_df()
h.pwrite(b"x" * 5000, 4095, nbd.CMD_FLAG_FUA)
chunks = []
got = h.pread_structured(5002, 4094, lambda b, o, s, err: chunks.append((o, s)), nbd.CMD_FLAG_DF)
assert got[1:5001] == b"x" * 5000 and chunks == [(4094, nbd.READ_DATA)], chunks
h.zero(8192, 4096, nbd.CMD_FLAG_NO_HOLE)
seen = []
h.block_status(8192, 4096, lambda m, o, e, err: seen.append((m, o, list(e))))
assert ("base:allocation", 4096, [8192, 0]) in seen, seen
assert ("cowdev:source", 4096, [8192, 1]) in seen, seen
h.trim(4096, 1 << 20)
assert h.pread(4096, 1 << 20) == bytearray(4096)
h.cache(1 << 20, 0)
h.flush()
h.set_strict_mode(0)
def expect(code, what, *args):
    try:
        what(*args)
    except nbd.Error as e:
        assert e.errno == code, (e, code)
    else:
        assert False, (what, args)
expect("EINVAL", h.pread, 1, SIZE)
expect("ENOSPC", h.pwrite, b"x", SIZE)
expect("ENOSPC", h.zero, 1, SIZE)
expect("EINVAL", h.trim, 1, SIZE)
cookies = [h.aio_pread(nbd.Buffer(65536), i * 65536) for i in range(64)]
while cookies:
    h.poll(-1)
    cookies = [c for c in cookies if not h.aio_command_completed(c)]
h.shutdown()
`

func TestNbdsh(t *testing.T) {
	overTransports(t, func(t *testing.T, s *served) {
		script := strings.ReplaceAll(nbdshScript, "SIZE", fmt.Sprint(baseSize))
		connect := fmt.Sprintf("h.add_meta_context('base:allocation'); h.add_meta_context('cowdev:source'); h.connect_uri(%q)", s.uri)
		run(t, python(), "-m", "nbd", "-c", connect, "-c", script)
	})
}

// python returns Debian's Python, which has the module nbd; another that comes
// first may not.
func python() string {
	const debians = "/usr/bin/python3"
	if _, err := os.Stat(debians); err == nil {
		return debians
	}
	return "python3"
}

// nbd-client lists exports without the kernel.
func TestNbdClientList(t *testing.T) {
	s := serve(t, "--listen", "127.0.0.1:0", "--export", "disk")
	u, err := url.Parse(s.uri)
	check(t, err)
	if out := run(t, "nbd-client", "-l", u.Hostname(), u.Port()); !strings.Contains(out, "disk") {
		t.Errorf("nbd-client -l says\n%s", out)
	}
}
