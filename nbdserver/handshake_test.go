package nbdserver_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"maps"
	"net"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/cowdev/cowdev/internal/nbd"
	"github.com/cowdev/cowdev/internal/nbdclient"
	"github.com/cowdev/cowdev/nbdserver"
)

// twoExports serves "disk" and the default export.
func twoExports(t *testing.T) *rig {
	return serve(t, nbdserver.Config{Exports: []nbdserver.Export{
		{Name: "disk", Description: "the other one", Device: newMemDevice(testSize)},
		{Device: newMemDevice(testSize + 1)},
	}})
}

// final sends an option and returns the type of its final reply.
func final(t *testing.T, c *nbdclient.Client, code uint32, data ...[]byte) uint32 {
	t.Helper()
	replies, err := c.Option(code, data...)
	check(t, err)
	return replies[len(replies)-1].Type
}

// expectFinal fails unless the final reply to an option is of type want.
func expectFinal(t *testing.T, c *nbdclient.Client, want, code uint32, data ...[]byte) {
	t.Helper()
	if got := final(t, c, code, data...); got != want {
		t.Errorf("option %d with %.60q: final reply %#x, expected %#x", code, bytes.Join(data, nil), got, want)
	}
}

// stillTalks fails unless the client can go on.
func stillTalks(t *testing.T, c *nbdclient.Client) {
	t.Helper()
	check(t, c.Go(""))
	_, err := c.ReadAt(make([]byte, 512), 0)
	check(t, err)
}

func expectEnd(t *testing.T, c *nbdclient.Client) {
	t.Helper()
	if err := c.Ended(); err != nil {
		t.Errorf("expected the server to close the connection: %v", err)
	}
}

func TestGreeting(t *testing.T) {
	nc, err := net.Dial("unix", twoExports(t).socket)
	check(t, err)
	defer nc.Close()
	hello, err := nbdclient.Raw(nc).Recv(18)
	check(t, err)
	if want := "NBDMAGICIHAVEOPT\x00\x03"; string(hello) != want {
		t.Errorf("greeting %q, expected %q", hello, want)
	}
}

func TestUnknownClientFlag(t *testing.T) {
	r := twoExports(t)
	for _, flags := range []uint32{4, 1<<31 | 3, 1 << 16} {
		nc, err := net.Dial("unix", r.socket)
		check(t, err)
		c := nbdclient.Raw(nc)
		c.Recv(18)
		c.Send(nbdclient.Uint32(flags))
		expectEnd(t, c)
		c.Close()
	}
}

func TestUnknownOption(t *testing.T) {
	c := twoExports(t).greet()
	for _, code := range []uint32{0, nbd.OptPeekExport, 12, 1 << 31, 1<<32 - 1} {
		expectFinal(t, c, nbd.RepErrUnsup, code)
		expectFinal(t, c, nbd.RepErrUnsup, code, make([]byte, 60000))
	}
	stillTalks(t, c)
}

func TestOptionMagic(t *testing.T) {
	c := twoExports(t).greet()
	check(t, c.Send(nbdclient.Uint64(nbd.Magic), nbdclient.Uint32(nbd.OptList), nbdclient.Uint32(0)))
	expectEnd(t, c)
}

func TestOptionTooBig(t *testing.T) {
	c := twoExports(t).greet()
	for _, code := range []uint32{nbd.OptGo, nbd.OptList, nbd.OptSetMetaContext, nbd.OptExtendedHeaders} {
		expectFinal(t, c, nbd.RepErrTooBig, code, make([]byte, 1<<20))
	}
	for _, code := range []uint32{0, nbd.OptPeekExport, 12, 99} {
		expectFinal(t, c, nbd.RepErrUnsup, code, make([]byte, 1<<20))
	}
	stillTalks(t, c)
}

func TestOptionLargestLength(t *testing.T) {
	c := twoExports(t).greet()
	check(t, c.Send(nbdclient.Uint64(nbd.OptionMagic), nbdclient.Uint32(nbd.OptInfo), nbdclient.Uint32(1<<32-1)))
	expectEnd(t, c)
}

func TestOptionFlood(t *testing.T) {
	c := twoExports(t).greet()
	for i := 0; ; i++ {
		if _, err := c.Option(nbd.OptList); err != nil {
			if i < 100 {
				t.Errorf("cut off after %d options", i)
			}
			return
		}
		if i > 5000 {
			t.Fatal("5000 options and no end")
		}
	}
}

func TestAbort(t *testing.T) {
	r := twoExports(t)
	for name, data := range map[string][]byte{"alone": nil, "with data": []byte("ignored")} {
		t.Run(name, func(t *testing.T) {
			c := r.greet()
			expectFinal(t, c, nbd.RepErrUnsup, 99)
			expectFinal(t, c, nbd.RepAck, nbd.OptAbort, data)
			expectEnd(t, c)
		})
	}
	t.Run("without waiting", func(t *testing.T) {
		for range 50 {
			c := r.greet()
			check(t, c.SendOption(nbd.OptAbort))
			c.Close()
		}
		stillTalks(t, r.greet())
	})
}

