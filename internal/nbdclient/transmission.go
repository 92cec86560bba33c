package nbdclient

import (
	"encoding/binary"
	"fmt"

	"github.com/cowdev/cowdev/internal/nbd"
)

// A Request is a request message. Length is taken from Payload where that is
// set and Length is not.
type Request struct {
	Flags, Type uint16
	Cookie      uint64 // zero: the client chooses one
	Offset      uint64
	Length      uint64
	Payload     []byte
}

// Encode returns the request as it lies on the wire.
func (c *Client) Encode(r Request) []byte {
	if r.Payload != nil && r.Length == 0 {
		r.Length = uint64(len(r.Payload))
	}
	var p []byte
	if c.Extended {
		p = binary.BigEndian.AppendUint32(p, nbd.ExtendedRequestMagic)
	} else {
		p = binary.BigEndian.AppendUint32(p, nbd.RequestMagic)
	}
	p = binary.BigEndian.AppendUint16(p, r.Flags)
	p = binary.BigEndian.AppendUint16(p, r.Type)
	p = binary.BigEndian.AppendUint64(p, r.Cookie)
	p = binary.BigEndian.AppendUint64(p, r.Offset)
	if c.Extended {
		p = binary.BigEndian.AppendUint64(p, r.Length)
	} else {
		p = binary.BigEndian.AppendUint32(p, uint32(r.Length))
	}
	return append(p, r.Payload...)
}

// Request sends r and returns its cookie.
func (c *Client) Request(r Request) (cookie uint64, err error) {
	if r.Cookie == 0 {
		c.cookie++
		r.Cookie = c.cookie
	}
	c.Expect(r)
	return r.Cookie, c.Send(c.Encode(r))
}

// Expect notes that r has been sent by other means.
func (c *Client) Expect(r Request) {
	if r.Type == nbd.CmdRead {
		c.reads[r.Cookie] = int(r.Length)
	}
}

// A Message is one message of the server: a simple reply or a chunk.
type Message struct {
	Simple  bool
	Error   uint32 // of a simple reply
	Flags   uint16 // of a chunk
	Type    uint16 // of a chunk
	Cookie  uint64
	Offset  uint64 // of an extended chunk
	Payload []byte
}

// Done says that nothing more follows for this request.
func (m *Message) Done() bool { return m.Simple || m.Flags&nbd.ReplyFlagDone != 0 }

// Receive receives one message.
func (c *Client) Receive() (Message, error) {
	head, err := c.Recv(4)
	if err != nil {
		return Message{}, err
	}
	switch magic := binary.BigEndian.Uint32(head); {
	case magic == nbd.SimpleReplyMagic && !c.Extended:
		return c.receiveSimple()
	case magic == nbd.StructuredReplyMagic && c.Structured && !c.Extended:
		return c.receiveChunk(nbd.StructuredReplyHeaderSize)
	case magic == nbd.ExtendedReplyMagic && c.Extended:
		return c.receiveChunk(nbd.ExtendedReplyHeaderSize)
	default:
		return Message{}, fmt.Errorf("reply has magic %#x", magic)
	}
}

func (c *Client) receiveSimple() (m Message, err error) {
	head, err := c.Recv(nbd.SimpleReplySize - 4)
	if err != nil {
		return m, err
	}
	m = Message{Simple: true, Error: binary.BigEndian.Uint32(head), Cookie: binary.BigEndian.Uint64(head[4:])}
	n, read := c.reads[m.Cookie]
	if read && c.Structured {
		return m, fmt.Errorf("simple reply to a READ, expected chunks")
	}
	delete(c.reads, m.Cookie)
	if m.Error == 0 && n > 0 {
		m.Payload, err = c.Recv(n)
	}
	return m, err
}

