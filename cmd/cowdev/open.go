package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"github.com/cowdev/cowdev/block"
	"github.com/cowdev/cowdev/cow"
	"github.com/cowdev/cowdev/exception"
	"github.com/cowdev/cowdev/image"
	"github.com/cowdev/cowdev/internal/disk"
)

// commitInterval is how often a served store commits what nobody flushed.
const commitInterval = 5 * time.Second

// baseFlags are the flags of every verb that opens a base with its store.
func baseFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "format", Usage: "format of BASE: raw", DefaultText: "raw, with a warning where it looks otherwise"},
		&cli.BoolFlag{Name: "no-excl", Usage: "open a block device that is in use elsewhere"},
		&cli.BoolFlag{Name: "accept-base", Usage: "take BASE as it is now for the base that COW was made over"},
		&cli.StringFlag{Name: "base-digest", Value: "full", Usage: "how much of BASE is looked at: full, sample or off"},
		quietFlag,
	}
}

// viewOptions are how a base and a store are opened together.
type viewOptions struct {
	look      image.Digests
	format    string // what the user said; empty where nothing
	noExcl    bool
	accept    bool // --accept-base
	readOnly  bool // the store is neither made nor changed
	existing  bool // the store is not made
	temporary bool // the store has no name and is forgotten
	deep      bool // all of the base is read and compared
	writable  bool // the base is opened for merge
	chunkSize int  // of a store that is made
	cow       cow.Options
	store     exception.Options
}

// viewOptionsOf reads baseFlags.
func viewOptionsOf(c *cli.Context) (viewOptions, error) {
	o := viewOptions{
		format: c.String("format"), noExcl: c.Bool("no-excl"), accept: c.Bool("accept-base"),
		chunkSize: block.DefaultChunkSize,
	}
	if o.format != "" && o.format != "raw" {
		return o, usagef("--format: %q: expected raw", o.format)
	}
	var err error
	if o.look, err = image.ParseDigests(c.String("base-digest")); err != nil {
		return o, usagef("--base-digest: %w", err)
	}
	return o, nil
}

// A view is a base with its store, opened and found to belong together.
type view struct {
	base     *image.Base
	file     *disk.OS // the store's; the store closes it
	store    *exception.Store
	device   *cow.Device
	identity image.Identity
	compared bool // all of the base, with the digest that the store had
	made     bool // the store was made just now
}

// openView opens BASE and COW. The caller closes the view.
func openView(ctx context.Context, c *cli.Context, basePath, cowPath string, o viewOptions) (*view, error) {
	if !o.temporary {
		if err := checkPaths(basePath, cowPath); err != nil {
			return nil, err
		}
	}
	base, err := image.Open(basePath, image.Options{Writable: o.writable, NoExcl: o.noExcl})
	if err != nil {
		return nil, err
	}
	v := &view{base: base}
	if err := v.openStore(c, cowPath, o); err != nil {
		base.Close()
		return nil, err
	}
	if err := v.recognise(ctx, c, cowPath, o); err != nil {
		v.store.Close()
		base.Close()
		return nil, err
	}
	if format := base.Sniff(); format != "" && o.format == "" {
		warn(c, "%s: looks like %s, and is served raw as it is; --format raw if that is meant", basePath, format)
	}
	o.cow.View = v.mapStore()
	v.device = cow.New(base, v.store, o.cow)
	return v, nil
}

// mapStore maps the store's file as large as it can become, or returns nil;
// then stored blocks are read by system calls.
func (v *view) mapStore() *disk.Mapping {
	const most = 16 << 40 // of address space
	// A slot for each block, and as many that wait to be given back.
	n := min(2*v.base.Size()+v.base.Size()/64+4<<30, most)
	if v.file.IsDevice() {
		n, _ = v.file.Size()
	}
	m, _ := disk.NewMapping(v.file.File(), n)
	return m
}

// checkPaths refuses a base and a store that are the same file.
func checkPaths(basePath, cowPath string) error {
	if disk.SameFile(basePath, cowPath) {
		return usagef("%s: BASE and COW are the same file, expected two", cowPath)
	}
	return nil
}

