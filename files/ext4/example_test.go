package ext4_test

import (
	"fmt"
	"log"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/cowdev/cowdev/files/ext4"
)

// Reads a file and lists a directory of an image that is not mounted.
func ExampleOpen() {
	dir, err := os.MkdirTemp("", "example")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	tree, image := filepath.Join(dir, "tree"), filepath.Join(dir, "image")
	if err := os.Mkdir(tree, 0o755); err != nil {
		log.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(tree, "hello"), []byte("Hello from an image."), 0o644); err != nil {
		log.Fatal(err)
	}
	if out, err := exec.Command("mke2fs", "-q", "-t", "ext4", "-d", tree, image, "4M").CombinedOutput(); err != nil {
		log.Fatalf("mke2fs: %v: %s", err, out)
	}

	file, err := os.Open(image)
	if err != nil {
		log.Fatal(err)
	}
	defer file.Close()
	fs, err := ext4.Open(fileReader{file, 4 << 20})
	if err != nil {
		log.Fatal(err)
	}
	root, err := fs.Resolve("/", true)
	if err != nil {
		log.Fatal(err)
	}
	err = fs.ReadDir(root, func(e ext4.Dirent) error {
		n, err := fs.Inode(e.Ino)
		if err != nil {
			return err
		}
		fmt.Printf("%v %s\n", n.FileMode(), e.Name)
		return nil
	})
	if err != nil {
		log.Fatal(err)
	}
	hello, err := fs.Resolve("hello", true)
	if err != nil {
		log.Fatal(err)
	}
	content := make([]byte, hello.Size)
	if _, err := hello.ReadAt(content, 0); err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%s\n", content)
	// Output:
	// drwx------ lost+found
	// -rw-r--r-- hello
	// Hello from an image.
}
