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

// A list prints an array as JSON, an element a line, as it is made; or nothing
// where JSON is not wanted.
type list struct {
	w    io.Writer
	on   bool
	next string // what goes before the next element
}

func newList(w io.Writer, on bool) *list { return &list{w, on, "["} }

func (l *list) add(v any) error {
	if !l.on {
		return nil
	}
	line, err := json.Marshal(v)
	if err == nil {
		_, err = fmt.Fprintf(l.w, "%s\n  %s", l.next, line)
	}
	l.next = ","
	return err
}

func (l *list) end() error {
	if !l.on {
		return nil
	}
	closing := "\n]\n"
	if l.next == "[" {
		closing = "[]\n"
	}
	_, err := io.WriteString(l.w, closing)
	return err
}

// A table prints lines of "name: value" with the values in one column. What does
// not print in a value, which may be a file's name or of a store, is escaped.
type table struct{ w *tabwriter.Writer }

func newTable(w io.Writer) table { return table{tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)} }

func (t table) line(name, format string, args ...any) {
	fmt.Fprintf(t.w, "%s:\t%s\n", name, printable(fmt.Sprintf(format, args...)))
}

func (t table) end() error { return t.w.Flush() }

// warn prints a message that is no failure.
func warn(c *cli.Context, format string, args ...any) {
	fmt.Fprintf(c.App.ErrWriter, "cowdev: %s\n", printable(fmt.Sprintf(format, args...)))
}
