package main

import (
	"fmt"
	"os"
	"strconv"

	"github.com/cowdev/cowdev/bench/guest"
	"github.com/cowdev/cowdev/bench/limit"
	"github.com/cowdev/cowdev/bench/load"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) == 0 {
		return fmt.Errorf("expected run, report, vm, load, limit or guest")
	}
	switch verb, args := args[0], args[1:]; verb {
	case "run":
		return runMatrix(args)
	case "report":
		if len(args) != 2 {
			return fmt.Errorf("report: expected results.json and the directory of the documents")
		}
		return writeReport(args[0], args[1])
	case "vm":
		return runVM(args)
	case "load":
		return load.Main(os.Stdin, os.Stdout)
	case "limit":
		if len(args) != 2 {
			return fmt.Errorf("limit: expected a socket and a base")
		}
		return limit.Main(args[0], args[1])
	case "guest":
		rounds := 0
		if len(args) == 1 {
			rounds, _ = strconv.Atoi(args[0])
		}
		if rounds < 1 {
			return fmt.Errorf("guest: expected a number of rounds")
		}
		return guest.Main(os.Stdout, rounds)
	default:
		return fmt.Errorf("%q: expected run, report, vm, load, limit or guest", verb)
	}
}
