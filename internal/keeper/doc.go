// Package keeper keeps a kernel's NBD connections while the servers behind
// them come and go: killed, upgraded, restarted.
//
// The kernel is given the keeper's sockets (the fronts) and never sees a
// server. Behind each front a Relay passes requests on to the server of the
// moment (its back) and replies to the kernel, and holds every request, with
// the data of a WRITE, until its reply is there. When the server dies the
// Keeper launches the next one and sends it what was not answered, in the
// order of arrival. A reply is passed on only when all of it has arrived, so
// that a server that dies within one leaves no trace in the stream.
//
// Rules:
//
//  1. A request is answered once. What a dead server had done of it is done
//     again by the next: every request of the protocol may be repeated, and a
//     client that cares about the order of two writes to one place waits for
//     the first.
//  2. The keeper knows the transmission phase only: the 28-byte request and
//     the simple reply, which is all that the kernel speaks over sockets that
//     it was given by netlink.
//  3. A Relay holds at most heldLimit bytes of requests, and one request more.
//  4. What came by a front that the kernel gave up is sent to no other server:
//     the kernel sends it again itself, and may have overwritten since what a
//     late WRITE would bring back.
//  5. The keeper does nothing else: it opens no image and no store, so that
//     there is little in it to go wrong or to be upgraded.
package keeper
