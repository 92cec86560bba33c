package main

import (
	"fmt"
	"os"

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
		return fmt.Errorf("expected run, report, load or limit")
	}
	switch verb, args := args[0], args[1:]; verb {
	case "run":
		return runMatrix(args)
	case "report":
		if len(args) != 2 {
			return fmt.Errorf("report: expected results.json and the directory of the documents")
		}
		return writeReport(args[0], args[1])
	case "load":
		return load.Main(os.Stdin, os.Stdout)
	case "limit":
		if len(args) != 2 {
			return fmt.Errorf("limit: expected a socket and a base")
		}
		return limit.Main(args[0], args[1])
	default:
		return fmt.Errorf("%q: expected run, report, load or limit", verb)
	}
}
