package nbdview

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"testing"
	"time"

	"github.com/cowdev/cowdev/block"
	"github.com/cowdev/cowdev/cow"
	"github.com/cowdev/cowdev/exception"
	"github.com/cowdev/cowdev/internal/disk"
	"github.com/cowdev/cowdev/nbdserver"
)

// A real overlay behind a real server: the view has its bytes and knows its
// exceptions.
func TestView(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	base := make([]byte, 3<<20+512)
	for i := range base {
		base[i] = byte(rng.Uint32())
	}
	f, err := disk.OpenOS(filepath.Join(t.TempDir(), "cow"), os.O_RDWR|os.O_CREATE)
	check(t, err)
	check(t, exception.Create(f, exception.Params{Geometry: block.Geometry{Size: int64(len(base)), ChunkSize: 64 << 10}}))
	store, err := exception.Open(f, exception.Options{})
	check(t, err)
	device := cow.New(origin{bytes.NewReader(base)}, store, cow.Options{})
	for range 20 {
		off := rng.IntN(len(base) - 9000)
		_, err := device.WriteAt(base[:rng.IntN(9000)], int64(off))
		check(t, err)
	}
	check(t, device.Trim(1<<20, 256<<10))

	v, err := Dial("nbd+unix:///disk?socket=" + serve(t, device))
	check(t, err)
	defer v.Close()
	if v.Size() != device.Size() {
		t.Fatalf("size %d, expected %d", v.Size(), device.Size())
	}
	want := make([]byte, len(base))
	_, err = device.ReadAt(want, 0)
	check(t, err)
	got := make([]byte, len(base)+10)
	if n, err := v.ReadAt(got, 0); n != len(base) || !errors.Is(err, io.EOF) || !bytes.Equal(got[:n], want) {
		t.Errorf("read %d bytes (%v) that differ from the device's", n, err)
	}
	extents, err := device.Extents(0, device.Size(), 1<<20)
	check(t, err)
	var stored []block.Extent
	for _, e := range extents {
		if e.State != block.FromBase {
			e.Hole = false
			stored = append(stored, e)
		}
	}
	if got, err := v.Stored(); err != nil || !reflect.DeepEqual(got, stored) {
		t.Errorf("stored are %v (%v), expected %v", got, err, stored)
	}
	check(t, v.Close())
	if _, err := v.ReadAt(got, 0); err == nil {
		t.Error("a closed view can be read")
	}
	check(t, store.Close())
}

func TestDialErrors(t *testing.T) {
	for _, address := range []string{"nbds://localhost", "nbd+unix:///x", "http://x", "/nowhere/socket"} {
		if v, err := Dial(address); err == nil {
			t.Errorf("%s: %v, expected an error", address, v)
		}
	}
}

// origin is bytes as a base.
type origin struct{ *bytes.Reader }

func (o origin) Size() int64 { return o.Reader.Size() }

// serve serves a device as export "disk" and returns the socket's path.
func serve(t *testing.T, device block.Device) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "nv")
	check(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	l, err := net.Listen("unix", filepath.Join(dir, "s"))
	check(t, err)
	s, err := nbdserver.New(nbdserver.Config{Exports: []nbdserver.Export{{Name: "disk", Device: device}}})
	check(t, err)
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Serve(l) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		if err := s.Shutdown(ctx); err != nil {
			t.Errorf("shut the server down: %v", err)
		}
		<-done
	})
	return l.Addr().String()
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