// openStore opens the store at path, or makes it.
func (v *view) openStore(c *cli.Context, path string, o viewOptions) error {
	if !o.temporary {
		if err := v.checkPlace(path); err != nil {
			return err
		}
	}
	f, made, err := v.storeFile(c, path, o)
	if err != nil {
		return err
	}
	if f.IsDevice() {
		if o.store.Capacity, err = f.Size(); err != nil {
			f.Close()
			return err
		}
	}
	if !o.temporary {
		if o.store.Memory, err = memoryOf(f); err != nil {
			f.Close()
			return err
		}
	}
	if !made && !o.accept && o.look != image.DigestOff {
		v.base.BeginSample() // for recognise, while the store is loaded
	}
	o.store.ReadOnly = o.readOnly
	o.store.Log = func(format string, args ...any) {
		warn(c, "%s: %s", cmp.Or(path, "the overlay"), fmt.Sprintf(format, args...))
	}
	store, err := exception.Open(f, o.store)
	if err != nil {
		return v.storeError(path, err)
	}
	if size := store.Geometry().Size; size != v.base.Size() {
		store.Close()
		return fmt.Errorf("%s: made over a base of %d bytes, %s has %d: %w", path, size, v.base.Path(), v.base.Size(), image.ErrWrongBase)
	}
	v.file, v.store, v.made = f, store, made
	return nil
}

// memoryOf returns where the live table of the store in f lies, and what a dead
// server had acknowledged is found. Root and the store's owner have the same.
func memoryOf(f *disk.OS) (exception.Shared, error) {
	file, err := f.Identity()
	if err != nil || os.Geteuid() != 0 {
		return exception.Shared{File: file}, err
	}
	st, err := f.File().Stat()
	if err != nil {
		return exception.Shared{}, err
	}
	return exception.Shared{File: file, User: int(st.Sys().(*syscall.Stat_t).Uid)}, nil
}

// checkPlace refuses a store that would lie on its own base.
func (v *view) checkPlace(path string) error {
	if v.base.Within(filepath.Dir(path)) {
		return fmt.Errorf("%s: lies on a filesystem that is on %s, and would change its own base; put it elsewhere: %w",
			path, v.base.Path(), image.ErrUnusable)
	}
	return nil
}

// storeError says what is wrong with the store at path, and whether the
// arguments look swapped.
func (v *view) storeError(path string, err error) error {
	if errors.Is(err, exception.ErrNotStore) && v.base.Sniff() == image.FormatStore {
		return fmt.Errorf("%s: %w, and %s is one: are BASE and COW swapped?", path, err, v.base.Path())
	}
	return fmt.Errorf("%s: %w", path, err)
}

// storeFile opens and locks the store's file, and makes it where it may.
func (v *view) storeFile(c *cli.Context, path string, o viewOptions) (f *disk.OS, made bool, err error) {
	if o.temporary {
		if f, err = disk.OpenTemp(tempDir()); err != nil {
			return nil, false, err
		}
		return f, true, v.make(f, path, o)
	}
	f, err = openStoreFile(path, o.readOnly)
	if !errors.Is(err, fs.ErrNotExist) || o.readOnly || o.existing {
		return f, false, err
	}
	if f, err = v.create(path, o); errors.Is(err, fs.ErrExist) && fileIs(path) { // another has made it just now
		f, err = openStoreFile(path, false)
		return f, false, err
	}
	if err != nil {
		return nil, false, err
	}
	warn(c, "%s: made, a new store over %s", path, v.base.Path())
	return f, true, nil
}

