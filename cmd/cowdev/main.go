package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"strings"

	"github.com/urfave/cli/v2"
)

func main() { os.Exit(run(os.Args, os.Stdout, os.Stderr)) }

// verbs returns the commands, one file of this package each.
func verbs() []*cli.Command {
	return []*cli.Command{
		serveCommand(),
		createCommand(),
		infoCommand(),
		checkCommand(),
		mergeCommand(),
		mapCommand(),
		diffCommand(),
		lsCommand(),
		catCommand(),
		cpCommand(),
		statCommand(),
		whyCommand(),
		attachCommand(),
		attachServerCommand(),
		attachEndCommand(),
		detachCommand(),
		mountCommand(),
		umountCommand(),
		doctorCommand(),
	}
}

// run runs the command line args, of which the first is the program's name,
// and returns the exit status.
func run(args []string, stdout, stderr io.Writer) int {
	app := newApp(stdout, stderr)
	args, err := reorder(args, app.Commands)
	if err == nil {
		err = app.RunContext(context.Background(), args)
	}
	if err != nil {
		report(stderr, err)
	}
	return exitStatus(err)
}

func newApp(stdout, stderr io.Writer) *cli.App {
	app := &cli.App{
		Name:                   "cowdev",
		Usage:                  "copy-on-write snapshots of block devices, in user space",
		Version:                version(),
		Commands:               verbs(),
		Writer:                 stdout,
		ErrWriter:              stderr,
		HideHelpCommand:        true,
		ExitErrHandler:         func(*cli.Context, error) {}, // run does it
		OnUsageError:           usageFailure,
		Action:                 noVerb,
		UseShortOptionHandling: false,
		// A comma may be part of a path; who means two gives the flag twice.
		DisableSliceFlagSeparator: true,
	}
	for _, c := range app.Commands {
		c.OnUsageError = usageFailure
		c.HideHelpCommand = true
		c.CustomHelpTemplate = verbHelp
	}
	return app
}

// verbHelp is what cowdev VERB --help prints.
const verbHelp = `cowdev {{.Name}} {{.ArgsUsage}}{{if .Usage}}

{{.Usage}}.{{end}}{{if .Description}}

{{.Description}}{{end}}{{if .VisibleFlags}}

Flags, before or after the arguments:
{{range .VisibleFlags}}   {{.}}
{{end}}{{end}}`

// usageFailure tells of what the library found wrong with a flag: of a verb's a
// value, reorder having looked at the name.
func usageFailure(c *cli.Context, err error, ofVerb bool) error {
	text := strings.Replace(err.Error(), " for -", " for --", 1)
	text = strings.Replace(text, " for flag -", " for --", 1)
	if ofVerb {
		return usagef("%s: %s", c.Command.Name, text)
	}
	if name, ok := strings.CutPrefix(text, "flag provided but not defined: -"); ok {
		text = fmt.Sprintf("there is no flag %s%s before the verb", "--"[:min(len(name), 2)], name)
	}
	return usagef("%s; cowdev --help lists verbs", text)
}

func noVerb(c *cli.Context) error {
	if c.Args().Present() {
		return usagef("%q is not a verb; cowdev --help lists them", c.Args().First())
	}
	old := c.App.Writer
	c.App.Writer = c.App.ErrWriter
	defer func() { c.App.Writer = old }()
	if err := cli.ShowAppHelp(c); err != nil {
		return err
	}
	return usagef("a verb is missing; cowdev --help lists them")
}

// version returns the module's version, and the revision it was built from
// where that is known.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	v := info.Main.Version
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" {
			v = fmt.Sprintf("%s (%.12s)", v, s.Value)
		}
	}
	return v
}