func (c *Client) receiveChunk(size int) (m Message, err error) {
	head, err := c.Recv(size - 4)
	if err != nil {
		return m, err
	}
	m.Flags = binary.BigEndian.Uint16(head)
	m.Type = binary.BigEndian.Uint16(head[2:])
	m.Cookie = binary.BigEndian.Uint64(head[4:])
	n := uint64(0)
	if size == nbd.ExtendedReplyHeaderSize {
		m.Offset = binary.BigEndian.Uint64(head[12:])
		n = binary.BigEndian.Uint64(head[20:])
	} else {
		n = uint64(binary.BigEndian.Uint32(head[12:]))
	}
	if n > 64<<20 {
		return m, fmt.Errorf("chunk of type %d with %d bytes", m.Type, n)
	}
	m.Payload, err = c.Recv(int(n))
	return m, err
}

// A Status is a descriptor of a BLOCK_STATUS reply.
type Status struct {
	N     uint64
	Flags uint64
}

// A Result is a whole reply.
type Result struct {
	Error   uint32
	Text    string // with the error
	ErrorAt uint64 // where a READ failed, if the server told
	Chunks  []Message
	Data    []byte // of a READ
	Covered int    // bytes of Data that came
	Status  map[string][]Status
}

// A CommandError is the error of a reply.
type CommandError struct {
	Type  uint16
	Errno uint32
	Text  string
}

func (e *CommandError) Error() string {
	return fmt.Sprintf("command %d: error %d %s", e.Type, e.Errno, e.Text)
}

// Do sends r, alone, and returns its reply. What the specification says of
// chunks is checked. The error tells of the connection, Result of the request.
func (c *Client) Do(r Request) (*Result, error) {
	cookie, err := c.Request(r)
	if err != nil {
		return nil, err
	}
	r.Cookie = cookie
	return c.Result(r)
}

// DoAll sends all of rs at once, alone, and returns their replies.
func (c *Client) DoAll(rs []Request) ([]*Result, error) {
	var batch []byte
	byCookie := make(map[uint64]int)
	results := make([]*Result, len(rs))
	for i, r := range rs {
		c.cookie++
		r.Cookie = c.cookie
		byCookie[r.Cookie], results[i] = i, newResult(&r)
		c.Expect(r)
		batch = append(batch, c.Encode(r)...)
	}
	if err := c.Send(batch); err != nil {
		return nil, err
	}
	for len(byCookie) > 0 {
		m, err := c.Receive()
		if err != nil {
			return nil, fmt.Errorf("%d replies to come: %w", len(byCookie), err)
		}
		i, ok := byCookie[m.Cookie]
		if !ok {
			return nil, fmt.Errorf("reply with cookie %#x, which nothing that is awaited has", m.Cookie)
		}
		if err := c.add(results[i], &rs[i], m); err != nil {
			return nil, err
		}
		if m.Done() {
			delete(byCookie, m.Cookie)
		}
	}
	return results, nil
}

func newResult(r *Request) *Result {
	res := &Result{Status: make(map[string][]Status)}
	if r.Type == nbd.CmdRead && r.Length <= 64<<20 {
		res.Data = make([]byte, r.Length)
	}
	return res
}

// Result receives the reply to r, which must be the only one that is awaited.
func (c *Client) Result(r Request) (*Result, error) {
	res := newResult(&r)
	for {
		m, err := c.Receive()
		if err != nil {
			return nil, fmt.Errorf("reply to command %d: %w", r.Type, err)
		}
		if m.Cookie != r.Cookie {
			return nil, fmt.Errorf("reply with cookie %#x, expected %#x", m.Cookie, r.Cookie)
		}
		if err := c.add(res, &r, m); err != nil {
			return nil, err
		}
		if m.Done() {
			return res, nil
		}
	}
}

