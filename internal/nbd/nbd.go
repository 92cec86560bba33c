// Package nbd holds the numbers of the NBD protocol, under the names and in
// the order of its specification (NetworkBlockDevice/nbd, doc/proto.md;
// extended headers: its branch extension-ext-header). Everything on the wire
// is big-endian.
package nbd

// Magic numbers. Sections "Newstyle negotiation", "Fixed newstyle
// negotiation", "Request message", "Simple reply message", "Structured reply
// chunk message", "Extended reply chunk message".
const (
	Magic                = 0x4e42444d41474943 // "NBDMAGIC"
	OptionMagic          = 0x49484156454F5054 // "IHAVEOPT"
	OptionReplyMagic     = 0x3e889045565a9
	RequestMagic         = 0x25609513
	SimpleReplyMagic     = 0x67446698
	StructuredReplyMagic = 0x668e33ef
	ExtendedRequestMagic = 0x21e41c71
	ExtendedReplyMagic   = 0x6e8a278c
)

// Sizes of headers in bytes.
const (
	OptionHeaderSize          = 16
	OptionReplyHeaderSize     = 20
	RequestHeaderSize         = 28
	ExtendedRequestHeaderSize = 32
	SimpleReplySize           = 16
	StructuredReplyHeaderSize = 20
	ExtendedReplyHeaderSize   = 32
)

// MaxString is the longest string that the specification allows, in bytes.
const MaxString = 4096

// Handshake flags (server) and client flags; both pairs have the same bits.
const (
	FlagFixedNewstyle = 1 << 0
	FlagNoZeroes      = 1 << 1
)

// Transmission flags.
const (
	FlagHasFlags           = 1 << 0
	FlagReadOnly           = 1 << 1
	FlagSendFlush          = 1 << 2
	FlagSendFUA            = 1 << 3
	FlagRotational         = 1 << 4
	FlagSendTrim           = 1 << 5
	FlagSendWriteZeroes    = 1 << 6
	FlagSendDF             = 1 << 7
	FlagCanMultiConn       = 1 << 8
	FlagSendCache          = 1 << 10
	FlagSendFastZero       = 1 << 11
	FlagBlockStatusPayload = 1 << 12
)

// Option types.
const (
	OptExportName      = 1
	OptAbort           = 2
	OptList            = 3
	OptPeekExport      = 4 // withdrawn
	OptStartTLS        = 5
	OptInfo            = 6
	OptGo              = 7
	OptStructuredReply = 8
	OptListMetaContext = 9
	OptSetMetaContext  = 10
	OptExtendedHeaders = 11
)

// Option reply types.
const (
	RepAck              = 1
	RepServer           = 2
	RepInfo             = 3
	RepMetaContext      = 4
	RepErrUnsup         = 1<<31 + 1
	RepErrPolicy        = 1<<31 + 2
	RepErrInvalid       = 1<<31 + 3
	RepErrPlatform      = 1<<31 + 4
	RepErrTLSReqd       = 1<<31 + 5
	RepErrUnknown       = 1<<31 + 6
	RepErrShutdown      = 1<<31 + 7
	RepErrBlockSizeReqd = 1<<31 + 8
	RepErrTooBig        = 1<<31 + 9
	RepErrExtHeaderReqd = 1<<31 + 10
)

// Information types of INFO and GO.
const (
	InfoExport      = 0
	InfoName        = 1
	InfoDescription = 2
	InfoBlockSize   = 3
)

// Command flags.
const (
	CmdFlagFUA        = 1 << 0
	CmdFlagNoHole     = 1 << 1
	CmdFlagDF         = 1 << 2
	CmdFlagReqOne     = 1 << 3
	CmdFlagFastZero   = 1 << 4
	CmdFlagPayloadLen = 1 << 5
)

// Request types.
const (
	CmdRead        = 0
	CmdWrite       = 1
	CmdDisc        = 2
	CmdFlush       = 3
	CmdTrim        = 4
	CmdCache       = 5
	CmdWriteZeroes = 6
	CmdBlockStatus = 7
)

// ReplyFlagDone marks the last chunk of a reply.
const ReplyFlagDone = 1 << 0

// Structured reply types.
const (
	ReplyNone           = 0
	ReplyOffsetData     = 1
	ReplyOffsetHole     = 2
	ReplyBlockStatus    = 5
	ReplyBlockStatusExt = 6
	ReplyError          = 1<<15 + 1
	ReplyErrorOffset    = 1<<15 + 2
)

// Flags of the base:allocation metadata context.
const (
	StateHole = 1 << 0
	StateZero = 1 << 1
)

// Error values.
const (
	EPERM     = 1
	EIO       = 5
	ENOMEM    = 12
	EINVAL    = 22
	ENOSPC    = 28
	EOVERFLOW = 75
	ENOTSUP   = 95
	ESHUTDOWN = 108
)
