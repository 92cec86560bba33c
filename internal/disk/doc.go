// Package disk is the seam at the bottom of cowdev: the file in which a store
// or a base lies. File is what a store needs of it; OS is the file on Linux
// (punched holes, data-synchronous writes, locks, mappings), and
// internal/disktest has one in memory that crashes and fails on purpose.
package disk
