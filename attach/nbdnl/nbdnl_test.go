package nbdnl

import (
	"errors"
	"os"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/mdlayher/netlink"
)

// What is put into a CONNECT comes out as the header file of the kernel has
// it. The calls themselves are proven in a guest (test/vm).
func TestEncode(t *testing.T) {
	ae := netlink.NewAttributeEncoder()
	encode(ae, Config{Index: 3, Timeout: 1500 * time.Millisecond, DeadTimeout: time.Second, Identifier: "id", Sockets: []*os.File{os.Stdin, os.Stdout}})
	data, err := ae.Encode()
	if err != nil {
		t.Fatal(err)
	}
	ad, err := netlink.NewAttributeDecoder(data)
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]uint64{}
	for ad.Next() {
		switch ad.Type() {
		case 1:
			got["index"] = uint64(ad.Uint32())
		case 4:
			got["timeout"] = ad.Uint64()
		case 8:
			got["dead"] = ad.Uint64()
		case 10:
			got[ad.String()]++
		case 7:
			ad.Nested(func(l *netlink.AttributeDecoder) error {
				for l.Next() {
					l.Nested(func(i *netlink.AttributeDecoder) error {
						for i.Next() {
							got["fds"] = got["fds"]*10 + uint64(i.Uint32())
						}
						return nil
					})
				}
				return nil
			})
		}
	}
	want := map[string]uint64{"index": 3, "timeout": 2, "dead": 1, "id": 1, "fds": 1}
	if diff := cmp.Diff(want, got); diff != "" || ad.Err() != nil {
		t.Errorf("%s %v", diff, ad.Err())
	}
}

func TestDecodeStatus(t *testing.T) {
	ae := netlink.NewAttributeEncoder()
	ae.Nested(attrDeviceList, func(l *netlink.AttributeEncoder) error {
		for i := range uint32(2) {
			l.Nested(deviceItem, func(d *netlink.AttributeEncoder) error {
				d.Uint32(deviceIndex, i)
				d.Uint8(deviceConnected, uint8(i))
				return nil
			})
		}
		return nil
	})
	data, err := ae.Encode()
	if err != nil {
		t.Fatal(err)
	}
	got, err := decodeStatus(nil, data)
	want := []Device{{Index: 0}, {Index: 1, Connected: true}}
	if diff := cmp.Diff(want, got); diff != "" || err != nil {
		t.Errorf("%s %v", diff, err)
	}
}

// Without the driver every call says so by its own error.
func TestNoDriver(t *testing.T) {
	if err := Available(); err == nil {
		t.Skip("this kernel has the nbd driver")
	} else if !errors.Is(err, ErrNoDriver) {
		t.Skipf("no generic netlink here: %v", err)
	}
	if _, err := Status(); !errors.Is(err, ErrNoDriver) {
		t.Errorf("status: %v", err)
	}
	if err := Disconnect(0); !errors.Is(err, ErrNoDriver) {
		t.Errorf("disconnect: %v", err)
	}
}
