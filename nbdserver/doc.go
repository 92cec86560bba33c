// Package nbdserver serves block devices by the NBD protocol. It knows nothing
// of copy-on-write: an Export is any block.Device under a name. All of the
// specification that a server may offer is there, TLS and extended headers
// included; docs/protocol.md names each part and its test.
//
// # Phases
//
// A connection is in the handshake, where the client sends options (option)
// and each is answered, or in the transmission phase, where it sends requests
// (request) and each is answered with a simple reply or with chunks. What the
// handshake agreed on is a session. ServeConn goes through both phases,
// ServeTransmission only through the second.
//
// # How requests are served
//
// Each connection has one goroutine. It reads as much as has come (input),
// serves every request in it that cannot take long, collects the replies in a
// batch, and sends the batch by one writev (output). Where the device is a
// block.Sessioner and the connection a socket, the data of a READ is not
// copied: the vectors point to where it lies. Nothing is allocated per request.
//
// Where the device is a block.BatchWriter, WRITEs of at most 16 KiB that come
// one after another, without FUA, are gathered, up to 64 of them, while their
// payloads lie in the receive buffer. They are done together and answered
// before any other request of the connection is served, and before more is
// read; if as many came as ever lately, which is likely all that the client has
// under way (ebb), the first half is answered before the second is done.
//
// A client that flushed four times in a row after as many changes each, while no
// other did, and now has made as many again and waits, has the device flushed
// at once (rhythm). What that comes to is the answer to its FLUSH if it is an
// error; else the device is asked again, and has nothing to do.
//
// What may take long goes to a worker (job) and is answered when it is done,
// out of order, as NBD allows: a READ of more than 1 MiB, or of bytes that are
// not known to be in memory unless it is small and alone; a change with FUA
// and a FLUSH when something else waits or flushes have been slow; a large
// TRIM or WRITE_ZEROES; CACHE and BLOCK_STATUS; and any change to a device
// that says MayBlock, or Parks: that it may come to block in the middle of a
// change. (To the latter, WRITEs of at most 64 KiB are tried first, by
// WriteBatch; those of more than 1 MiB are not copied, and do block.) So a slow
// request holds up nobody, on its own connection or another, until its
// connection has 64 of them. READs from the disk that came together share eight
// workers, each of which takes the next: eight slow ones hold up the rest of
// those. Where there are more connections than two for each goroutine that Go
// runs at once, one that has been served 64 requests or 1 MiB and still has some
// lets the others run. A client in the handshake does so after each option.
//
// # Rules
//
//  1. A reply's header leaves only when its data is known to be readable: it
//     was shown by the device, or read. If a page still faults then, the
//     connection is closed and counted (Stats.Faults): the header cannot be
//     taken back.
//  2. No code of ours touches memory that a session shows: a page that cannot
//     be read is a signal there and an error in a system call. Connections
//     that need a copy (TLS) read the device once it has shown that this is
//     quick.
//  3. Shown memory is let go at the latest one second after the client stops
//     taking replies: what is left of them is copied.
//  4. A request that can be answered is answered, with the error that the
//     specification names; a connection is closed only for what cannot be
//     understood (a wrong magic number), for more than 64 MiB to throw away,
//     for 128 options, of which those after the 32nd are slowed down, and for the
//     time limits.
//  5. No header makes the server allocate: buffers are for bytes that came.
//
// # Memory
//
// A connection that waits for its client holds about 8 KiB, most of it the
// goroutine's stack (TLS: what crypto/tls holds besides). A busy one holds at
// most a receive buffer of 256 KiB, a batch of 64 KiB (with TLS and 256 KiB
// of copies), and 2 MiB of buffers in workers; and for as long as a client
// with full pipes takes no replies 2 MiB of copies of them. Buffers come from
// pools and go back to the runtime when nobody uses them. Besides, the kernel
// holds what a client has not taken, until that closes its end: 208 KiB by
// default; of connections that fill a unix socket up to 1 MiB, 64 at a time.
package nbdserver