// add makes m a part of res.
func (c *Client) add(res *Result, r *Request, m Message) error {
	if c.Extended && m.Offset != r.Offset {
		return fmt.Errorf("reply with offset %d, expected %d", m.Offset, r.Offset)
	}
	res.Chunks = append(res.Chunks, m)
	if m.Simple {
		res.Error = m.Error
		res.Covered = copy(res.Data, m.Payload)
		return nil
	}
	switch m.Type {
	case nbd.ReplyNone:
		if len(m.Payload) != 0 || !m.Done() {
			return fmt.Errorf("NBD_REPLY_TYPE_NONE with %d bytes, done %v", len(m.Payload), m.Done())
		}
		return nil
	case nbd.ReplyOffsetData, nbd.ReplyOffsetHole:
		return res.addContent(r, m)
	case nbd.ReplyBlockStatus, nbd.ReplyBlockStatusExt:
		return c.addStatus(res, m)
	case nbd.ReplyError, nbd.ReplyErrorOffset:
		return res.addError(m)
	}
	return fmt.Errorf("chunk of type %d", m.Type)
}

func (res *Result) addContent(r *Request, m Message) error {
	if len(m.Payload) < 9 || m.Type == nbd.ReplyOffsetHole && len(m.Payload) != 12 {
		return fmt.Errorf("chunk of type %d with %d bytes", m.Type, len(m.Payload))
	}
	off, n := binary.BigEndian.Uint64(m.Payload), uint64(len(m.Payload)-8)
	if m.Type == nbd.ReplyOffsetHole {
		n = uint64(binary.BigEndian.Uint32(m.Payload[8:]))
	}
	if n == 0 || off < r.Offset || off+n > r.Offset+r.Length {
		return fmt.Errorf("chunk of %d bytes at %d for a read of %d at %d", n, off, r.Length, r.Offset)
	}
	if m.Type == nbd.ReplyOffsetData {
		copy(res.Data[off-r.Offset:], m.Payload[8:])
	}
	res.Covered += int(n)
	return nil
}

func (c *Client) addStatus(res *Result, m Message) error {
	head, one := 4, 8
	if m.Type == nbd.ReplyBlockStatusExt {
		head, one = 8, 16
	}
	if c.Extended != (one == 16) || len(m.Payload) <= head || (len(m.Payload)-head)%one != 0 {
		return fmt.Errorf("status chunk of type %d with %d bytes", m.Type, len(m.Payload))
	}
	name, ok := c.Contexts[binary.BigEndian.Uint32(m.Payload)]
	if _, twice := res.Status[name]; !ok || twice {
		return fmt.Errorf("status of context %d %q", binary.BigEndian.Uint32(m.Payload), name)
	}
	if n := (len(m.Payload) - head) / one; one == 16 && int(binary.BigEndian.Uint32(m.Payload[4:])) != n {
		return fmt.Errorf("status chunk with %d descriptors says it has %d", n, binary.BigEndian.Uint32(m.Payload[4:]))
	}
	for p := m.Payload[head:]; len(p) > 0; p = p[one:] {
		var s Status
		if one == 16 {
			s = Status{binary.BigEndian.Uint64(p), binary.BigEndian.Uint64(p[8:])}
		} else {
			s = Status{uint64(binary.BigEndian.Uint32(p)), uint64(binary.BigEndian.Uint32(p[4:]))}
		}
		if s.N == 0 {
			return fmt.Errorf("status of no bytes in context %q", name)
		}
		res.Status[name] = append(res.Status[name], s)
	}
	return nil
}

func (res *Result) addError(m Message) error {
	tail := 0
	if m.Type == nbd.ReplyErrorOffset {
		tail = 8
	}
	if len(m.Payload) < 6+tail {
		return fmt.Errorf("error chunk with %d bytes", len(m.Payload))
	}
	res.Error = binary.BigEndian.Uint32(m.Payload)
	n := int(binary.BigEndian.Uint16(m.Payload[4:]))
	if res.Error == 0 || n != len(m.Payload)-6-tail || n > nbd.MaxString {
		return fmt.Errorf("error chunk with error %d and %d bytes of text in %d", res.Error, n, len(m.Payload))
	}
	res.Text = string(m.Payload[6 : 6+n])
	if tail > 0 {
		res.ErrorAt = binary.BigEndian.Uint64(m.Payload[6+n:])
	}
	return nil
}

