//go:build !race

package nbdserver_test

const raceEnabled = false