// However much data ABORT comes with, none of it is kept.
func TestAbortLargeData(t *testing.T) {
	c := twoExports(t).greet()
	piece := make([]byte, 1<<20)
	check(t, c.Send(nbdclient.Uint64(nbd.OptionMagic), nbdclient.Uint32(nbd.OptAbort), nbdclient.Uint32(48<<20)))
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for range 48 {
		_, err := c.Write(piece)
		check(t, err)
	}
	reply, err := c.OptionReply(nbd.OptAbort)
	check(t, err)
	runtime.ReadMemStats(&after)
	if got := after.TotalAlloc - before.TotalAlloc; reply.Type != nbd.RepAck || got > 8<<20 {
		t.Errorf("reply %#x, and 48 MiB of data made the server allocate %d KiB", reply.Type, got>>10)
	}
	expectEnd(t, c)
}

func TestList(t *testing.T) {
	c := twoExports(t).greet()
	expectFinal(t, c, nbd.RepErrInvalid, nbd.OptList, []byte("x"))
	replies, err := c.Option(nbd.OptList)
	check(t, err)
	var got []string
	for _, r := range replies {
		got = append(got, fmt.Sprintf("%d %s", r.Type, r.Data))
	}
	want := []string{"2 \x00\x00\x00\x04diskthe other one", "2 \x00\x00\x00\x00", "1 "}
	if !slices.Equal(got, want) {
		t.Errorf("replies %q, expected %q", got, want)
	}
}

func TestExportName(t *testing.T) {
	r := twoExports(t)
	c := r.greet()
	check(t, c.ExportName("disk"))
	if c.Size != testSize || c.Flags != 0xd6d {
		t.Errorf("size %d and flags %#x, expected %d and 0xd6d", c.Size, c.Flags, testSize)
	}
	if _, err := c.WriteAt([]byte("x"), 5); err != nil { // so no zeroes came in between
		t.Error(err)
	}
	for name, prepare := range map[string]func(*nbdclient.Client){
		"nothere":                func(*nbdclient.Client) {},
		"disk\x00":               func(*nbdclient.Client) {},
		strings.Repeat("x", 9e4): func(*nbdclient.Client) {},
		"disk":                   func(c *nbdclient.Client) { check(t, c.ExtendedHeaders()) },
	} {
		c := r.greet()
		prepare(c)
		check(t, c.SendOption(nbd.OptExportName, []byte(name)))
		expectEnd(t, c)
	}
}

// A client that knows nothing of fixed newstyle gets 124 zeroes and a device.
func TestExportNameWithZeroes(t *testing.T) {
	c := twoExports(t).greetOld()
	check(t, c.ExportName(""))
	zeroes, err := c.Recv(124)
	check(t, err)
	if !bytes.Equal(zeroes, make([]byte, 124)) {
		t.Errorf("reserved bytes are %x", zeroes)
	}
	_, err = c.ReadAt(make([]byte, 10), 0)
	check(t, err)
}

func TestInfo(t *testing.T) {
	c := twoExports(t).greet()
	check(t, c.InfoOf("disk", nbd.InfoBlockSize, nbd.InfoName, nbd.InfoDescription, 77, nbd.InfoExport))
	want := map[uint16][]byte{
		nbd.InfoExport:      append(nbdclient.Uint64(testSize), nbdclient.Uint16(0xd6d)...),
		nbd.InfoName:        []byte("disk"),
		nbd.InfoDescription: []byte("the other one"),
		nbd.InfoBlockSize:   slices.Concat(nbdclient.Uint32(1), nbdclient.Uint32(4096), nbdclient.Uint32(32<<20)),
	}
	if !maps.EqualFunc(c.Info, want, bytes.Equal) {
		t.Errorf("information %q, expected %q", c.Info, want)
	}
	check(t, c.InfoOf("disk"))
	if len(c.Info) != 1 {
		t.Errorf("unasked information %q", c.Info)
	}
	info := c.Info
	check(t, c.Go("disk"))
	if !maps.EqualFunc(c.Info, info, bytes.Equal) {
		t.Errorf("GO says %q, INFO said %q", c.Info, info)
	}
	_, err := c.ReadAt(make([]byte, 10), 0)
	check(t, err)
}