// fileIs reports whether there is a file at path, or what a link there leads to.
func fileIs(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// tempDir is where stores without a name lie: they can be large, which
// /tmp often cannot.
func tempDir() string {
	if dir := os.Getenv("TMPDIR"); dir != "" {
		return dir
	}
	return "/var/tmp"
}

// openStoreFile opens a store's file and locks it, shared for reading.
func openStoreFile(path string, readOnly bool) (*disk.OS, error) {
	flags := os.O_RDWR
	if readOnly {
		flags = os.O_RDONLY
	}
	if info, err := os.Stat(path); err == nil && info.Mode()&os.ModeDevice != 0 && !readOnly {
		flags |= unix.O_EXCL
	}
	f, err := disk.OpenOS(path, flags)
	if errors.Is(err, unix.EBUSY) {
		err = fmt.Errorf("%w: %w", err, disk.ErrLocked)
	}
	if err != nil {
		return nil, err
	}
	if err := lockStore(f, path, readOnly); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// ifLocked adds to an error that tells of a lock what to do about it.
func ifLocked(err error, hint string) error {
	if errors.Is(err, disk.ErrLocked) {
		return fmt.Errorf("%w; %s", err, hint)
	}
	return err
}

// lockStore locks f, and makes sure that path still names it: whoever held
// the lock before may have removed the file.
func lockStore(f *disk.OS, path string, shared bool) error {
	if err := f.Lock(shared); err != nil {
		return err
	}
	if !isAt(f, path) {
		return fmt.Errorf("%s: removed or replaced meanwhile: %w", path, fs.ErrNotExist)
	}
	return nil
}

// isAt reports whether path names f.
func isAt(f *disk.OS, path string) bool {
	opened, err := f.File().Stat()
	if err != nil {
		return false
	}
	named, err := os.Stat(path)
	return err == nil && os.SameFile(opened, named)
}

// create makes a store at path, which must not exist. It is locked and whole
// when it gets its name; nothing is left of it if that fails.
func (v *view) create(path string, o viewOptions) (*disk.OS, error) {
	if target, err := os.Readlink(path); err == nil {
		return nil, fmt.Errorf("%s: a symbolic link to %s, which is not there; remove it or name a file: %w", path, target, unix.EEXIST)
	}
	f, err := disk.CreateOS(path)
	if err != nil {
		return nil, err
	}
	if err = f.Lock(false); err == nil {
		err = v.base.Guard(f.File())
	}
	if err == nil {
		err = v.make(f, path, o)
	}
	if err == nil {
		err = f.Publish()
	}
	if err == nil {
		err = syncDir(filepath.Dir(path))
	}
	if err != nil {
		if f.Named() {
			os.Remove(path)
		}
		f.Close()
		return nil, err
	}
	return f, nil
}

// make writes an empty store for the base into f.
func (v *view) make(f disk.File, path string, o viewOptions) error {
	look := o.look
	if o.temporary {
		look = image.DigestOff // nobody will ask
	}
	id, err := v.base.Identify(look)
	if err != nil {
		return err
	}
	p := exception.Params{
		Geometry: block.Geometry{Size: v.base.Size(), ChunkSize: o.chunkSize},
		Base:     id.Encode(),
		BaseHint: absolute(v.base.Path()),
	}
	if err := exception.Create(f, p); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

// recognise makes sure that the store was made over the base.
func (v *view) recognise(ctx context.Context, c *cli.Context, cowPath string, o viewOptions) error {
	h := v.store.Header()
	was, err := image.DecodeIdentity(h.Base)
	if err != nil {
		return fmt.Errorf("%s: %w", cowPath, err)
	}
	v.identity = was
	if v.made {
		return nil
	}
	if o.accept {
		if v.identity, err = v.base.Identify(o.look); err != nil {
			return err
		}
		if o.deep && h.State != exception.Merging {
			p := newProgress(c, "read "+v.base.Path(), v.base.Size())
			v.identity.Full, err = v.base.FullDigest(ctx, image.FullOptions{Progress: p.set})
			p.end()
			if err != nil {
				return err
			}
		}
		return v.remember(was)
	}
	q := image.Question{Was: was, Look: o.look, Deep: o.deep}
	if h.State == exception.Merging {
		q.Except = v.excepted
	}
	p := newProgress(c, "compare "+v.base.Path(), v.base.Size())
	q.Full.Progress = p.set
	v.identity, err = v.base.Recognise(ctx, q)
	p.end()
	if err != nil {
		return fmt.Errorf("%w (store %s)", err, cowPath)
	}
	v.compared = o.deep && was.Full != nil
	if h.State == exception.Merging {
		if !o.writable {
			warn(c, "%s", halfMerged(v.base.Path(), cowPath))
		}
		v.identity = was
		return nil
	}
	return v.remember(was)
}

// halfMerged says what a base is after a merge that was interrupted.
func halfMerged(basePath, cowPath string) string {
	return fmt.Sprintf("%s is half merged and usable only with %s until merge is run again", basePath, cowPath)
}

// excepted reports whether the store has an exception in [off, off+n).
func (v *view) excepted(off, n int64) bool {
	for s := range v.store.Geometry().Spans(off, n) {
		if v.store.Entry(s.Chunk) != 0 {
			return true
		}
	}
	return false
}

// remember records the base's identity where it is not the one that was.
func (v *view) remember(was image.Identity) error {
	now := v.identity.Encode()
	if v.store.ReadOnly() || string(now) == string(was.Encode()) {
		return nil
	}
	return v.store.SetBase(now)
}

// Close closes the device's store and the base. What was written is durable
// when it returns nil.
func (v *view) Close() error {
	return errors.Join(v.device.Close(), v.store.Close(), v.base.Close())
}

// absolute returns path from the root, or as it is where that is not known.
func absolute(path string) string {
	if abs, err := filepath.Abs(path); err == nil {
		return abs
	}
	return path
}

// syncDir makes names in dir durable.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := d.Sync(); err != nil && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("%s: sync directory: %w", dir, err)
	}
	return nil
}
