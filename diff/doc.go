// Package diff tells which bytes of a device an overlay has, which of them
// really differ from the base, and draws that: as text on a terminal, as SVG
// and as PNG. What it costs follows what the overlay holds, not the size of
// the device.
package diff
