package main

import "testing"

func TestRoomMark(t *testing.T) {
	for _, test := range []struct {
		free, total, need, want int64
	}{
		{50, 1000, 40, 0}, // enough for all
		{200, 1000, 5000, 0},
		{100, 1000, 5000, 10},
		{50, 1000, 5000, 5},
		{49, 1000, 50, 5},
		{10, 1000, 5000, 1},
		{0, 1000, 1, 1},
		{0, 1000, 0, 0},
		{0, 0, 5000, 0}, // the filesystem does not tell
	} {
		if got := (room{test.free, test.total, test.need}).mark(); got != test.want {
			t.Errorf("%d of %d free, %d needed: mark %d, expected %d", test.free, test.total, test.need, got, test.want)
		}
	}
}
