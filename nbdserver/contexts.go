package nbdserver

import (
	"encoding/binary"
	"math/bits"
	"strings"

	"github.com/cowdev/cowdev/block"
	"github.com/cowdev/cowdev/internal/nbd"
)

// contexts is a set of metadata contexts, a bit for each of contextNames.
type contexts uint8

// A context's number is its place in contextNames; its id on the wire is one
// more, because zero says nothing in NBD_OPT_LIST_META_CONTEXT.
const (
	baseAllocation = iota // the specification's: which extents are holes and which zero
	cowdevSource          // ours: where bytes come from, a block.State
)

var contextNames = []string{
	baseAllocation: "base:allocation",
	cowdevSource:   "cowdev:source",
}

const allContexts contexts = 1<<2 - 1

func (s contexts) has(i int) bool { return s>>i&1 != 0 }

func (s contexts) count() int { return bits.OnesCount8(uint8(s)) }

func contextID(i int) uint32 { return uint32(i) + 1 }

// contextOf returns the context with an id, as a set of none or one.
func contextOf(id uint32) contexts {
	if id < 1 || int(id) > len(contextNames) {
		return 0
	}
	return 1 << (id - 1)
}

// contextStatus returns what context i says of an extent.
func contextStatus(i int, e *block.Extent) uint32 {
	if i == cowdevSource {
		return uint32(e.State)
	}
	switch {
	case e.Hole:
		return nbd.StateHole | nbd.StateZero
	case e.State == block.Zero:
		return nbd.StateZero
	}
	return 0
}

// metaContext answers NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT.
func (o *option) metaContext() error {
	set := o.code == nbd.OptSetMetaContext
	if !o.h.agreed.chunked() {
		return o.fail(&refusal{nbd.RepErrInvalid, "metadata contexts need structured replies or extended headers"})
	}
	name, queries, ok := parseQueries(o.data)
	if !ok {
		return o.fail(&refusal{nbd.RepErrInvalid, "the option's data is malformed"})
	}
	if o.h.c.srv.export(name) == nil {
		return o.fail(&refusal{nbd.RepErrUnknown, "there is no such export"})
	}
	found := match(queries, !set)
	for i, contextName := range contextNames {
		if !found.has(i) {
			continue
		}
		id := uint32(0)
		if set {
			id = contextID(i)
		}
		o.reply(nbd.RepMetaContext, append(binary.BigEndian.AppendUint32(nil, id), contextName...))
	}
	if set {
		o.h.agreed.contexts, o.h.contextsOf = found, name
	}
	return o.ack()
}

// parseQueries takes apart the data of the two options about contexts.
func parseQueries(data []byte) (export string, queries []string, ok bool) {
	p := parser{data}
	export, ok = p.text()
	count, ok2 := p.uint32()
	if !ok || !ok2 || int64(count)*4 > int64(len(p.rest)) {
		return "", nil, false
	}
	for range count {
		q, ok := p.text()
		if !ok {
			return "", nil, false
		}
		queries = append(queries, q)
	}
	return export, queries, len(p.rest) == 0
}

// match returns the contexts that queries name. When they are listed rather
// than set, no query at all means every one, and "namespace:" all of its.
func match(queries []string, listing bool) contexts {
	if len(queries) == 0 && listing {
		return allContexts
	}
	var found contexts
	for _, q := range queries {
		for i, name := range contextNames {
			wildcard := listing && strings.HasSuffix(q, ":") && strings.HasPrefix(name, q)
			if q == name || wildcard {
				found |= 1 << i
			}
		}
	}
	return found
}
