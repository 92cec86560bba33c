package crash

// The oracle itself: histories of one or two sectors, and what may be found
// after them.

import (
	"bytes"
	"errors"
	"strings"
	"testing"
)

// sec returns a sector of letters.
func sec(b byte) []byte { return bytes.Repeat([]byte{b}, sectorSize) }

// may compares the letters that the first sector may be found as.
func may(t *testing.T, o *Oracle, d Death, want string) {
	t.Helper()
	var got string
	for b := byte('a'); b <= 'z'; b++ {
		p := bytes.Clone(o.sectors[0][0].p[:0])
		p = append(p, sec(b)...)
		if int64(len(p)) < o.size {
			p = append(p, o.candidates(1, d)[0].p...)
		}
		if o.Check(p, d) == nil {
			got += string(b)
		}
	}
	if got != want {
		t.Errorf("after a %v: may be %q, want %q", d, got, want)
	}
}

func begin(t *testing.T, o *Oracle, b byte) *Change {
	t.Helper()
	c, ok := o.Write(sec(b), 0)
	if !ok {
		t.Fatal("a whole sector was refused")
	}
	return c
}

func TestOracleOneWriter(t *testing.T) {
	o := NewOracle(sec('a'))
	may(t, o, Power, "a")

	c := begin(t, o, 'b')
	may(t, o, Process, "ab")
	c.Done(nil)
	may(t, o, Process, "b")
	may(t, o, Power, "ab")

	f := o.Flush()
	begin(t, o, 'c').Done(nil) // acknowledged after the flush began
	f.Done(nil)
	may(t, o, Power, "bc")
	may(t, o, Process, "c")

	begin(t, o, 'd').Done(errors.New("no"))
	may(t, o, Process, "cd")
	begin(t, o, 'e').Done(nil)
	may(t, o, Process, "e")
	may(t, o, Power, "bcde")

	o.Flush().Done(errors.New("no"))
	may(t, o, Power, "bcde")
	o.Flush().Done(nil)
	may(t, o, Power, "e")
}

// TestOracleTwoWriters: of two that overlapped either may have won.
func TestOracleTwoWriters(t *testing.T) {
	o := NewOracle(sec('a'))
	b, c := begin(t, o, 'b'), begin(t, o, 'c')
	c.Done(nil)
	may(t, o, Process, "bc")
	b.Done(nil)
	may(t, o, Process, "bc")
	o.Flush().Done(nil)
	may(t, o, Power, "bc")
	begin(t, o, 'd').Done(nil)
	may(t, o, Process, "d")
}

func TestOracleDeaths(t *testing.T) {
	o := NewOracle(sec('a'))
	begin(t, o, 'b').Done(nil)
	c := begin(t, o, 'c')
	o.While(o.Die)
	c.Done(nil) // too late
	may(t, o, Process, "bc")
	o.Found(sec('c'), Process)
	may(t, o, Process, "c")
	may(t, o, Power, "abc")
	o.Found(sec('b'), Power)
	may(t, o, Power, "b")
}

func TestOracleReads(t *testing.T) {
	o := NewOracle(sec('a'))
	r := o.Reading()
	begin(t, o, 'b').Done(nil)
	o.Flush().Done(nil)
	early := o.Reading()
	if err := r.Done(sec('a'), 0); err != nil {
		t.Errorf("a version that was there when the read began: %v", err)
	}
	if err := early.Done(sec('a'), 0); err == nil {
		t.Error("a version that was out when the read began was let through")
	} else if !strings.Contains(err.Error(), "sector 0 (at 0)") {
		t.Errorf("the error does not say where: %v", err)
	}
	r = o.Reading()
	c := begin(t, o, 'c')
	if err := r.Done(sec('c'), 0); err != nil {
		t.Errorf("a version under way: %v", err)
	}
	c.Done(nil)
	if err := o.Reading().Done(sec('x'), 0); err == nil {
		t.Error("what nobody wrote was let through")
	}
}

// TestOracleReadsGoOn: no read undoes what an earlier one has found.
func TestOracleReadsGoOn(t *testing.T) {
	o := NewOracle(sec('a'))
	early := o.Reading()
	c := begin(t, o, 'b')
	read := func(r *Reading, b byte, want bool) {
		t.Helper()
		if err := r.Done(sec(b), 0); (err == nil) != want {
			t.Errorf("a read of %c: %v", b, err)
		}
	}
	read(o.Reading(), 'a', true)
	beside := o.Reading()
	read(o.Reading(), 'b', true)
	read(o.Reading(), 'a', false)
	read(beside, 'a', true)
	read(early, 'a', true)
	may(t, o, Process, "ab") // nobody was promised it
	c.Done(errors.New("no"))
	read(o.Reading(), 'a', false)
	read(o.Reading(), 'b', true)
	begin(t, o, 'b').Done(nil)
	read(o.Reading(), 'b', true)

	outlasts := o.Reading() // another change
	begin(t, o, 'd').Done(nil)
	begin(t, o, 'e')
	read(outlasts, 'e', true)
	read(o.Reading(), 'd', false)
}

// TestOracleParts writes less than a sector, and a device's short end.
func TestOracleParts(t *testing.T) {
	o := NewOracle(append(sec('a'), 'y', 'z'))
	c, ok := o.Write([]byte("XY"), sectorSize-1)
	if !ok {
		t.Fatal("refused, though all is certain")
	}
	if _, ok := o.Write([]byte("Z"), 5); ok {
		t.Error("accepted beside another change of the sector")
	}
	c.Done(nil)
	want := append(sec('a')[:sectorSize-1], 'X', 'Y', 'z')
	if err := o.Check(want, Process); err != nil {
		t.Error(err)
	}
	if err := o.Check(want[:sectorSize], Process); err == nil {
		t.Error("a shorter device was let through")
	}
}

func TestStamp(t *testing.T) {
	p := make([]byte, 3*sectorSize)
	Stamp(p, 100*sectorSize, 7)
	q := make([]byte, 50)
	Stamp(q, 101*sectorSize+3, 7)
	if !bytes.Equal(q, p[sectorSize+3:][:50]) {
		t.Error("a stamp depends on where it begins")
	}
	for got, want := range map[string]string{
		Describe(p[sectorSize : 2*sectorSize]):        "write 7@101",
		Describe(make([]byte, sectorSize)):            "zeros",
		Describe(append(make([]byte, 8), p[:504]...)): "a mixture of zeros and others",
	} {
		if got != want {
			t.Errorf("described as %q, want %q", got, want)
		}
	}
}
