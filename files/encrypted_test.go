package files

// What the kernel encrypts (fscrypt): it is named and passed over, and all else
// is seen as ever.

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/cowdev/cowdev/files/ext4"
)

// unlock gives the file system mounted at dir a key, and returns the policy
// that encrypts with it. It skips the test where the kernel cannot.
func unlock(t *testing.T, dir string) unix.FscryptPolicyV2 {
	t.Helper()
	var key struct {
		unix.FscryptAddKeyArg
		raw [64]byte
	}
	key.Key_spec.Type, key.Raw_size = unix.FSCRYPT_KEY_SPEC_TYPE_IDENTIFIER, uint32(len(key.raw))
	for i := range key.raw {
		key.raw[i] = byte(i)
	}
	if err := ioctl(t, dir, unix.FS_IOC_ADD_ENCRYPTION_KEY, unsafe.Pointer(&key)); err != nil {
		t.Skipf("this kernel has no fscrypt: %v", err)
	}
	p := unix.FscryptPolicyV2{Version: 2, Contents_encryption_mode: unix.FSCRYPT_MODE_AES_256_XTS, Filenames_encryption_mode: unix.FSCRYPT_MODE_AES_256_CTS}
	copy(p.Master_key_identifier[:], key.Key_spec.U[:])
	return p
}

func ioctl(t *testing.T, dir string, request uint, arg unsafe.Pointer) error {
	t.Helper()
	f, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), uintptr(request), uintptr(arg)); errno != 0 {
		return errno
	}
	return nil
}

// changedBy returns old, and a copy of it that change was done to while it was
// mounted and unlocked.
func changedBy(t *testing.T, old string, change func(dir string)) pairOf {
	t.Helper()
	p := pairOf{old: old, new: filepath.Join(t.TempDir(), "new.img")}
	run(t, "cp", "--sparse=always", p.old, p.new)
	dir, unmount := mount(t, p.new, "noatime")
	unlock(t, dir)
	change(dir)
	unmount()
	p.changed = differences(t, p.old, p.new)
	return p
}

// newEncrypted makes an image with /plain/file, and encrypted /secret with a
// file, a link and a directory in it, and /out that was moved out of there.
func newEncrypted(t *testing.T) string {
	t.Helper()
	needMount(t)
	image := blank(t, 16<<20)
	run(t, "mke2fs", "-q", "-F", "-t", "ext4", "-O", "encrypt", image)
	dir, unmount := mount(t, image, "noatime")
	policy := unlock(t, dir)
	for _, err := range []error{
		os.Mkdir(dir+"/plain", 0o755), os.WriteFile(dir+"/plain/file", []byte("plain"), 0o644),
		os.Mkdir(dir+"/secret", 0o755), ioctl(t, dir+"/secret", unix.FS_IOC_SET_ENCRYPTION_POLICY, unsafe.Pointer(&policy)),
		os.Mkdir(dir+"/secret/sub", 0o755), os.WriteFile(dir+"/secret/sub/file", []byte("secret"), 0o644),
		os.Symlink("sub/file", dir+"/secret/link"), os.WriteFile(dir+"/secret/out", make([]byte, 9000), 0o644),
		os.Rename(dir+"/secret/out", dir+"/out"),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	unmount()
	return image
}

func TestCompareEncrypted(t *testing.T) {
	old := newEncrypted(t)
	both := []string{"/out", "/secret"}
	for _, c := range []struct {
		name      string
		change    func(dir string) error
		want      []string // changes
		fast      bool
		encrypted []string // without All
	}{
		{"beside", func(dir string) error { return os.WriteFile(dir+"/new", nil, 0o644) },
			[]string{"added      /new  (0 bytes)", "attributes /  (mtime)"}, true, nil},
		{"content", func(dir string) error {
			return errors.Join(os.WriteFile(dir+"/secret/sub/file", []byte("SECRET"), 0o644), os.Chmod(dir+"/plain/file", 0o600))
		}, []string{"attributes /plain/file  (mode)"}, false, both},
		{"moved out", func(dir string) error { return os.Chmod(dir+"/out", 0o600) },
			[]string{"attributes /out  (mode)"}, false, both},
		{"renamed", func(dir string) error { return os.Rename(dir+"/secret", dir+"/hidden") },
			[]string{"attributes /  (mtime)", "renamed    /secret -> /hidden"}, false, []string{"/hidden", "/out", "/secret"}},
		{"removed", func(dir string) error { return os.RemoveAll(dir + "/secret") },
			[]string{"attributes /  (mtime)", "removed    /secret  (directory)"}, false, both},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := changedBy(t, old, func(dir string) {
				if err := c.change(dir); err != nil {
					t.Fatal(err)
				}
			})
			for _, all := range []bool{false, true} {
				r, err := Compare(openImage(t, p.old), openImage(t, p.new), Options{Changed: p.changed, All: all})
				if err != nil {
					t.Fatalf("all=%v: %v", all, err)
				}
				var got []string
				for _, ch := range r.Changes {
					got = append(got, ch.String())
				}
				slices.Sort(got)
				slices.Sort(c.want)
				if !slices.Equal(got, c.want) {
					t.Errorf("all=%v: changes %q, expected %q", all, got, c.want)
				}
				encrypted := c.encrypted
				if all && encrypted == nil {
					encrypted = both
				}
				if r.Fast != (c.fast && !all) || !slices.Equal(r.Encrypted, encrypted) {
					t.Errorf("all=%v: fast=%v, encrypted %q, expected %q", all, r.Fast, r.Encrypted, encrypted)
				}
			}
		})
	}
}

