// Package block holds the words that all packages of cowdev share: where a
// byte of a device lies (Geometry, Chunk, Span), what is known of a run of
// bytes (Extent, State), and the two things that can be read and written by
// offset (Reader, Device). It imports nothing of the project.
//
// A device is cut into chunks, the unit of remapping (64 KiB unless a store
// was made otherwise), and a chunk into BlocksPerChunk blocks, the unit of
// validity (4 KiB). The last chunk of a device may be partial; its missing
// bytes exist nowhere and are never addressed.
//
// Geometry.Spans is the only place where a range of bytes becomes chunks.
package block
