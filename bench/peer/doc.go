// Package peer starts and stops the servers that are measured: cowdev, those
// it is compared with, and the limit. Every one serves the same base on a unix
// socket with an overlay of its own.
package peer
