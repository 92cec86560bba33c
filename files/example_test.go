package files_test

import (
	"fmt"
	"log"
	"os"

	"github.com/cowdev/cowdev/block"
	"github.com/cowdev/cowdev/files"
)

// image is a file as a block.Reader.
type image struct{ *os.File }

func (i image) Size() int64 {
	info, err := i.Stat()
	if err != nil {
		return 0
	}
	return info.Size()
}

func open(name string) (image, files.FS) {
	f, err := os.Open(name)
	if err != nil {
		log.Fatal(err)
	}
	fsys, err := files.Open(image{f})
	if err != nil {
		log.Fatal(err)
	}
	return image{f}, fsys
}

// Print what changed between two states of an image, of which it is known
// where their bytes differ.
func ExampleCompare() {
	_, old := open("base.img")
	_, now := open("changed.img")
	changed := []block.Extent{{Off: 1 << 20, N: 64 << 10, State: block.Stored}}
	r, err := files.Compare(old, now, files.Options{Changed: changed})
	if err != nil {
		log.Fatal(err)
	}
	for _, c := range r.Changes {
		fmt.Println(c)
	}
}

// Print the paths in an image.
func ExampleWalk() {
	_, fsys := open("base.img")
	root, err := fsys.Root()
	if err != nil {
		log.Fatal(err)
	}
	err = files.Walk("/", root, func(name string, f files.File) error {
		_, err := fmt.Println(name, f.Attr().Size)
		return err
	})
	if err != nil {
		log.Fatal(err)
	}
}
