// Package nbdnl speaks the generic netlink family "nbd", by which Linux's NBD
// driver is given sockets and told of devices (linux/nbd-netlink.h). The
// kernel asks for CAP_SYS_ADMIN.
//
// Each call uses a netlink socket of its own: CONNECT is answered by a message
// besides the acknowledgement, and what is left unread of one call would be
// taken for the answer to the next ("mismatched sequence in netlink reply").
package nbdnl

import (
	"errors"
	"fmt"
	"math"
	"os"
	"time"

	"github.com/mdlayher/genetlink"
	"github.com/mdlayher/netlink"
)

// ErrNoDriver says that the kernel has no NBD driver loaded.
var ErrNoDriver = errors.New("the kernel has no nbd driver loaded (modprobe nbd)")

// AnyDevice as an index lets the kernel choose: the first device that nobody
// uses, picked under its own lock.
const AnyDevice = -1

// Commands of the family.
const (
	cmdConnect     = 1
	cmdDisconnect  = 2
	cmdReconfigure = 3
	cmdStatus      = 5
)

// Attributes, with the names of linux/nbd-netlink.h.
const (
	attrIndex             = 1
	attrSizeBytes         = 2
	attrBlockSizeBytes    = 3
	attrTimeout           = 4
	attrServerFlags       = 5
	attrClientFlags       = 6
	attrSockets           = 7
	attrDeadConnTimeout   = 8
	attrDeviceList        = 9
	attrBackendIdentifier = 10

	deviceItem      = 1
	deviceIndex     = 1
	deviceConnected = 2

	sockItem = 1
	sockFD   = 1
)

// answerLimit bounds the wait for the kernel's answer. It is in no hurry where
// it has to wait for requests of a device that is being torn down.
const answerLimit = 60 * time.Second

// A Config says what the kernel is to make of a device.
type Config struct {
	Index       int    // N of /dev/nbdN, or AnyDevice
	Size        uint64 // bytes
	BlockSize   uint64 // bytes, a power of two from 512 to the page size
	ServerFlags uint64 // NBD_FLAG_*, the transmission flags
	// Timeout is how long a request may take before its connection is given
	// up and the request sent over another, in whole seconds; 0 leaves the
	// kernel's default.
	Timeout time.Duration
	// DeadTimeout is how long requests wait for a new connection once there
	// is none, in whole seconds; 0 fails them at once.
	DeadTimeout time.Duration
	// Identifier is a name of what is behind the device, shown in
	// /sys/block/nbdN/backend; Reconfigure must give the same.
	Identifier string
	Sockets    []*os.File // connected stream sockets, one a connection
}

// Connect makes a device of cfg and returns its index. The sockets stay the
// caller's to close; the kernel has references of its own. A device that is in
// use gives EBUSY.
func Connect(cfg Config) (index int, err error) {
	index = cfg.Index
	// No acknowledgement is asked for: the answer, or an error, is one.
	answers, err := call(cmdConnect, netlink.Request, func(ae *netlink.AttributeEncoder) {
		encode(ae, cfg)
		ae.Uint64(attrSizeBytes, cfg.Size)
		ae.Uint64(attrBlockSizeBytes, cfg.BlockSize)
		ae.Uint64(attrServerFlags, cfg.ServerFlags)
		ae.Uint64(attrClientFlags, 0)
	})
	if err != nil {
		return index, fmt.Errorf("connect %s: %w", name(cfg.Index), err)
	}
	for _, a := range answers {
		ad, err := netlink.NewAttributeDecoder(a.Data)
		if err != nil {
			return index, fmt.Errorf("connect %s: the kernel's answer: %w", name(cfg.Index), err)
		}
		for ad.Next() {
			if ad.Type() == attrIndex {
				index = int(ad.Uint32())
			}
		}
	}
	if index < 0 {
		return index, errors.New("connect: the kernel did not say which device it took")
	}
	return index, nil
}

// Reconfigure gives device cfg.Index new sockets in place of dead ones, and
// new timeouts. Size, block size and flags stay as they are. While no
// connection of the device is dead the kernel takes none and says ENOSPC; with
// another Identifier than the device's it says EINVAL.
func Reconfigure(cfg Config) error {
	_, err := call(cmdReconfigure, netlink.Request|netlink.Acknowledge, func(ae *netlink.AttributeEncoder) {
		encode(ae, cfg)
	})
	if err != nil {
		return fmt.Errorf("reconfigure %s: %w", name(cfg.Index), err)
	}
	return nil
}