// TestWhyEncrypted: what is encrypted has its space, and no name.
func TestWhyEncrypted(t *testing.T) {
	const size = 64 << 10
	p := changedBy(t, newEncrypted(t), func(dir string) {
		err := errors.Join(os.WriteFile(dir+"/secret/large", bytes.Repeat([]byte("secret"), size/6+1)[:size], 0o644),
			os.WriteFile(dir+"/plain/large", bytes.Repeat([]byte("plain"), size/5+1)[:size], 0o644))
		if err != nil {
			t.Fatal(err)
		}
	})
	r, err := Why(openReader(t, p.old), openReader(t, p.new), openImage(t, p.new), p.changed)
	if err != nil {
		t.Fatal(err)
	}
	var plain, encrypted int64
	for _, f := range r.Files {
		switch {
		case f.Path == "/plain/large":
			plain += f.Stored
		case strings.HasSuffix(f.Path, ", encrypted"):
			encrypted += f.Stored
		case !strings.HasPrefix(f.Path, "/"):
			t.Errorf("%q: neither a path nor encrypted", f.Path)
		}
	}
	// Of what is encrypted there is the directory too.
	if plain != size || encrypted < size || encrypted > 2*size {
		t.Errorf("%d bytes of the plain file, %d of encrypted ones, expected %d each\n%+v", plain, encrypted, size, r.Files)
	}
}

func TestExtractEncrypted(t *testing.T) {
	image := openImage(t, newEncrypted(t))
	top, err := image.Root()
	if err != nil {
		t.Fatal(err)
	}
	root, err := os.OpenRoot(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	var encrypted []string
	if _, err := Extract(t.Context(), top, root, ".", ExtractOptions{Encrypted: func(name string) { encrypted = append(encrypted, name) }}); err != nil {
		t.Fatal(err)
	}
	if want := []string{"out", "secret"}; !slices.Equal(encrypted, want) {
		t.Errorf("encrypted %q, expected %q", encrypted, want)
	}
	if p, err := root.ReadFile("plain/file"); err != nil || string(p) != "plain" {
		t.Errorf("the file beside holds %q, %v", p, err)
	}
	for _, name := range encrypted {
		if _, err := root.Lstat(name); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s was made: %v", name, err)
		}
	}
	if _, err := Extract(t.Context(), top, root, "again", ExtractOptions{}); !errors.Is(err, ext4.ErrEncrypted) {
		t.Errorf("without Encrypted: %v, expected %v", err, ext4.ErrEncrypted)
	}
}
