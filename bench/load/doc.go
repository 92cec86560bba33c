// Package load puts load on an NBD server and measures how it bears it.
//
// Each connection is a thread of its own that keeps a number of requests under
// way: it sends all that it may in one system call, receives what has come in
// one, and never looks at the bytes of a reply unless it is told to check
// them. Its system calls go past Go's scheduler, which would cost it half of
// its speed; so a process should do nothing else, and hold no garbage: see
// Main. That it is not what a measurement measures is shown by the limit
// server's figure in the same run.
package load