// Disconnect tells the kernel to say goodbye on the device's sockets and to
// fail what is in flight. The device is free once its last opener is gone.
func Disconnect(index int) error {
	_, err := call(cmdDisconnect, netlink.Request|netlink.Acknowledge, func(ae *netlink.AttributeEncoder) {
		ae.Uint32(attrIndex, uint32(index))
	})
	if err != nil {
		return fmt.Errorf("disconnect %s: %w", name(index), err)
	}
	return nil
}

// A Device is what Status says of one.
type Device struct {
	Index     int
	Connected bool
}

// Status returns the devices that the driver knows, in no order.
func Status() ([]Device, error) {
	answers, err := call(cmdStatus, netlink.Request, func(ae *netlink.AttributeEncoder) {})
	if err != nil {
		return nil, fmt.Errorf("status of nbd devices: %w", err)
	}
	var devices []Device
	for _, a := range answers {
		if devices, err = decodeStatus(devices, a.Data); err != nil {
			return nil, fmt.Errorf("status of nbd devices: the kernel's answer: %w", err)
		}
	}
	return devices, nil
}

// Available returns nil where the kernel has the driver, ErrNoDriver where it
// has not.
func Available() error {
	c, _, err := dial()
	if err != nil {
		return err
	}
	return c.Close()
}

// encode adds what Connect and Reconfigure share.
func encode(ae *netlink.AttributeEncoder, cfg Config) {
	if cfg.Index != AnyDevice {
		ae.Uint32(attrIndex, uint32(cfg.Index))
	}
	if cfg.Timeout > 0 {
		ae.Uint64(attrTimeout, seconds(cfg.Timeout))
	}
	if cfg.DeadTimeout > 0 {
		ae.Uint64(attrDeadConnTimeout, seconds(cfg.DeadTimeout))
	}
	if cfg.Identifier != "" {
		ae.String(attrBackendIdentifier, cfg.Identifier)
	}
	ae.Nested(attrSockets, func(list *netlink.AttributeEncoder) error {
		for _, f := range cfg.Sockets {
			list.Nested(sockItem, func(item *netlink.AttributeEncoder) error {
				item.Uint32(sockFD, uint32(f.Fd()))
				return nil
			})
		}
		return nil
	})
}

// seconds rounds up, for the kernel counts whole seconds.
func seconds(d time.Duration) uint64 { return uint64(math.Ceil(d.Seconds())) }

func decodeStatus(devices []Device, data []byte) ([]Device, error) {
	ad, err := netlink.NewAttributeDecoder(data)
	if err != nil {
		return nil, err
	}
	for ad.Next() {
		if ad.Type() != attrDeviceList {
			continue
		}
		ad.Nested(func(list *netlink.AttributeDecoder) error {
			for list.Next() {
				if list.Type() != deviceItem {
					continue
				}
				var d Device
				list.Nested(func(item *netlink.AttributeDecoder) error {
					for item.Next() {
						switch item.Type() {
						case deviceIndex:
							d.Index = int(item.Uint32())
						case deviceConnected:
							d.Connected = item.Uint8() != 0
						}
					}
					return nil
				})
				devices = append(devices, d)
			}
			return nil
		})
	}
	return devices, ad.Err()
}

// dial opens a netlink socket and finds the family.
func dial() (*genetlink.Conn, genetlink.Family, error) {
	c, err := genetlink.Dial(nil)
	if err != nil {
		return nil, genetlink.Family{}, fmt.Errorf("open a netlink socket: %w", err)
	}
	if err := c.SetDeadline(time.Now().Add(answerLimit)); err != nil {
		c.Close()
		return nil, genetlink.Family{}, err
	}
	family, err := c.GetFamily("nbd")
	if err != nil {
		c.Close()
		if errors.Is(err, os.ErrNotExist) {
			err = ErrNoDriver
		}
		return nil, genetlink.Family{}, err
	}
	return c, family, nil
}

// call sends one command and returns the kernel's answers to it.
func call(command uint8, flags netlink.HeaderFlags, attrs func(*netlink.AttributeEncoder)) ([]genetlink.Message, error) {
	ae := netlink.NewAttributeEncoder()
	attrs(ae)
	data, err := ae.Encode()
	if err != nil {
		return nil, err
	}
	c, family, err := dial()
	if err != nil {
		return nil, err
	}
	defer c.Close()
	m := genetlink.Message{Header: genetlink.Header{Command: command, Version: family.Version}, Data: data}
	return c.Execute(m, family.ID, flags)
}

func name(index int) string {
	if index == AnyDevice {
		return "an nbd device"
	}
	return fmt.Sprintf("/dev/nbd%d", index)
}
