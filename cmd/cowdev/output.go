package main

import (
	"encoding/json"
	"fmt"
	"io"
	"text/tabwriter"

	"github.com/urfave/cli/v2"
)

var jsonFlag = &cli.BoolFlag{Name: "json", Usage: "print the result as JSON"}

// printJSON prints v as indented JSON.
func printJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	enc.SetEscapeHTML(false)
	return enc.Encode(v)
}

// A table prints lines of "name: value" with the values in one column.
type table struct{ w *tabwriter.Writer }

func newTable(w io.Writer) table { return table{tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)} }

func (t table) line(name, format string, args ...any) {
	fmt.Fprintf(t.w, "%s:\t%s\n", name, fmt.Sprintf(format, args...))
}

func (t table) end() error { return t.w.Flush() }

// warn prints a message that is no failure.
func warn(c *cli.Context, format string, args ...any) {
	fmt.Fprintf(c.App.ErrWriter, "cowdev: %s\n", fmt.Sprintf(format, args...))
}
