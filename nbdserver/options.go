package nbdserver

import (
	"encoding/binary"
	"fmt"
	"unicode/utf8"

	"github.com/cowdev/cowdev/internal/nbd"
)

// An option is one request of the handshake and what it is answered with.
type option struct {
	h    *handshake
	code uint32
	data []byte
	out  []byte // replies that have not been sent
}

var refusalUnknown = &refusal{nbd.RepErrUnsup, "unknown option"}

// known says that handle has an answer of its own to an option.
func known(code uint32) bool {
	return nbd.OptExportName <= code && code <= nbd.OptExtendedHeaders && code != nbd.OptPeekExport
}

// handle answers the option. It reports whether the transmission phase begins.
func (o *option) handle() (done bool, err error) {
	switch o.code {
	case nbd.OptExportName:
		return true, o.exportName()
	case nbd.OptAbort:
		o.ack() // the client may be gone already, which is as good
		return false, errGoodbye
	case nbd.OptList:
		return false, o.list()
	case nbd.OptStartTLS:
		return false, o.h.startTLS(o)
	case nbd.OptInfo:
		_, err := o.info()
		return false, err
	case nbd.OptGo:
		return o.info()
	case nbd.OptStructuredReply:
		return false, o.structuredReply()
	case nbd.OptExtendedHeaders:
		return false, o.extendedHeaders()
	case nbd.OptListMetaContext, nbd.OptSetMetaContext:
		return false, o.metaContext()
	}
	return false, o.fail(refusalUnknown)
}

// exportName is the way into the transmission phase that cannot fail but by
// ending the session.
func (o *option) exportName() error {
	n := &o.h.agreed
	if n.extended {
		return fmt.Errorf("handshake: NBD_OPT_EXPORT_NAME after NBD_OPT_EXTENDED_HEADERS, expected NBD_OPT_GO")
	}
	e := o.h.c.srv.export(string(o.data))
	if e == nil {
		return fmt.Errorf("handshake: there is no export %.100q", o.data)
	}
	o.h.choose(e, string(o.data))
	o.out = binary.BigEndian.AppendUint64(o.out, uint64(e.Device.Size()))
	o.out = binary.BigEndian.AppendUint16(o.out, n.transmissionFlags(e))
	if !o.h.noZeroes {
		o.out = append(o.out, make([]byte, 124)...)
	}
	return o.send()
}

// choose makes e, which the client called name, the export of the session.
func (h *handshake) choose(e *Export, name string) {
	h.agreed.export = e
	if h.contextsOf != name {
		h.agreed.contexts = 0
	}
}

func (o *option) list() error {
	if len(o.data) != 0 {
		return o.fail(&refusal{nbd.RepErrInvalid, "NBD_OPT_LIST has no data"})
	}
	for i := range o.h.c.srv.cfg.Exports {
		e := &o.h.c.srv.cfg.Exports[i]
		body := binary.BigEndian.AppendUint32(nil, uint32(len(e.Name)))
		body = append(body, e.Name...)
		body = append(body, e.Description...)
		o.reply(nbd.RepServer, body)
	}
	return o.ack()
}

func (o *option) structuredReply() error {
	switch {
	case len(o.data) != 0:
		return o.fail(&refusal{nbd.RepErrInvalid, "NBD_OPT_STRUCTURED_REPLY has no data"})
	case o.h.agreed.extended:
		return o.fail(&refusal{nbd.RepErrExtHeaderReqd, "extended headers were agreed on already"})
	}
	o.h.agreed.structured = true
	return o.ack()
}

func (o *option) extendedHeaders() error {
	if len(o.data) != 0 {
		return o.fail(&refusal{nbd.RepErrInvalid, "NBD_OPT_EXTENDED_HEADERS has no data"})
	}
	o.h.agreed.extended = true
	return o.ack()
}

