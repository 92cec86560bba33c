// What a device says of itself, what a change costs, and how it meets a full
// store.
package cow_test

import (
	"bytes"
	"errors"
	"reflect"
	"syscall"
	"testing"
	"time"

	"github.com/cowdev/cowdev/block"
	"github.com/cowdev/cowdev/cow"
	"github.com/cowdev/cowdev/exception"
	"github.com/cowdev/cowdev/internal/disktest"
)

// newDevice returns a device of 1 MiB and a few bytes over a base of 0xbb.
func newDevice(t testing.TB, o cow.Options) (*cow.Device, *disktest.File) {
	t.Helper()
	geo := block.Geometry{Size: 1<<20 + 100, ChunkSize: 64 << 10}
	f := disktest.New(1)
	if err := exception.Create(f, exception.Params{Geometry: geo, LogSize: 64 << 10}); err != nil {
		t.Fatal(err)
	}
	s, err := exception.Open(f, exception.Options{})
	if err != nil {
		t.Fatal(err)
	}
	d := cow.New(base(bytes.Repeat([]byte{0xbb}, int(geo.Size))), s, o)
	t.Cleanup(func() {
		d.Close()
		s.Close()
	})
	return d, f
}

func write(t testing.TB, d *cow.Device, off int64, n int, v byte) {
	t.Helper()
	if _, err := d.WriteAt(bytes.Repeat([]byte{v}, n), off); err != nil {
		t.Fatal(err)
	}
}

func TestExtents(t *testing.T) {
	d, _ := newDevice(t, cow.Options{})
	write(t, d, 4096, 8192, 1)
	write(t, d, 65536+60<<10, 8192, 2) // over a chunk's end
	write(t, d, 1<<20, 50, 3)          // part of the last, short block
	if err := d.Trim(16384, 4096); err != nil {
		t.Fatal(err)
	}
	write(t, d, 300<<10, 4096, 0) // zeros are recorded
	want := []block.Extent{
		{Off: 0, N: 4096, State: block.FromBase},
		{Off: 4096, N: 8192, State: block.Stored},
		{Off: 12288, N: 4096, State: block.FromBase},
		{Off: 16384, N: 4096, State: block.Zero, Hole: true},
		{Off: 20480, N: 106496, State: block.FromBase},
		{Off: 126976, N: 8192, State: block.Stored},
		{Off: 135168, N: 172032, State: block.FromBase},
		{Off: 307200, N: 4096, State: block.Zero, Hole: true},
		{Off: 311296, N: 737280, State: block.FromBase},
		{Off: 1 << 20, N: 100, State: block.Stored},
	}
	got, err := d.Extents(0, d.Size(), 100)
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%v\n got %v\nwant %v", err, got, want)
	}
	if got, err = d.Extents(4096, d.Size()-4096, 2); err != nil || !reflect.DeepEqual(got, want[1:3]) {
		t.Errorf("limited to two: %v, %v", got, err)
	}
}

// A write that is aligned to blocks reads nothing of the base, a smaller one
// its own block.
func TestCopyUpReadsOnlyItsBlocks(t *testing.T) {
	d, _ := newDevice(t, cow.Options{})
	counted := &counting{base: base(bytes.Repeat([]byte{0xbb}, int(d.Size())))}
	d = cow.New(counted, d.Store(), cow.Options{})
	for _, test := range []struct {
		off   int64
		n     int
		reads int64
	}{
		{0, 4096, 0},
		{64<<10 - 8192, 16384, 0},
		{200 << 10, 100, 4096},
		{300<<10 + 10, 4096, 8192},
		{400<<10 + 10, 12288, 8192},
		{300<<10 + 20, 4096, 0}, // both blocks are stored by now
		{1<<20 + 90, 10, 100},   // the device's last block has 100 bytes
	} {
		counted.n = 0
		write(t, d, test.off, test.n, 5)
		if counted.n != test.reads {
			t.Errorf("%d bytes at %d: %d bytes read of the base, expected %d", test.n, test.off, counted.n, test.reads)
		}
	}
	got := make([]byte, 3)
	if _, err := d.ReadAt(got, 300<<10+9); err != nil || !bytes.Equal(got, []byte{0xbb, 5, 5}) {
		t.Errorf("round a copied-up edge: %x, %v", got, err)
	}
}

