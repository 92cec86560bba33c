// Bench measures cowdev beside the servers it is compared with, and the limit
// that a server which does no work sets.
//
//	bench run      the whole matrix: results.json, and docs/benchmarks.md made of it
//	bench report   docs/benchmarks.md again, from a results.json
//	bench vm       cowdev and dm-snapshot in a guest: vm.json, and their part of docs/benchmarks.md
//	bench load     one job on one server (JSON on stdin; package load)
//	bench limit    the limit server (package limit)
//	bench guest    what "bench vm" runs in the guest (package guest)
//
// Rounds are interleaved: in each, every server runs every row once, in an
// order that rotates, so that what a machine does over time meets all alike. A
// figure is the median of the rounds, and a ratio the median of the rounds'
// ratios. What other processes took of the processors while a row ran is
// noted with it; a row that was disturbed is run again, a few times.
package main