// run is Do for a request whose error is an error.
func (c *Client) run(r Request) (*Result, error) {
	res, err := c.Do(r)
	if err == nil {
		err = res.err(&r)
	}
	return res, err
}

// err returns the error that the reply to r was.
func (res *Result) err(r *Request) error {
	if res.Error == 0 {
		return nil
	}
	return &CommandError{r.Type, res.Error, res.Text}
}

// WriteAll writes each of data at the offset with its number, by WRITEs that are
// sent at once, and returns their errors; or that of the connection.
func (c *Client) WriteAll(data [][]byte, off []int64) ([]error, error) {
	rs := make([]Request, len(data))
	for i := range rs {
		rs[i] = c.write(data[i], off[i], 0)
	}
	results, err := c.DoAll(rs)
	if err != nil {
		return nil, err
	}
	errs := make([]error, len(rs))
	for i := range errs {
		errs[i] = results[i].err(&rs[i])
	}
	return errs, nil
}

// write returns a WRITE of p at off.
func (c *Client) write(p []byte, off int64, flags uint16) Request {
	if c.Extended {
		flags |= nbd.CmdFlagPayloadLen
	}
	return Request{Type: nbd.CmdWrite, Flags: flags, Offset: uint64(off), Payload: p}
}

// ReadAt reads as io.ReaderAt, by one READ.
func (c *Client) ReadAt(p []byte, off int64) (int, error) {
	res, err := c.run(Request{Type: nbd.CmdRead, Offset: uint64(off), Length: uint64(len(p))})
	if err != nil {
		return 0, err
	}
	if res.Covered != len(p) {
		return 0, fmt.Errorf("read of %d bytes at %d answered with %d", len(p), off, res.Covered)
	}
	return copy(p, res.Data), nil
}

// WriteAt writes as io.WriterAt, by one WRITE.
func (c *Client) WriteAt(p []byte, off int64) (int, error) { return c.WriteFlags(p, off, 0) }

// WriteFlags is WriteAt with command flags.
func (c *Client) WriteFlags(p []byte, off int64, flags uint16) (int, error) {
	if _, err := c.run(c.write(p, off, flags)); err != nil {
		return 0, err
	}
	return len(p), nil
}

// Flush sends a FLUSH.
func (c *Client) Flush() error {
	_, err := c.run(Request{Type: nbd.CmdFlush})
	return err
}

// Trim sends a TRIM.
func (c *Client) Trim(off, n int64, flags uint16) error {
	_, err := c.run(Request{Type: nbd.CmdTrim, Flags: flags, Offset: uint64(off), Length: uint64(n)})
	return err
}

// WriteZeroes sends a WRITE_ZEROES.
func (c *Client) WriteZeroes(off, n int64, flags uint16) error {
	_, err := c.run(Request{Type: nbd.CmdWriteZeroes, Flags: flags, Offset: uint64(off), Length: uint64(n)})
	return err
}

// Cache sends a CACHE.
func (c *Client) Cache(off, n int64) error {
	_, err := c.run(Request{Type: nbd.CmdCache, Offset: uint64(off), Length: uint64(n)})
	return err
}

// BlockStatus sends a BLOCK_STATUS and returns the descriptors by context.
func (c *Client) BlockStatus(off, n int64, flags uint16) (map[string][]Status, error) {
	res, err := c.run(Request{Type: nbd.CmdBlockStatus, Flags: flags, Offset: uint64(off), Length: uint64(n)})
	if err != nil {
		return nil, err
	}
	return res.Status, nil
}

// Disconnect says goodbye, waits for the server to close the connection, and
// closes it.
func (c *Client) Disconnect() error {
	defer c.Close()
	if _, err := c.Request(Request{Type: nbd.CmdDisc}); err != nil {
		return err
	}
	return c.Ended()
}
