module github.com/cowdev/cowdev/bench

go 1.25.0

require (
	github.com/cowdev/cowdev v0.0.0
	golang.org/x/sys v0.47.0
)

replace github.com/cowdev/cowdev => ../
