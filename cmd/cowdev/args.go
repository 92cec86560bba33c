package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"
)

// reorder puts the flags of the verb in args before its arguments: the library
// stops looking for flags at the first argument, and what follows would be
// taken for arguments. "--" ends flags and stays in front of the arguments. A
// value that is missing or empty is refused: to the verbs an empty one is that
// of a flag which is not given, and merge --output "$UNSET" would merge in place.
func reorder(args []string, commands []*cli.Command) ([]string, error) {
	if len(args) < 2 {
		return args, nil
	}
	var verb *cli.Command
	for _, c := range commands {
		if c.HasName(args[1]) {
			verb = c
		}
	}
	if verb == nil {
		return args, nil
	}
	flags := append([]string{}, args[:2]...)
	var plain []string
	rest := args[2:]
	for len(rest) > 0 {
		arg := rest[0]
		rest = rest[1:]
		switch {
		case arg == "--":
			plain, rest = append(plain, rest...), nil
		case arg == "-" || !strings.HasPrefix(arg, "-"):
			plain = append(plain, arg)
		case slices.Contains([]string{"--help", "-help", "-h", "--h"}, arg):
			return []string{args[0], args[1], "--help"}, nil // whatever else is there
		default:
			if letters := apart(verb, arg); letters != nil {
				flags = append(flags, letters...)
				continue
			}
			flags = append(flags, arg)
			name, value, given := strings.Cut(arg, "=")
			f := flagOf(verb, name)
			if f == nil {
				return nil, usagef("%s: there is no flag %s; cowdev %s --help lists them", verb.Name, name, verb.Name)
			}
			if _, isBool := f.(*cli.BoolFlag); isBool {
				continue
			}
			if !given && len(rest) > 0 && rest[0] != "--" {
				value, given = rest[0], true
				flags, rest = append(flags, value), rest[1:]
			}
			if !given || value == "" && !mayBeEmpty(name) {
				return nil, usagef("%s: %s needs a value", verb.Name, name)
			}
		}
	}
	return append(append(flags, "--"), plain...), nil
}

// apart returns -l and -R for -lR, if all are flags of the verb without a value;
// else nil.
func apart(verb *cli.Command, arg string) (flags []string) {
	if strings.HasPrefix(arg, "--") || flagOf(verb, arg) != nil {
		return nil
	}
	for _, letter := range arg[1:] {
		flag := "-" + string(letter)
		if _, isBool := flagOf(verb, flag).(*cli.BoolFlag); !isBool {
			return nil
		}
		flags = append(flags, flag)
	}
	return flags
}

// flagOf returns the flag that arg names, or nil.
func flagOf(verb *cli.Command, arg string) cli.Flag {
	name := strings.TrimLeft(arg, "-")
	for _, f := range verb.Flags {
		if slices.Contains(f.Names(), name) {
			return f
		}
	}
	return nil
}

// mayBeEmpty reports whether the empty value of the flag that arg names means
// something: that of --export is the default export's name.
func mayBeEmpty(arg string) bool { return strings.TrimLeft(arg, "-") == "export" }

// arguments returns the arguments of c by usage, a verb's usage line or what
// of it applies, in which "[NAME]" is optional: as many strings as it has
// names, empty where an optional one is not given.
func arguments(c *cli.Context, usage string) ([]string, error) {
	names := strings.Fields(usage)
	given := c.Args().Slice()
	line := fmt.Sprintf("usage: cowdev %s [flags] %s", c.Command.Name, usage)
	if len(given) > len(names) {
		return nil, usagef("%s: %q is one argument too many; %s", c.Command.Name, given[len(names)], line)
	}
	values := make([]string, len(names))
	for i, name := range names {
		if i < len(given) {
			if given[i] == "" {
				return nil, usagef("%s: %s is empty; %s", c.Command.Name, name, line)
			}
			values[i] = given[i]
		} else if !strings.HasPrefix(name, "[") {
			return nil, usagef("%s: %s is missing; %s", c.Command.Name, name, line)
		}
	}
	return values, nil
}