func TestInfoErrors(t *testing.T) {
	c := twoExports(t).greet()
	long := strings.Repeat("n", nbd.MaxString+1)
	for _, code := range []uint32{nbd.OptInfo, nbd.OptGo} {
		expectFinal(t, c, nbd.RepErrUnknown, code, nbdclient.InfoQuery("nothere"))
		expectFinal(t, c, nbd.RepErrUnknown, code, nbdclient.InfoQuery("disk\x00"))
		for name, data := range map[string][]byte{
			"empty":              {},
			"half a length":      {0, 0},
			"no count":           nbdclient.Text(""),
			"name past the end":  {0, 0, 0, 9, 'd', 0, 0},
			"largest name":       {255, 255, 255, 255, 0, 0},
			"too few infos":      append(nbdclient.Text(""), 0, 2, 0, 0),
			"too many infos":     append(nbdclient.Text(""), 0, 1, 0, 0, 0, 0),
			"half an info":       append(nbdclient.Text(""), 0, 1, 0),
			"name of 4097 bytes": nbdclient.InfoQuery(long),
			"not UTF-8":          nbdclient.InfoQuery("\xff\xfe"),
		} {
			if got := final(t, c, code, data); got != nbd.RepErrInvalid {
				t.Errorf("option %d, %s: %#x, expected NBD_REP_ERR_INVALID", code, name, got)
			}
		}
	}
	stillTalks(t, c)
}

// A lone export is also the default one, and NBD_INFO_NAME tells its name.
func TestDefaultExport(t *testing.T) {
	r := serve(t, nbdserver.Config{Exports: []nbdserver.Export{{Name: "only", Device: newMemDevice(4096)}}})
	c := r.greet()
	check(t, c.Go("", nbd.InfoName))
	if got := string(c.Info[nbd.InfoName]); got != "only" {
		t.Errorf("canonical name %q, expected \"only\"", got)
	}
}

func TestStructuredReplyOption(t *testing.T) {
	c := twoExports(t).greet()
	expectFinal(t, c, nbd.RepErrInvalid, nbd.OptStructuredReply, []byte("x"))
	check(t, c.InfoOf(""))
	if c.Flags&nbd.FlagSendDF != 0 {
		t.Errorf("flags %#x with SEND_DF before structured replies", c.Flags)
	}
	expectFinal(t, c, nbd.RepAck, nbd.OptStructuredReply)
	expectFinal(t, c, nbd.RepAck, nbd.OptStructuredReply)
	check(t, c.InfoOf(""))
	if c.Flags&nbd.FlagSendDF == 0 || c.Flags&nbd.FlagBlockStatusPayload != 0 {
		t.Errorf("flags %#x without SEND_DF, or with BLOCK_STATUS_PAYLOAD", c.Flags)
	}
}

func TestExtendedHeadersOption(t *testing.T) {
	c := twoExports(t).greet()
	expectFinal(t, c, nbd.RepErrInvalid, nbd.OptExtendedHeaders, []byte("x"))
	check(t, c.ExtendedHeaders())
	expectFinal(t, c, nbd.RepErrExtHeaderReqd, nbd.OptStructuredReply)
	check(t, c.InfoOf(""))
	if c.Flags&(nbd.FlagSendDF|nbd.FlagBlockStatusPayload) != nbd.FlagSendDF {
		t.Errorf("flags %#x, expected SEND_DF and not BLOCK_STATUS_PAYLOAD", c.Flags)
	}
	check(t, c.SetMetaContexts("", "base:allocation"))
	check(t, c.InfoOf("disk"))
	if c.Flags&nbd.FlagBlockStatusPayload != 0 {
		t.Errorf("flags %#x of an export without contexts have BLOCK_STATUS_PAYLOAD", c.Flags)
	}
	check(t, c.Go(""))
	if c.Flags&nbd.FlagBlockStatusPayload == 0 {
		t.Errorf("flags %#x without BLOCK_STATUS_PAYLOAD", c.Flags)
	}
}

// listed returns the contexts of a reply, and fails if its final is not want.
func listed(t *testing.T, c *nbdclient.Client, want, code uint32, data []byte) []string {
	t.Helper()
	replies, err := c.Option(code, data)
	check(t, err)
	last := replies[len(replies)-1]
	if last.Type != want {
		t.Fatalf("option %d: final reply %#x, expected %#x", code, last.Type, want)
	}
	names := []string{}
	for _, r := range replies[:len(replies)-1] {
		if r.Type != nbd.RepMetaContext {
			t.Fatalf("option %d: reply %#x", code, r.Type)
		}
		names = append(names, fmt.Sprint(binary.BigEndian.Uint32(r.Data), " ", string(r.Data[4:])))
	}
	return names
}

