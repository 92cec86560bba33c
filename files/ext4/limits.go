package ext4

// Limits that hold whatever an image says.
const (
	maxGroups      = 1 << 21  // block groups; 256 TiB of 4 KiB blocks
	maxExtents     = 1 << 22  // runs of one file; about 100 MiB of memory
	maxJournal     = 10240000 // blocks of a journal, as mke2fs has it
	maxLogBlocks   = 1 << 22  // journal blocks that one replay may name
	maxRevoked     = 1 << 23  // blocks that one journal may revoke
	maxFastCommits = 64 << 20 // bytes of fast commits
	maxFastWork    = 1 << 28  // names and runs passed while they are replayed
	maxWanted      = 1 << 31  // blocks whose owners are asked for at once
	maxDirSize     = 4 << 30  // bytes of one directory
	maxSymlink     = 4096     // bytes of a symbolic link's target, PATH_MAX
	maxLinks       = 40       // symbolic links followed by one Resolve
	maxDepth       = 4096     // directories between one and the root
	maxXattrValue  = 16 << 20 // bytes of a value in an inode of its own
	maxXattrTotal  = 64 << 20 // bytes of all values of one inode
	maxExtentDepth = 5        // levels below the root of an extent tree
)