// info answers NBD_OPT_INFO and NBD_OPT_GO. It reports whether the export was
// accepted.
func (o *option) info() (ok bool, err error) {
	name, wanted, ok := parseInfo(o.data)
	if !ok {
		return false, o.fail(&refusal{nbd.RepErrInvalid, "the option's data is malformed"})
	}
	e := o.h.c.srv.export(name)
	if e == nil {
		return false, o.fail(&refusal{nbd.RepErrUnknown, "there is no such export"})
	}
	if o.code == nbd.OptGo {
		o.h.choose(e, name)
	}
	flags := o.h.agreed.transmissionFlags(e)
	if o.h.contextsOf != name {
		flags &^= nbd.FlagBlockStatusPayload
	}
	o.replyExport(e, flags)
	for info := range uint16(nbd.InfoBlockSize + 1) {
		if wanted&(1<<info) != 0 {
			o.replyInfo(e, info)
		}
	}
	return true, o.ack()
}

// parseInfo takes apart the data of NBD_OPT_INFO and NBD_OPT_GO. wanted has a
// bit for each known information type that is asked for.
func parseInfo(data []byte) (name string, wanted uint16, ok bool) {
	p := parser{data}
	name, ok = p.text()
	count, ok2 := p.uint16()
	if !ok || !ok2 || len(p.rest) != 2*int(count) {
		return "", 0, false
	}
	for len(p.rest) > 0 {
		if info, _ := p.uint16(); info <= nbd.InfoBlockSize {
			wanted |= 1 << info
		}
	}
	return name, wanted, true
}

func (o *option) replyExport(e *Export, flags uint16) {
	body := binary.BigEndian.AppendUint16(nil, nbd.InfoExport)
	body = binary.BigEndian.AppendUint64(body, uint64(e.Device.Size()))
	body = binary.BigEndian.AppendUint16(body, flags)
	o.reply(nbd.RepInfo, body)
}

func (o *option) replyInfo(e *Export, info uint16) {
	body := binary.BigEndian.AppendUint16(nil, info)
	switch info {
	case nbd.InfoName:
		body = append(body, e.Name...)
	case nbd.InfoDescription:
		if e.Description == "" {
			return
		}
		body = append(body, e.Description...)
	case nbd.InfoBlockSize:
		body = binary.BigEndian.AppendUint32(body, minBlock)
		body = binary.BigEndian.AppendUint32(body, preferredBlock)
		body = binary.BigEndian.AppendUint32(body, maxPayload)
	default:
		return
	}
	o.reply(nbd.RepInfo, body)
}

// reply adds a reply to what is to be sent.
func (o *option) reply(kind uint32, body []byte) {
	o.out = binary.BigEndian.AppendUint64(o.out, nbd.OptionReplyMagic)
	o.out = binary.BigEndian.AppendUint32(o.out, o.code)
	o.out = binary.BigEndian.AppendUint32(o.out, kind)
	o.out = binary.BigEndian.AppendUint32(o.out, uint32(len(body)))
	o.out = append(o.out, body...)
}

func (o *option) ack() error {
	o.reply(nbd.RepAck, nil)
	return o.send()
}

// fail answers with an error in place of all replies so far.
func (o *option) fail(r *refusal) error {
	o.out = o.out[:0]
	o.reply(r.code, []byte(r.text))
	return o.send()
}

func (o *option) send() error {
	if _, err := o.h.c.nc.Write(o.out); err != nil {
		return fmt.Errorf("handshake: reply to option %d: %w", o.code, err)
	}
	return nil
}

// A parser takes values off the front of an option's data.
type parser struct{ rest []byte }

func (p *parser) uint16() (uint16, bool) {
	if len(p.rest) < 2 {
		return 0, false
	}
	v := binary.BigEndian.Uint16(p.rest)
	p.rest = p.rest[2:]
	return v, true
}

func (p *parser) uint32() (uint32, bool) {
	if len(p.rest) < 4 {
		return 0, false
	}
	v := binary.BigEndian.Uint32(p.rest)
	p.rest = p.rest[4:]
	return v, true
}

// text takes a string behind its 32-bit length.
func (p *parser) text() (string, bool) {
	n, ok := p.uint32()
	if !ok || n > nbd.MaxString || int(n) > len(p.rest) {
		return "", false
	}
	s := p.rest[:n]
	p.rest = p.rest[n:]
	return string(s), utf8.Valid(s)
}