func TestMetaContexts(t *testing.T) {
	c := twoExports(t).greet()
	for _, code := range []uint32{nbd.OptListMetaContext, nbd.OptSetMetaContext} {
		expectFinal(t, c, nbd.RepErrInvalid, code, nbdclient.MetaQuery("")) // before structured replies
	}
	check(t, c.StructuredReplies())
	for _, step := range []struct {
		code    uint32
		queries []string
		want    []string
	}{
		{nbd.OptListMetaContext, nil, []string{"0 base:allocation", "0 cowdev:source"}},
		{nbd.OptListMetaContext, []string{"base:"}, []string{"0 base:allocation"}},
		{nbd.OptListMetaContext, []string{"cowdev:"}, []string{"0 cowdev:source"}},
		{nbd.OptListMetaContext, []string{"cowdev:source", "base:allocation", "base:"}, []string{"0 base:allocation", "0 cowdev:source"}},
		{nbd.OptListMetaContext, []string{"qemu:dirty-bitmap:x", "base:nothere", "x-y:z", "nocolon", ""}, []string{}},
		{nbd.OptSetMetaContext, nil, []string{}},
		{nbd.OptSetMetaContext, []string{"base:", "cowdev:"}, []string{}},
		{nbd.OptSetMetaContext, []string{"base:allocation", "base:allocation"}, []string{"1 base:allocation"}},
		{nbd.OptSetMetaContext, []string{"cowdev:source", "qemu:x", "base:allocation"}, []string{"1 base:allocation", "2 cowdev:source"}},
	} {
		got := listed(t, c, nbd.RepAck, step.code, nbdclient.MetaQuery("disk", step.queries...))
		if !slices.Equal(got, step.want) {
			t.Errorf("option %d, %q: %q, expected %q", step.code, step.queries, got, step.want)
		}
	}
}

func TestMetaContextErrors(t *testing.T) {
	c := twoExports(t).greet()
	check(t, c.StructuredReplies())
	for _, code := range []uint32{nbd.OptListMetaContext, nbd.OptSetMetaContext} {
		expectFinal(t, c, nbd.RepErrUnknown, code, nbdclient.MetaQuery("nothere"))
		for _, data := range [][]byte{
			{},
			nbdclient.Text("disk"),
			append(nbdclient.MetaQuery("disk"), 0),
			append(nbdclient.Text("disk"), 0, 0, 0, 1),
			append(nbdclient.Text("disk"), 255, 255, 255, 255, 0, 0, 0, 1, 'x'),
			append(nbdclient.Text("disk"), 0, 0, 0, 1, 255, 255, 255, 255),
			nbdclient.MetaQuery("disk", strings.Repeat("q", nbd.MaxString+1)),
		} {
			expectFinal(t, c, nbd.RepErrInvalid, code, data)
		}
	}
	stillTalks(t, c)
}

// A failed choice replaces the one before it, and a choice for another export
// is none.
func TestMetaContextsReplaced(t *testing.T) {
	r := twoExports(t)
	for name, after := range map[string]func(*nbdclient.Client){
		"failed":       func(c *nbdclient.Client) { c.SetMetaContexts("nothere", "base:allocation") },
		"malformed":    func(c *nbdclient.Client) { final(t, c, nbd.OptSetMetaContext, []byte{1}) },
		"too big":      func(c *nbdclient.Client) { final(t, c, nbd.OptSetMetaContext, make([]byte, 1<<17)) },
		"emptied":      func(c *nbdclient.Client) { check(t, c.SetMetaContexts("")) },
		"other export": func(c *nbdclient.Client) { check(t, c.SetMetaContexts("disk", "base:allocation")) },
		"still in force": func(c *nbdclient.Client) {
			check(t, c.SetMetaContexts("", "base:allocation"))
			final(t, c, nbd.OptListMetaContext, nbdclient.MetaQuery("disk"))
			final(t, c, nbd.OptGo, nbdclient.InfoQuery("nothere"))
		},
	} {
		t.Run(name, func(t *testing.T) {
			c := r.greet()
			check(t, c.StructuredReplies())
			check(t, c.SetMetaContexts("", "base:allocation"))
			after(c)
			check(t, c.Go(""))
			res, err := c.Do(nbdclient.Request{Type: nbd.CmdBlockStatus, Length: 512})
			check(t, err)
			if want := uint32(nbd.EINVAL); name != "still in force" && res.Error != want {
				t.Errorf("block status: error %d, expected %d", res.Error, want)
			} else if name == "still in force" && len(res.Status) != 1 {
				t.Errorf("block status: %+v, expected one context", res)
			}
		})
	}
}

func TestNewChecksConfig(t *testing.T) {
	dev := newMemDevice(512)
	for name, cfg := range map[string]nbdserver.Config{
		"no export":   {},
		"same name":   {Exports: []nbdserver.Export{{Device: dev}, {Device: dev}}},
		"no device":   {Exports: []nbdserver.Export{{}}},
		"long name":   {Exports: []nbdserver.Export{{Name: strings.Repeat("x", 5000), Device: dev}}},
		"TLS of what": {Exports: []nbdserver.Export{{Device: dev}}, TLS: nbdserver.TLSRequire},
	} {
		if _, err := nbdserver.New(cfg); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}