type counting struct {
	base
	n int64
}

func (c *counting) ReadAt(p []byte, off int64) (int, error) {
	n, err := c.base.ReadAt(p, off)
	c.n += int64(n)
	return n, err
}

func TestFullStoreAnswersENOSPC(t *testing.T) {
	d, f := newDevice(t, cow.Options{})
	write(t, d, 0, 4096, 1)
	f.SetSpace(f.Allocated() + 8192)
	p := bytes.Repeat([]byte{2}, 64<<10)
	if _, err := d.WriteAt(p, 128<<10); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("%v, expected ENOSPC", err)
	}
	if !d.Full() {
		t.Error("the device does not count as full")
	}
	write(t, d, 0, 4096, 3) // what is stored can be written
	if err := d.Flush(); err != nil {
		t.Fatal(err)
	}
	f.SetSpace(0)
	if _, err := d.WriteAt(p, 128<<10); err != nil || d.Full() {
		t.Fatalf("with room again: %v, full %v", err, d.Full())
	}
}

func TestParkedWriteGoesOn(t *testing.T) {
	d, f := newDevice(t, cow.Options{Park: -1})
	write(t, d, 0, 4096, 1)
	f.SetSpace(f.Allocated())
	done := make(chan error)
	go func() {
		_, err := d.WriteAt(bytes.Repeat([]byte{2}, 64<<10), 128<<10)
		done <- err
	}()
	for d.Parked() == 0 {
		time.Sleep(time.Millisecond)
	}
	got := make([]byte, 1)
	if _, err := d.ReadAt(got, 0); err != nil || got[0] != 1 {
		t.Errorf("a read beside a parked write: %x, %v", got, err)
	}
	write(t, d, 0, 4096, 3) // needs no room
	select {
	case err := <-done:
		t.Fatalf("the write did not wait: %v", err)
	default:
	}
	f.SetSpace(0)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	f.SetSpace(f.Allocated())
	go func() {
		_, err := d.WriteAt(bytes.Repeat([]byte{2}, 64<<10), 512<<10)
		done <- err
	}()
	for d.Parked() == 0 {
		time.Sleep(time.Millisecond)
	}
	d.Release()
	if err := <-done; !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("let go: %v, expected ENOSPC", err)
	}
}

func TestErrorsOfTheOrigin(t *testing.T) {
	d, _ := newDevice(t, cow.Options{})
	d = cow.New(failing{base(bytes.Repeat([]byte{0xbb}, int(d.Size())))}, d.Store(), cow.Options{})
	if _, err := d.ReadAt(make([]byte, 10), 70<<10); !errors.Is(err, syscall.EIO) {
		t.Errorf("read: %v, expected EIO", err)
	}
	if _, err := d.WriteAt(make([]byte, 10), 70<<10); !errors.Is(err, syscall.EIO) {
		t.Errorf("copy-up: %v, expected EIO", err)
	}
	write(t, d, 64<<10, 4096, 1) // a whole block needs nothing of it
	if _, err := d.ReadAt(make([]byte, 10), 0); err != nil {
		t.Errorf("another place: %v", err)
	}
}

// failing cannot read its second chunk.
type failing struct{ base }

func (f failing) ReadAt(p []byte, off int64) (int, error) {
	if off+int64(len(p)) > 64<<10 && off < 128<<10 {
		return 0, syscall.EIO
	}
	return f.base.ReadAt(p, off)
}

func BenchmarkWrite(b *testing.B) {
	d, _ := newDevice(b, cow.Options{})
	p := bytes.Repeat([]byte{1}, 4096)
	write(b, d, 0, 1<<20, 1)
	if err := d.Flush(); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for i := range b.N {
		if _, err := d.WriteAt(p, int64(i%256)*4096); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkRead(b *testing.B) {
	d, _ := newDevice(b, cow.Options{})
	p := make([]byte, 4096)
	write(b, d, 0, 1<<19, 1)
	b.ReportAllocs()
	for i := range b.N {
		if _, err := d.ReadAt(p, int64(i%256)*4096); err != nil {
			b.Fatal(err)
		}
	}
}
