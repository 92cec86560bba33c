// Cowdev serves a block device that is a base image with every change kept
// apart, in a store of its own, and looks at, checks and merges such stores.
//
// Each verb is a file of this package. A verb reads its flags into plain
// values before it opens anything, and then calls packages that know nothing
// of the command line. What all verbs share:
//
//   - args.go: flags before and after the arguments, and the arguments
//     themselves, checked against the usage line;
//   - exit.go: errors become messages and exit statuses, in one place;
//   - open.go: a base with its store, the "view" that most verbs work on;
//   - size.go, progress.go, output.go: sizes, progress, JSON.
package main
